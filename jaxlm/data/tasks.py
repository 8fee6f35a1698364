"""The tasks of cleaning on datatrove's executors: processes here, or a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document as Carried
from datatrove.executor.base import DistributedEnvVars, PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from jaxlm.config import DataConfig
from jaxlm.data import clean
from jaxlm.data.documents import Reading, Unit
from jaxlm.data.extras import library
from jaxlm.data.spool import Progress
from jaxlm.data.units import UNIT, hashes, is_spaceless, units
from jaxlm.schema import JaxlmError

WORDS, LETTERS = 3, 6  # in a shingle, with and without spaces between words
MINHASH = MinhashConfig(
    num_buckets=24,  # two texts with Jaccard similarity s meet with 1 - (1 - s⁶)²⁴:
    hashes_per_bucket=6,  # 0.99 at 0.75, 0.31 at 0.5, 0.02 at 0.3
    hash_config=HashConfig(precision=64, hash_fc="xxhash"),
)
TRIES = 3  # for workers that were killed


class Prepare(PipelineStep):
    name, type = "prepare", "jaxlm"

    def __init__(
        self, folder: Path, units: list[Unit], reading: Reading, steps: clean.Steps
    ) -> None:
        super().__init__()
        self.folder, self.units, self.reading, self.steps = folder, units, reading, steps

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Carried]:
        kept = clean.prepare(self.folder, self.units, self.reading, self.steps, rank, world_size)
        for i, document in enumerate(kept):
            yield Carried(document.text, str(i))


class Units(WordTokenizer):
    """`units` for datatrove, whose own tokenizers need a library for each language."""

    def word_tokenize(self, text: str) -> list[str]:
        return units(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [m.span() for m in UNIT.finditer(text)]


class Signature(MinhashDedupSignature):
    """Signatures of runs of words, or of letters where there are none."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, MINHASH, language=Units())

    def get_shingles(self, text: str) -> np.ndarray:
        n = LETTERS if is_spaceless(text) else WORDS
        sequence = units(text)
        found = hashes(sequence, min(n, max(1, len(sequence))))
        return np.array(sorted(set(found)), np.uint64).reshape(-1, 1)


class DropNear(PipelineStep):
    name, type = "drop near-duplicates", "jaxlm"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Carried]:
        clean.drop_near(self.folder, rank)
        yield from ()


class Pool(PipelineExecutor):
    """Processes on this machine. A worker that is killed is replaced, and its task done again."""

    def __init__(self, pipeline: list[Any], logging_dir: str, tasks: int, workers: int) -> None:
        super().__init__(pipeline, logging_dir)
        self.tasks, self.workers = tasks, min(workers or os.cpu_count() or 1, tasks)

    @property
    def world_size(self) -> int:
        return self.tasks

    def get_distributed_env(self, node_rank: int = -1) -> DistributedEnvVars:
        return DistributedEnvVars(
            datatrove_node_ips="localhost",
            datatrove_cpus_per_task="1",
            datatrove_mem_per_cpu="-1",
            datatrove_gpus_on_node="0",
            datatrove_executor="jaxlm",
        )

    def one(self, rank: int) -> None:
        library("loguru").logger.disable("datatrove")
        self._run_for_rank(rank, rank + 1)

    def run(self) -> None:
        for _ in range(TRIES):
            todo = self.get_incomplete_ranks()
            if not todo:
                return
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(min(self.workers, len(todo)), context) as pool:
                futures = [pool.submit(self.one, rank) for rank in todo]
                try:
                    for future in as_completed(futures):
                        future.result()
                except BrokenProcessPool:
                    pass  # what is missing is tried again
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise


class Cluster(Pool):
    """A Ray cluster, of which every node sees the folder. Ray does the tasks of a lost node again.

    (datatrove's own executor waits for ever for a task whose node is lost while it starts.)
    """

    def run(self) -> None:
        ray = library("ray", "ray")
        if not ray.is_initialized():
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False)
        one = ray.remote(num_cpus=1, max_retries=TRIES)(Pool.one)
        ray.get([one.remote(self, rank) for rank in self.get_incomplete_ranks()])


def run(
    data: DataConfig,
    folder: Path,
    files: list[Unit],
    reading: Reading,
    steps: clean.Steps,
    world: int,
    report: Progress,
) -> None:
    """All stages of cleaning, each on `data.engine`; those that are done are not done again."""
    library("loguru").logger.disable("datatrove")
    os.environ.setdefault("TQDM_DISABLE", "1")
    at, near = str(folder), data.clean.near_duplicates
    first: list[Any] = [Prepare(folder, files, reading, steps)]
    stages: list[tuple[str, list[Any], int]] = [("cleaning", first, world)]
    if near:
        first.append(Signature(f"{at}/signatures"))
        buckets = MinhashDedupBuckets(f"{at}/signatures", f"{at}/buckets", config=MINHASH)
        cluster = MinhashDedupCluster(
            f"{at}/buckets", f"{at}/remove", MINHASH, save_cluster_id=True
        )
        stages += [
            ("comparing signatures", [buckets], MINHASH.num_buckets),
            ("clustering near-duplicates", [cluster], 1),
            ("dropping near-duplicates", [DropNear(folder)], world),
        ]
    for i, (name, pipeline, tasks) in enumerate(stages):
        report(0, 0, f"{name} ({i + 1} of {len(stages)})")
        logs = f"{at}/logs/{i}"
        engine = Cluster if data.engine == "ray" else Pool
        executor = engine(pipeline, logs, tasks, data.workers)
        executor.run()
        if left := executor.get_incomplete_ranks():
            raise JaxlmError(f"data: {name}: {len(left)} of {tasks} tasks failed; see {logs}")
