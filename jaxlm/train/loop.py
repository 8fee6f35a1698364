"""The training loop: chunks of steps in, rows and checkpoints out.

Metrics are fetched one chunk late, so that the device never waits for the host; they are always
fetched, and checked to be finite, before anything is saved. One call trains one run, or several of
one shape as a population (`jax.vmap`), each in its own folder. The loop knows nothing of
evaluation or generation: `observers` bring their rows.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm import hosts, mesh
from jaxlm.config import Config
from jaxlm.data import loader
from jaxlm.model import transformer
from jaxlm.model.scale import size
from jaxlm.schema import JaxlmError
from jaxlm.train import parameters, record
from jaxlm.train.checkpoint import NotFinite
from jaxlm.train.optimizer import hyper
from jaxlm.train.pulse import Pulse
from jaxlm.train.run import Run
from jaxlm.train.step import Program, State, abstract_state, program

Observer = Callable[[Config, Any, int], list[dict[str, Any]]]
"""(config, params, step) → rows for metrics.jsonl, each with its "step"."""

Progress = Callable[[Run, dict[str, Any]], None]
"""Called with every row as it is written."""


class Stopped(JaxlmError):
    """A signal came; everything is saved."""


class Diverged(JaxlmError):
    """The loss, the gradient or the parameters became NaN or infinite."""


class Given(NamedTuple):
    """What a lone run begins with instead of fresh parameters."""

    params: Any = None
    frozen: Any = None  # `State.frozen`, also when it resumes


NOTHING = Given()


@dataclass
class _Member:
    """What the loop keeps of one run between rows."""

    run: Run
    losses: list[float] = field(default_factory=list)  # since the last row
    train_loss: float | None = None
    evals: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0  # in earlier sittings

    def meta(self, step: int, seconds: float) -> dict[str, Any]:
        c = self.run.config
        return {
            "fingerprint": self.run.fingerprint,
            "data_fingerprint": self.run.data_fingerprint,
            "data": self.run.data_card,
            "position": step * c.train.global_batch_size,
            "losses": self.losses,
            "train_loss": self.train_loss,
            "evals": self.evals,
            "seconds": self.seconds + seconds,
        }

    def resume(self, meta: dict[str, Any]) -> None:
        self.losses, self.train_loss = list(meta["losses"]), meta["train_loss"]
        self.evals, self.seconds = dict(meta["evals"]), meta["seconds"]


def fit(
    runs: Sequence[Run],
    dataset: loader.Rows,
    observers: Sequence[Observer] = (),
    stop: Any = False,
    progress: Progress = lambda run, row: None,
    mixture: loader.Mixture | None = None,
    given: Given = NOTHING,
) -> list[record.RunRecord]:
    """Train `runs` to their end, from wherever they are; returns their records.

    Several runs must share shape, batch and steps (`step.static`): they are trained as one
    program. The current mesh must be set. Raises Stopped after a signal (all saved), Diverged for
    a lone run that became non-finite (a population's members only end early), JaxlmError on a full
    disk. Where `stop` may end the process, a loop that hangs ends it (`Pulse`).
    """
    with Pulse(runs[0].folder, getattr(stop, "ends_process", False)) as pulse:
        return _Loop(runs, dataset, observers, stop, progress, mixture, given, pulse).run()


class _Loop:
    """The moving parts of `fit`; one method per thing that happens."""

    def __init__(
        self,
        runs: Sequence[Run],
        dataset: loader.Rows,
        observers: Sequence[Observer],
        stop: Any,
        progress: Progress,
        mixture: loader.Mixture | None,
        given: Given,
        pulse: Pulse,
    ) -> None:
        self.members = [_Member(run) for run in runs]
        self.config = runs[0].config
        self.dataset, self.observers, self.stop, self.progress = dataset, observers, stop, progress
        self.stopping = hosts.Agreed(stop, jax.sharding.get_mesh())
        self.mixture, self.given, self.pulse = mixture, given, pulse
        self.population = len(runs) if len(runs) > 1 else 0
        self.mesh = jax.sharding.get_mesh()
        self.program: Program = program(self.config, self.population)
        hypers = [hyper(run.config) for run in runs]
        self.hyper = jax.tree.map(lambda *x: np.stack(x), *hypers) if self.population else hypers[0]
        self.flops_per_step = size(self.config.model).flops_per_token * self.config.batch_tokens
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.diverged: dict[int, int] = {}  # member → step
        self.tracing = False
        self.compiled: set[int] = set()  # lengths of chunks
        self.compiling = False  # since the last chunk's metrics were fetched

    # ------------------------------------------------------------------------------------ the run

    def run(self) -> list[record.RunRecord]:
        self.started = self.fetched = time.perf_counter()
        self.state, self.step = self._start()
        if self.step or self.given is not NOTHING:  # its evaluation came after the checkpoint, or
            self._observe_if_due()  # shows what others' weights can do before they move
        for batches in self._feed():
            n = batches.tokens.shape[1 if self.population else 0]
            self._profile(n)
            leading, rows = 2 if self.population else 1, self.config.train.global_batch_size
            on_mesh = mesh.put_batch(batches, self.mesh, leading, rows)
            metrics = self._dispatch(n, on_mesh)
            self._log_pending()
            self.step += n
            self.pending = (self.step, metrics)
            self._at_boundary()
            if self.stopping.ask():
                self._leave()
        self._stop_trace()
        return [self._finish(i) for i in range(len(self.members))]

    def _dispatch(self, n: int, batches: Any) -> dict[str, jax.Array]:
        """Hands the next chunk of `n` steps to the devices, and compiles it if it is the first."""
        known = n in self.compiled
        self.compiled.add(n)
        self.compiling |= not known
        with contextlib.nullcontext() if known else self.pulse.unwatched():
            self.state, metrics = self.program.chunk(self.hyper, self.state, batches)
        return metrics

    def _start(self) -> tuple[State, int]:
        """State and step to go on from: the newest good checkpoints, or fresh parameters."""
        restored = [self._restore(m) for m in self.members]
        steps = {0 if r is None else r[0] for r in restored}
        if len(steps) > 1:
            raise ValueError("members of a population must resume from one step")
        step = steps.pop()
        for member in self.members:
            member.run.rewind(step)
            member.run.event("resume" if step else "start", step=step)
        self.pulse.begins(step)
        if step == 0:
            state = self.program.init(self.hyper)
            if self.given.params is not None:
                state = state._replace(params=self.given.params)
            return state._replace(frozen=self.given.frozen), 0
        states = [r[1] for r in restored if r is not None]
        state = _stack(states) if self.population else states[0]
        return state._replace(frozen=self.given.frozen), step

    def _restore(self, member: _Member) -> tuple[int, State] | None:
        found = member.run.checkpoints.restore(
            abstract_state(member.run.config, hyper(member.run.config))
        )
        if found is None:
            return None
        step, state, meta = found
        member.resume(meta)
        return step, state

    def _feed(self) -> Any:
        """Chunks of batches from this step on; chunk borders do not depend on where one starts."""
        t = self.config.train
        feeds = [
            loader.chunks(
                self.dataset,
                seed=data_seed(m.run.config),
                position=self.step * t.global_batch_size,
                steps=t.steps - self.step,
                batch_size=t.global_batch_size,
                steps_per_chunk=t.steps_per_dispatch,
                rows=mesh.own_rows(self.mesh, t.global_batch_size),
                mixture=self.mixture,
            )
            for m in self.members
        ]
        if not self.population:
            return feeds[0]
        return (jax.tree.map(lambda *x: np.stack(x), *parts) for parts in zip(*feeds, strict=True))

    def _profile(self, n: int) -> None:
        """Starts and stops the trace of the chunks that hold the steps of `train.profile`.

        `n`: steps in the chunk that comes next.
        """
        if not self.config.train.profile:
            return
        start, stop = map(int, self.config.train.profile.split(":"))
        if not self.tracing and start < self.step + n and self.step < stop:
            jax.profiler.start_trace(str(self.members[0].run.folder / "profile"))
            self.tracing = True
        elif self.tracing and self.step >= stop:
            self._stop_trace()

    def _stop_trace(self) -> None:
        if self.tracing:
            jax.block_until_ready(self.state.step)
            with self.pulse.unwatched():
                jax.profiler.stop_trace()
            self.tracing = False

    # ------------------------------------------------------------------------------------- events

    def _at_boundary(self) -> None:
        """Saves and evaluates where it is due; saves first: a failing evaluation costs no step."""
        t, at_end = self.config.train, self.step == self.config.train.steps
        if at_end or (t.checkpoint_every and self.step % t.checkpoint_every == 0):
            self._save()
        self._observe_if_due()

    def _observe_if_due(self) -> None:
        every = self.config.train.eval_every
        if self.step == self.config.train.steps or (every and self.step % every == 0):
            self._log_pending()
            with self.pulse.unwatched():
                self._observe()

    def _leave(self) -> None:
        self._save()
        for i, member in enumerate(self.members):
            with self.pulse.saving():
                member.run.checkpoints.commit(wait=True)
            if i not in self.diverged:
                member.run.event("stop", step=self.step)
        error = Stopped(f"stopped at step {self.step}, saved; the same command goes on from there")
        # Where another process was told to stop, this one says what that one says.
        error.exit_code = getattr(self.stop, "exit_code", 1) or 128 + signal.SIGTERM
        raise error

    def _save(self) -> None:
        self._log_pending()
        seconds = time.perf_counter() - self.started
        for i, member in enumerate(self.members):
            if i not in self.diverged:
                state = self._of(i, self.state._replace(frozen=None))
                try:
                    with self.pulse.saving():
                        member.run.checkpoints.save(
                            self.step, state, member.meta(self.step, seconds)
                        )
                except NotFinite:  # the last update broke the parameters, its loss was still finite
                    self._diverge(i, member, self.step)
        self.fetched = time.perf_counter()

    def _observe(self) -> None:
        for i, member in enumerate(self.members):
            if i in self.diverged:
                continue
            params = self._of(i, self.state.params)
            params = parameters.whole(member.run.config, params, self.state.frozen)
            with jax.set_mesh(mesh.for_reading(self.mesh)):
                params = transformer.relaid(self.config.model, params)
                for observe in self.observers:
                    for row in observe(member.run.config, params, self.step):
                        self._write(member, row)
                        for name in ("eval/loss", "eval/bpb"):
                            if name in row:
                                member.evals[name] = row[name]
        self.fetched = time.perf_counter()

    # --------------------------------------------------------------------------------------- rows

    def _log_pending(self) -> None:
        """Fetches the last chunk's metrics and writes the rows that they complete."""
        if self.pending is None:
            return
        end, metrics = self.pending
        self.pending = None
        values = jax.device_get(metrics)
        now, steps = time.perf_counter(), values["train/loss"].shape[-1]
        # Of this chunk, for one member; what evaluating and saving took is not training.
        seconds = max(now - self.fetched, 1e-9)
        self.rate = steps * self.config.batch_tokens / seconds
        self.pulse.ended(end, steps, None if self.compiling else seconds)
        self.fetched, self.compiling = now, False
        for i, member in enumerate(self.members):
            if i not in self.diverged:
                self._log_chunk(i, member, end, {k: self._of(i, v) for k, v in values.items()})

    def _log_chunk(self, i: int, member: _Member, end: int, values: dict[str, np.ndarray]) -> None:
        t = member.run.config.train
        losses = values["train/loss"]
        bad = ~(np.isfinite(losses) & np.isfinite(values["train/grad_norm"]))
        for j, step in enumerate(range(end - len(losses) + 1, end + 1)):
            if bad[j]:
                self._diverge(i, member, step)
                return
            member.losses.append(float(losses[j]))
            if step % t.log_every == 0 or step == t.steps:
                member.train_loss = float(np.mean(member.losses))
                row = {name: float(v[j]) for name, v in values.items()}
                self._write(member, self._row(step, {**row, "train/loss": member.train_loss}))
                member.losses.clear()

    def _row(self, step: int, values: dict[str, float]) -> dict[str, Any]:
        row = {
            "step": step,
            "tokens": step * self.config.batch_tokens,
            "flops": float(step * self.flops_per_step),
            **values,
            "perf/tokens_per_s": self.rate,
        }
        peak = mesh.peak_flops()
        if peak:
            row["perf/mfu"] = self.rate * self.flops_per_step / self.config.batch_tokens / peak
        return row

    def _write(self, member: _Member, row: dict[str, Any]) -> None:
        member.run.log(row)
        with self.pulse.unwatched():  # it may send a checkpoint over a network
            self.progress(member.run, row)

    # ---------------------------------------------------------------------------------------- end

    def _diverge(self, i: int, member: _Member, step: int) -> None:
        member.run.event("diverged", step=step)
        self.diverged[i] = step
        if not self.population:
            self._finish(i)
            kept = member.run.checkpoints.steps()
            good = f"the last good checkpoint is step {kept[-1]}" if kept else "no checkpoint yet"
            what = "loss, gradient or parameters are not finite"
            raise Diverged(f"{member.run.folder}: {what} at step {step}; {good}")

    def _finish(self, i: int) -> record.RunRecord:
        member = self.members[i]
        with self.pulse.saving():
            member.run.checkpoints.commit(wait=True)
        row = record.make(
            member.run.config,
            member.run.fingerprint,
            "diverged" if i in self.diverged else "finished",
            member.run.data_fingerprint,
            role=member.run.role,
            budget=member.run.budget,
            step=self.diverged.get(i, self.step),
            train_loss=member.train_loss,
            loss=member.evals.get("eval/loss"),
            eval_bpb=member.evals.get("eval/bpb"),
            wall_time_s=member.seconds + time.perf_counter() - self.started,
        )
        hosts.by_lead(lambda: record.write(member.run.folder, row))
        member.run.event("finish", step=row.steps)
        return row

    def _of(self, i: int, tree: Any) -> Any:
        """Member i's part of a tree that leads with the population axis."""
        return jax.tree.map(lambda x: x[i], tree) if self.population else tree


def _stack(states: Sequence[State]) -> State:
    return jax.jit(lambda s: jax.tree.map(lambda *x: jax.numpy.stack(x), *s))(list(states))


def data_seed(config: Config) -> int:
    """The seed of the sample order."""
    return config.seed if config.data.seed is None else config.data.seed
