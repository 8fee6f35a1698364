"""A training job: data, mesh, observers and the loop, in one folder per run.

`jaxlm train`, the Python face and every sweep worker come through here.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm import hosts, mesh
from jaxlm.config import Config, MeshConfig
from jaxlm.data import card, loader, shards, subset, tokenizer
from jaxlm.evaluate import likelihood
from jaxlm.files import write_bytes
from jaxlm.generate import watch
from jaxlm.schema import UserError
from jaxlm.train import loop, workdir
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.optimizer import hyper
from jaxlm.train.record import Role, RunRecord
from jaxlm.train.run import Run
from jaxlm.train.step import abstract_state
from jaxlm.train.trackers import Trackers


@dataclass(frozen=True)
class Task:
    """One run to train: what, where, and its part in a sweep."""

    config: Config
    folder: Path
    role: Role = "single"
    budget: float = 0.0


class Begin(NamedTuple):
    """What a run begins with in place of fresh parameters, and what identifies it."""

    given: loop.Given
    mark: str


def cache_compilations() -> None:
    """JAX's persistent compilation cache, also for programs that compile in under a second."""
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "jaxlm" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def train(
    tasks: Sequence[Task],
    data_dir: Path,
    stop: Any = False,
    progress: loop.Progress = lambda run, row: None,
    begin: Begin | None = None,
    watch: Sequence[loop.Observer] = (),
) -> list[RunRecord]:
    """Train the tasks to their ends, from wherever they are; returns their records.

    Several tasks must be of one shape and horizon: they train as one program (`jax.vmap`). Token
    shards must be in `data_dir`. A finished task is not touched; one whose loss became NaN or
    infinite has the status "diverged". `begin`: what a lone task begins with; `watch`: observers
    besides those that the config asks for. Raises what else `loop.fit` raises, and UserError for a
    folder that holds another run or another process.
    """
    cache_compilations()
    data = shards.read_manifest(data_dir)
    terms = card.terms(data)
    saw = data.fingerprint + (f"-{begin.mark}" if begin else "")
    runs = [Run(t.config, t.folder, saw, t.role, t.budget, terms) for t in tasks]
    with contextlib.ExitStack() as held:
        for run in runs:
            hosts.by_lead(functools.partial(_claim, run, held))
        todo = [run for run in runs if run.record() is None]
        for group in _groups(todo):
            with contextlib.suppress(loop.Diverged):  # its record says so
                given = begin.given if begin else loop.NOTHING
                _fit(group, data_dir, stop, progress, given, watch)
    return [found for run in runs if (found := run.record()) is not None]


def _claim(run: Run, held: contextlib.ExitStack) -> None:
    held.enter_context(workdir.lock(run.folder))
    run.claim()


def _groups(todo: list[Run]) -> list[list[Run]]:
    """All at once, unless an interruption left them at different steps: then one by one."""
    steps = {max(hosts.by_lead(run.checkpoints.steps), default=0) for run in todo}
    return [todo] if len(steps) == 1 else [[run] for run in todo]


def _fit(
    group: list[Run],
    data_dir: Path,
    stop: Any,
    progress: loop.Progress,
    given: loop.Given,
    watch: Sequence[loop.Observer],
) -> None:
    config = group[0].config
    tracked = group if hosts.is_lead() else []
    with contextlib.ExitStack() as held:
        with hosts.together():
            train_set = subset.of(_open(config, data_dir, "train"), config.data.unique_tokens)
            sequences = config.train.steps * config.train.global_batch_size
            mixture = loader.mixture_of(train_set, config.data, sequences)
            for run in group:
                seed = loop.data_seed(run.config)
                loader.check_epochs(train_set, sequences, config.data.max_epochs, seed, mixture)
            observers = [*_observers(config, data_dir), _seen(train_set, mixture), *watch]
            for run in tracked:
                _keep_data_card(run.folder, data_dir)
            trackers = {
                run.folder: held.enter_context(Trackers(run.config, run.folder)) for run in tracked
            }

        def send(run: Run, row: dict[str, Any]) -> None:
            if hosts.is_lead():
                trackers[run.folder].row(row)
                progress(run, row)

        held.enter_context(jax.set_mesh(mesh.make(config)))
        loop.fit(group, train_set, observers, stop, send, mixture, given)


def _open(config: Config, data_dir: Path, split: str) -> loader.Dataset:
    packing = config.data.packing if split == "train" else "split"
    words = config.train.corruption.whole_words
    return loader.Dataset.open(data_dir, split, config.model.seq_len, packing, words)


def _observers(config: Config, data_dir: Path) -> list[loop.Observer]:
    """What is watched besides the training loss."""
    eval_set = _open(config, data_dir, "eval")
    words, t = tokenizer.load(data_dir / "tokenizer"), config.train
    watch.check_prompts(config, words)
    found = [likelihood.heldout(eval_set, config.data.eval_sequences)]
    if len(eval_set.sources) > 1:
        found.append(likelihood.by_source(eval_set, config.data.eval_sequences))
    if t.probes:
        found.append(watch.probes(words, t.probes))
    if t.sample_prompts:
        found.append(watch.samples(words, t.sample_prompts, t.sample_tokens, config.seed))
    return found


def _seen(dataset: loader.Rows, mixture: loader.Mixture | None) -> loop.Observer:
    """How often each source was seen."""

    def observe(config: Config, params: Any, step: int) -> list[dict[str, Any]]:
        sequences = step * config.train.global_batch_size
        found = loader.epochs(dataset, loop.data_seed(config), sequences, mixture)
        return [{"step": step, **{f"data/epochs/{name}": x for name, x in found.items()}}]

    return observe


def _keep_data_card(folder: Path, data_dir: Path) -> None:
    """What the run read, and its tokenizer, so that the folder tells the whole story alone."""
    write_bytes(folder / "data_manifest.json", (data_dir / "manifest.json").read_bytes())
    write_bytes(folder / card.CARD, card.text(data_dir).encode())
    for path in (data_dir / "tokenizer").iterdir():
        write_bytes(folder / "tokenizer" / path.name, path.read_bytes())


def reading_mesh(config: Config) -> jax.sharding.Mesh:
    """The run's own devices (`mesh.for_reading`) where these make it up, else one device."""
    try:
        return mesh.for_reading(mesh.make(config))
    except UserError:
        return mesh.make(replace(config, mesh=MeshConfig()), jax.devices()[:1])


def load_params(config: Config, folder: Path) -> Any:
    """Parameters of the newest good checkpoint, laid on the current mesh. Raises UserError."""
    checkpoints = Checkpoints(folder / "checkpoints")
    if not checkpoints.steps():
        raise UserError(f"--workdir: {folder} holds no checkpoint")
    abstract = abstract_state(config, hyper(config)).params
    return checkpoints.load({"params": abstract})[1]["params"]
