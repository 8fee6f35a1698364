"""Greedy generation by jaxlm, transformers and llama.cpp: tokens per second and their ratios.

    pip install -e '.[bench]' gguf llama-cpp-python    # the last one is built from source; optional
    python benchmarks/generate.py [--models=gpt2,smollm2] [--smollm2=SmolLM2.gguf] [--rounds=6]

GPT-2 small (random weights) and SmolLM2-135M (those of a GGUF file where one is given, else random)
are written as one Hugging Face folder each, in float32, which all read. Each contender lives in its
own process with every core of the machine, compiles first, and then they take turns: 32 tokens of
prompt, 64 new ones, alone and 16 at once; and 128 tokens of prompt to the first new one. Their
tokens must be the same. What share of the memory's bandwidth the weights' bytes take is told with
the fastest read of a gigabyte that any of the libraries did in the same run. Prints tables; writes
generate.json. Run on a quiet machine.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import turns
from turns import CORES, Child

PROMPT, NEW, LONG_PROMPT, BATCH = 32, 64, 128, 16
WAYS = {"alone": (1, PROMPT, NEW), "batch": (BATCH, PROMPT, NEW), "first": (1, LONG_PROMPT, 1)}

Generate = Callable[[np.ndarray, int], Any]  # token ids [b, t], how many more -> [b, new]
Sum = Callable[[np.ndarray], Callable[[], Any]]  # of a large array: what adds it up

# ------------------------------------------------------------------------------------- contenders


def of_jaxlm(folder: Path, bits: int = 32) -> tuple[Generate, Sum]:
    import jax
    import jax.numpy as jnp

    from jaxlm import mesh
    from jaxlm.config import Config
    from jaxlm.generate import decode, layout
    from jaxlm.generate.sampling import Sampling
    from jaxlm.model.hf import load

    checkpoint = load.open_folder(folder)
    config = checkpoint.config
    jax.set_mesh(mesh.make(Config(model=config), jax.devices()[:1]))
    params = load.load(checkpoint)
    alone = layout.laid_out(config, params, bits=bits)
    params = params if bits == 32 else alone  # as LanguageModel does

    def generate(prompts: np.ndarray, new: int) -> Any:
        weights = alone if len(prompts) == 1 else params
        return decode.generate(config, weights, list(prompts), new, None, Sampling(0.0))

    def adder(array: np.ndarray) -> Callable[[], Any]:
        there, run = jax.device_put(array), jax.jit(jnp.sum)
        return lambda: run(there).block_until_ready()

    return generate, adder


def of_transformers(folder: Path) -> tuple[Generate, Sum]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(CORES)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # all go on to the last token

    def generate(prompts: np.ndarray, new: int) -> Any:
        ids = torch.from_numpy(prompts.astype(np.int64))
        mask = torch.ones_like(ids)
        whole = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        return whole[:, ids.shape[1] :].numpy()

    return generate, lambda array: torch.from_numpy(array).sum


def of_llama_cpp(folder: Path) -> tuple[Generate, Sum]:
    """By its C interface: that of Python continues one prompt at a time."""
    import llama_cpp as c

    c.llama_backend_init()
    rows, slots, model_options = BATCH, 256, c.llama_model_default_params()
    model = c.llama_model_load_from_file(str(folder / "model.gguf").encode(), model_options)
    options = c.llama_context_default_params()
    options.n_ctx, options.n_seq_max = rows * slots, rows
    options.n_batch = options.n_ubatch = rows * PROMPT
    options.n_threads = options.n_threads_batch = CORES
    options.type_k = options.type_v = c.GGML_TYPE_F32
    options.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to 16 bits within
    context = c.llama_init_from_model(model, options)
    vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    batch = c.llama_batch_init(rows * PROMPT, 0, 1)

    def fed(ids_bt: np.ndarray, at: int) -> np.ndarray:
        """The likeliest token after each row's last, int32 [b, 1]."""
        b, t = ids_bt.shape
        batch.n_tokens = b * t
        for i, token in enumerate(ids_bt.ravel().tolist()):
            batch.token[i], batch.pos[i], batch.logits[i] = token, at + i % t, i % t == t - 1
            batch.seq_id[i][0], batch.n_seq_id[i] = i // t, 1
        if c.llama_decode(context, batch):
            sys.exit("llama.cpp: llama_decode failed")
        last = (c.llama_get_logits_ith(context, (i + 1) * t - 1) for i in range(b))
        return np.array([[np.ctypeslib.as_array(p, (vocab,)).argmax()] for p in last], np.int32)

    def generate(prompts: np.ndarray, new: int) -> Any:
        c.llama_memory_clear(c.llama_get_memory(context), True)
        said = [fed(prompts, 0)]
        for i in range(new - 1):
            said.append(fed(said[-1], prompts.shape[1] + i))
        return np.concatenate(said, axis=1)

    return generate, lambda array: array.sum


CONTENDERS = {
    "jaxlm": (of_jaxlm, "jaxlm"),
    "jaxlm, int8": (functools.partial(of_jaxlm, bits=8), "jaxlm"),
    "jaxlm, int4": (functools.partial(of_jaxlm, bits=4), "jaxlm"),
    "transformers": (of_transformers, "transformers"),
    "llama.cpp": (of_llama_cpp, "llama_cpp"),
}


def contender(name: str, folder: Path) -> None:
    """Child process: compiles all of `WAYS`, then answers their names and 'read' with JSON."""

    def start() -> tuple[dict[str, Any], Callable[[str], dict[str, Any]]]:
        generate, adder = CONTENDERS[name][0](folder)
        vocab = json.loads((folder / "config.json").read_text())["vocab_size"]

        def take_turn(way: str) -> dict[str, Any]:
            rows, t, new = WAYS[way]
            prompts = np.random.default_rng(0).integers(3, vocab, (rows, t)).astype(np.int32)
            began = time.perf_counter()
            found = generate(prompts, new)
            took = time.perf_counter() - began
            return {"s": took, "tokens": np.asarray(found).tolist()}

        def read(_: str) -> dict[str, Any]:
            array = np.ones(1 << 28, np.float32)
            run, best = adder(array), 0.0
            for _ in range(5):
                began = time.perf_counter()
                run()
                best = max(best, array.nbytes / (time.perf_counter() - began) / 1e9)
            return {"gb_per_s": best}

        for way in WAYS:
            take_turn(way)
        return {}, lambda line: (read if line == "read" else take_turn)(line)

    turns.serve(start)


# ------------------------------------------------------------------------------------------ models


def write_model(name: str, folder: Path, smollm2: str | None) -> None:
    """A folder with the model's float32 weights."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    if name == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config())
        with torch.no_grad():  # from the first of ever new tokens: larger than a fresh one's
            for parameter in model.transformer.h.parameters():
                parameter.mul_(3.0) if parameter.ndim == 2 else None
    elif smollm2 is not None:
        where = Path(smollm2)
        read = hf.AutoModelForCausalLM.from_pretrained(
            where.parent, gguf_file=where.name, dtype=torch.float32
        )
        values = read.config.to_dict()
        values.pop("quantization_config", None)  # with which it would not be written
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**values))
        model.load_state_dict(read.state_dict())
    else:
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
                tie_word_embeddings=True, rope_parameters={"rope_type": "default",
                "rope_theta": 100000.0},
            )
        )  # fmt: skip
    model.save_pretrained(folder)


def write_gguf(folder: Path) -> None:
    """A folder's weights as model.gguf for llama.cpp: float32, without a tokenizer."""
    import gguf
    import torch
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    c = model.config
    llama = c.model_type == "llama"
    n, d, heads = c.num_hidden_layers, c.hidden_size, c.num_attention_heads
    arch = gguf.MODEL_ARCH.LLAMA if llama else gguf.MODEL_ARCH.GPT2
    out = gguf.GGUFWriter(folder / "model.gguf", gguf.MODEL_ARCH_NAMES[arch])
    out.add_block_count(n)
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(d)
    out.add_head_count(heads)
    out.add_file_type(gguf.LlamaFileType.ALL_F32)
    out.add_vocab_size(c.vocab_size)
    out.add_tokenizer_model("none")
    if llama:
        out.add_feed_forward_length(c.intermediate_size)
        out.add_head_count_kv(c.num_key_value_heads)
        out.add_layer_norm_rms_eps(c.rms_norm_eps)
        out.add_rope_freq_base(c.rope_parameters["rope_theta"])
        out.add_rope_dimension_count(d // heads)
    else:
        out.add_feed_forward_length(4 * d)
        out.add_layer_norm_eps(c.layer_norm_epsilon)
    names = gguf.get_tensor_name_map(arch, n)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        x = tensor.float().numpy()
        if not llama and x.ndim == 2 and ".h." in name:
            x = x.T  # its Conv1D holds [in, out]
        if llama and (rotated := next((k for k in ("q_proj", "k_proj") if k in name), None)):
            own = heads if rotated == "q_proj" else c.num_key_value_heads
            x = x.reshape(own, 2, -1, d).swapaxes(1, 2).reshape(x.shape)  # pairs side by side
        out.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(x))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def weight_bytes(folder: Path) -> int:
    """Of what one new token is multiplied by: all but what is only looked up, one row of it."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "np") as file:
        names = [name for name in file.keys() if "wpe" not in name]  # noqa: SIM118
        return sum(4 * int(np.prod(file.get_slice(name).get_shape())) for name in names)


# ------------------------------------------------------------------------------------------ parent


def measure(model: str, folder: Path, rounds: int) -> dict[str, Any]:
    children = []
    for name, (_, module) in CONTENDERS.items():
        if importlib.util.find_spec(module) is None:
            print(f"{name}: {module} is not installed; left out", file=sys.stderr)
            continue
        env = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(CORES)}
        children.append(Child(__file__, name, [folder], env))
        print(f"{model}: {name} ready", file=sys.stderr, flush=True)
    for _ in range(rounds):
        for way in WAYS:
            for child in children:
                child.rows.append({"way": way, **child.ask(way)})
    reads = {child.name: child.ask("read")["gb_per_s"] for child in children}
    for child in children:
        child.close()
    found = {child.name: summary(child) for child in children}
    return {
        "model": model,
        "weight_bytes": weight_bytes(folder),
        "read_gb_per_s": max(reads.values()),
        "contenders": found,
        "same_tokens": {child.name: same(children[0], child) for child in children},
    }


def summary(child: Child) -> dict[str, Any]:
    """Tokens per second of each round; of "first", seconds."""
    out = {}
    for way in WAYS:
        rows, _, new = WAYS[way]
        seconds = [row["s"] for row in child.rows if row["way"] == way]
        out[way] = seconds if way == "first" else [rows * new / s for s in seconds]
    return out


def same(ours: Child, theirs: Child) -> dict[str, float]:
    """Of each way: which share of the tokens both say."""
    out = {}
    for way in WAYS:
        a, b = (next(r["tokens"] for r in c.rows if r["way"] == way) for c in (ours, theirs))
        out[way] = float(np.mean(np.array(a) == np.array(b)))
    return out


def show(result: dict[str, Any]) -> None:
    rows, read = result["contenders"], result["read_gb_per_s"]
    gb = result["weight_bytes"] / 1e9
    print(
        f"\n{result['model']}: {gb:.2f} GB of float32 weights; {read:.1f} GB/s read, so"
        f" {read / gb:.0f} tokens/s at most"
    )
    print(
        f"{'':<14}{'alone':>8}{'of read':>9}{f'batch {BATCH}':>10}{'first token':>13}  same tokens"
        "   × transformers: alone, batch (quartiles)"
    )
    for name, row in rows.items():
        alone = statistics.median(row["alone"])
        batch = statistics.median(row["batch"])
        first = statistics.median(row["first"]) * 1e3
        share = "–" if ", int" in name else f"{alone * gb / read:.0%}"
        line = f"{name:<14}{alone:>8.1f}{share:>9}{batch:>10.0f}{first:>10.0f} ms"
        line += f"{min(result['same_tokens'][name].values()):>13.0%}"
        for way in ("alone", "batch"):
            middle, low, high = turns.ratio(row[way], rows["transformers"][way])
            line += f"   {middle:.2f} ({low:.2f}–{high:.2f})"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="gpt2,smollm2")
    parser.add_argument("--smollm2", default=None, help="a GGUF file of it")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    missing = [m for m in ("torch", "transformers") if importlib.util.find_spec(m) is None]
    if missing:
        sys.exit(f"{' and '.join(missing)} missing: pip install -e '.[bench]'")
    out = Path(options.out or tempfile.mkdtemp())
    results = []
    for name in options.models.split(","):
        folder = out / name
        if not (folder / "model.safetensors").exists():
            write_model(name, folder, options.smollm2)
        if importlib.util.find_spec("llama_cpp") and not (folder / "model.gguf").exists():
            write_gguf(folder)
        results.append(measure(name, folder, options.rounds))
        show(results[-1])
    about = {"machine": platform.machine(), "cores": CORES, "python": platform.python_version()}
    document = {"format": "jaxlm.benchmark_generate/1", **about, "results": results}
    (out / "generate.json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"\nwritten: {out / 'generate.json'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contender"]:
        contender(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
