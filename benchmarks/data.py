"""Tokenise-and-shard and the loader against what others would write, all in one run.

Command:  python benchmarks/data.py            (needs `pip install datasets`; about 3 minutes)
Targets:  shards ≥ 1.2 × datasets.map on 2 processes, ≥ 0.9 × the tokenizer's own encode_batch;
          loader ≥ 0.5 × random memmap windows in a loop; memory flat while the corpus grows 10 ×.
Seen:     (2 cores of an AMD EPYC, one run) 3.8 MB/s, 1.98 ×, 1.20 ×; 68 M tokens/s, 1.83 ×;
          memory 115 MB for 46 MB of text and 138 MB for 460 (a shard's 64 MB are mapped).
          In another run: 112 M tokens/s, 2.66 ×, and 349 × what the quickstart's fastest member
          trains on (320 thousand tokens/s).
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from jaxlm.config import DataConfig
from jaxlm.data import documents, loader, shards, tokenizer

ROUNDS = 3


def seconds(run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def corpus(folder: Path) -> tuple[Path, Path, int]:
    """The standard library as JSON lines, and a BPE trained on it."""
    texts = [d.text for d in documents.read(["stdlib"])]
    words = tokenizer.create("bpe", 4096, texts)
    words.save(folder / "tokenizer")
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path, folder / "tokenizer" / "tokenizer.json", sum(len(t.encode()) for t in texts)


def tokenise(folder: Path) -> dict[str, float]:
    """MB/s of text, median of the rounds, which take turns."""
    from datasets import load_dataset
    from tokenizers import Tokenizer

    path, words, size = corpus(folder)
    texts = [json.loads(line)["text"] for line in path.open()]
    inner = Tokenizer.from_file(str(words))

    def ours(i: int) -> None:
        data = DataConfig(sources=(str(path),), tokenizer=str(words))
        shards.build(data, 4096, folder / f"out-{i}")

    def theirs(i: int) -> None:
        rows = load_dataset(
            "json", data_files=str(path), split="train", cache_dir=str(folder / f"cache-{i}")
        )
        rows.map(
            lambda batch: {"ids": [e.ids for e in inner.encode_batch(batch["text"])]},
            batched=True,
            num_proc=2,
            remove_columns=["text"],
        )

    def alone(i: int) -> None:
        inner.encode_batch(texts, add_special_tokens=False)

    taken: dict[str, list[float]] = {}
    for i in range(ROUNDS):
        for run in (ours, theirs, alone):
            taken.setdefault(run.__name__, []).append(seconds(lambda run=run, i=i: run(i)))
    return {name: size / 1e6 / statistics.median(times) for name, times in taken.items()}


def load(folder: Path) -> dict[str, float]:
    """Tokens/s of batches of 16 windows of 256."""
    data = loader.Dataset.open(folder / "out-0", "train", 256)
    tokens = data.segments[0].tokens
    steps, batch = 2000, 16

    def ours() -> None:
        for _ in loader.chunks(data, 0, 0, steps, batch, steps_per_chunk=10):
            pass

    def theirs() -> None:  # as nanoGPT's get_batch
        rng = np.random.default_rng(0)
        for _ in range(steps):
            at = rng.integers(0, len(tokens) - 257, batch)
            np.stack([tokens[i : i + 256].astype(np.int64) for i in at])
            np.stack([tokens[i + 1 : i + 257].astype(np.int64) for i in at])

    taken = {run.__name__: [seconds(run) for _ in range(ROUNDS)] for run in (ours, theirs)}
    return {k: steps * batch * 256 / statistics.median(v) for k, v in taken.items()}


def consumed() -> float:
    """Tokens/s that the fastest member of the quickstart's ladder trains on, in one process."""
    import jax

    from jaxlm import mesh
    from jaxlm.experiment import load as experiment
    from jaxlm.scaling.ladder import members
    from jaxlm.train.optimizer import hyper
    from jaxlm.train.step import program

    sweep = experiment(Path(__file__).resolve().parents[1] / "experiments" / "quickstart.py")
    config = min((m.config for m in members(sweep)), key=lambda c: c.model.d_model)
    steps = config.train.steps_per_dispatch
    ids = np.zeros((steps, config.train.global_batch_size, config.model.seq_len), np.int32)
    batch = loader.Batch(ids, ids, np.ones(ids.shape, np.float32), ids + 1, ids)
    with jax.set_mesh(mesh.make(config)):
        chunk, h = program(config).chunk, hyper(config)
        state = program(config).init(h)
        batch = mesh.put_batch(batch, jax.sharding.get_mesh(), leading=1)
        taken = []
        for _ in range(6):
            began = time.perf_counter()
            state, metrics = chunk(h, state, batch)
            jax.block_until_ready(metrics)
            taken.append(time.perf_counter() - began)
    return ids.size / min(taken[1:])  # the first one compiles


def memory(folder: Path) -> dict[int, float]:
    """MB at the peak of a build, by how often the corpus is repeated (with other words in it)."""
    found = {}
    for times in (4, 40):
        path = folder / f"{times}.jsonl"
        with path.open("w") as f:
            for i in range(times):
                for line in (folder / "corpus.jsonl").open():
                    f.write(json.dumps({"text": f"{i}\n{json.loads(line)['text']}"}) + "\n")
        run = [sys.executable, __file__, "build", str(path), str(folder / f"memory-{times}")]
        found[times] = float(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    return found


def build(path: str, out: str) -> None:
    shards.build(DataConfig(sources=(path,), workers=1), 256, out)
    status = Path("/proc/self/status").read_text()  # ru_maxrss would start at the parent's
    print(int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1e3)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rate, speed, peak = tokenise(folder), load(folder), memory(folder)
    trained = consumed()
    print(f"tokenise and shard: {rate['ours']:.2f} MB/s")
    print(f"  {rate['ours'] / rate['theirs']:.2f} × datasets.map on 2 processes")
    print(f"  {rate['ours'] / rate['alone']:.2f} × encode_batch alone")
    print(f"loader: {speed['ours'] / 1e6:.1f} M tokens/s")
    print(f"  {speed['ours'] / speed['theirs']:.2f} × random memmap windows in a loop")
    print(f"  {speed['ours'] / trained:.0f} × what the quickstart's fastest member trains on")
    print(f"memory: {peak[4]:.0f} MB, and {peak[40]:.0f} MB for 10 × the text")


if __name__ == "__main__":
    build(*sys.argv[2:]) if sys.argv[1:2] == ["build"] else main()
