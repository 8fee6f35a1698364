"""Making runs: `train`, `sweep`, and what is checked and reported of them."""

from __future__ import annotations

import contextlib
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxlm.api.places import Say, folder_of, quiet, workdir_of
from jaxlm.api.weights import generate
from jaxlm.config import Config, Sweep
from jaxlm.experiment import fingerprint, located
from jaxlm.files import Mirror, read_json, write_json
from jaxlm.schema import JaxlmError, UserError
from jaxlm.train.record import RunRecord
from jaxlm.train.workdir import StopFlag


def train(
    config: Config,
    workdir: str | Path,
    *,
    say: Say = quiet,
    progress: Any = None,
    stop: Any = None,
    data_progress: Any = None,
) -> RunRecord:
    """Train one run in `workdir`, from wherever it is; the same call again goes on or does nothing.

    Raises UserError; JaxlmError if the run diverged; Stopped after SIGTERM or Ctrl-C (all saved).
    """
    from jaxlm import hosts, job, mesh, tuning
    from jaxlm.data import shards, tokenizer
    from jaxlm.tasks import watching
    from jaxlm.train import record
    from jaxlm.train.example_losses import OF_EXAMPLES
    from jaxlm.train.step import check_names
    from jaxlm.train.trackers import need

    config = located(config)
    check_names(config)
    if config.tune.examples or config.train.objective in OF_EXAMPLES:
        raise UserError("config.tune.examples: labelled examples are for 'jaxlm finetune'")
    if config.train.tasks:
        hosts.need_one("config.train.tasks")
    start = None
    if config.tune.start:
        hosts.need_one("config.tune.start")
        config, start = tuning.continued(started(config))
    for tracker in config.train.track:
        need(tracker)
    with contextlib.ExitStack() as held:
        stop = held.enter_context(StopFlag(grace_s=None)) if stop is None else stop
        hosts.same("--config: its fingerprint", fingerprint(config))
        folder, mirror = held.enter_context(workdir_of(workdir))
        row = record.read(folder)
        if row is not None and row.fingerprint == fingerprint(config):
            say(f"{folder}: {row.status} before; nothing is left to do")
        else:
            asked = watching.read(config)
            mesh.make(config)  # what these devices cannot be is told before any text is read
            data_dir = Path(config.data.dir) if config.data.dir else folder / "data"

            def build() -> None:
                shards.build(config.data, config.text_ids, data_dir, data_progress)

            hosts.by_lead(build)
            if hosts.anyone(stop):
                raise _stopped(stop)
            say(banner(config))
            begin = None if start is None else _beginning(config, start, data_dir)
            send = sending(mirror, progress)
            words = tokenizer.load(data_dir / "tokenizer")
            begins = None if start is None else start.bos_id
            watch = watching.observers(asked, words, bos_id=begins)
            [row] = job.train([job.Task(config, folder)], data_dir, stop, send, begin, watch)
        return checked_row(row, folder)


def started(config: Config) -> Config:
    """`config` with `tune.start` as an absolute path where it is one: a run with adapters is read
    from anywhere."""
    start = Path(config.tune.start)
    if not config.tune.start or not start.exists():
        return config
    return replace(config, tune=replace(config.tune, start=str(start.resolve())))


def _beginning(config: Config, start: Any, data_dir: Path) -> Any:
    """What the run begins with. Raises UserError where the text has other tokens."""
    import jax

    from jaxlm import mesh, tuning
    from jaxlm.data import tokenizer

    if tokenizer.load(data_dir / "tokenizer").fingerprint != start.tokenizer.fingerprint:
        raise UserError(
            f"config.data.tokenizer: {config.data.tokenizer!r} is not the tokenizer of tune.start;"
            " name its folder (of a run: its tokenizer/)"
        )
    with jax.set_mesh(mesh.make(config)):
        return tuning.beginning(config, start)


def checked_row(row: RunRecord, folder: Path) -> RunRecord:
    """`row`. Raises JaxlmError if its run diverged."""
    from jaxlm.train.checkpoint import Checkpoints

    if row.status == "diverged":
        kept = Checkpoints(folder / "checkpoints").steps()
        good = f"the last good checkpoint is step {kept[-1]}" if kept else "no checkpoint"
        raise JaxlmError(f"{folder}: loss or gradient is not finite at step {row.steps}; {good}")
    return row


def banner(config: Config) -> str:
    """What is about to run: devices, mesh, parameters, tokens, FLOPs."""
    import jax

    from jaxlm import mesh
    from jaxlm.model.scale import size

    counts, n = size(config.model), len(jax.devices())
    shape = dict(zip(mesh.AXES, mesh.sizes(config.mesh, n), strict=True))
    axes = {a: k for a, k in shape.items() if k > 1} or {"data": 1}
    state_gib = counts.params * 16 / 2**30  # float32 parameters, gradients and two moments
    return (
        f"{config.name}: {n} × {jax.devices()[0].device_kind},"
        f" mesh {' × '.join(f'{a} {k}' for a, k in axes.items())};"
        f" {counts.params:,} parameters ({counts.params_non_embedding:,} without embeddings),"
        f" {config.tokens:,} tokens, {counts.flops_per_token * config.tokens:.3g} FLOPs,"
        f" {config.train.steps:,} steps; {state_gib:.2g} GiB of state"
    )


def sending(mirror: Mirror, progress: Any) -> Any:
    """`progress`, and a remote workdir kept up to date with each checkpoint."""
    seen: set[int] = set()

    def call(run: Any, row: dict[str, Any]) -> None:
        if progress is not None:
            progress(run, row)
        steps = set(run.checkpoints.steps()) if mirror.remote else set()
        if steps - seen:
            seen.update(steps)
            mirror.push()

    return call


def _stopped(stop: Any) -> JaxlmError:
    error = JaxlmError("stopped; the same command goes on from here")
    error.exit_code = getattr(stop, "exit_code", 1) or 128 + signal.SIGTERM  # another's
    return error


def sweep(
    sweep: Sweep,
    workdir: str | Path,
    *,
    say: Say = print,
    progress: Any = None,
    data_progress: Any = None,
    stop: Any = None,
) -> Path:
    """Run a whole sweep, from wherever it is, to its report; returns the report's path.

    Raises UserError; JaxlmError when members failed, when the fit refused to predict or the
    held-out run diverged (the report is there and says so), and after a signal (all saved).
    """
    from jaxlm.scaling import sweep as stages
    from jaxlm.train.trackers import need

    sweep = located(sweep)
    for tracker in sweep.base.train.track:
        need(tracker)
    with contextlib.ExitStack() as held:
        stop = held.enter_context(StopFlag(grace_s=None)) if stop is None else stop
        folder, mirror = held.enter_context(workdir_of(workdir))
        found = stages.check(sweep, folder, say, data_progress)
        planned = stages.claim(sweep, folder)
        mirror.push()
        for warning in found.warnings:
            say(f"lint: {warning}")
        say(f"ladder: {len(planned)} runs")
        how = {"stop": stop, "progress": _sending_members(mirror, progress)}
        stages.run_ladder(sweep, folder, planned, **how)
        fit = stages.fit_ladder(sweep, folder, planned, say)
        unscored = None
        try:
            if sweep.holdout_flops:
                prediction = stages.predict(sweep, folder, fit, say)
                mirror.push()
                member = stages.run_holdout(sweep, folder, prediction, **how)
                planned = [*planned, member]
                stages.score(folder, member, prediction, say)
        except stages.Unscored as e:
            unscored = e
        _sample(sweep, folder, stages.best(folder))
        stages.drop_checkpoints(sweep, folder, planned)
        page = _current_page(folder)
        if unscored is not None:
            raise unscored
    return page


def sweep_share(
    sweep: Sweep,
    workdir: str | Path,
    index: tuple[int, int],
    *,
    say: Say = print,
    progress: Any = None,
    stop: Any = None,
) -> int:
    """Run share i of n of a sweep's members, `index` = (i, n) with i from 0, in a folder on disk
    that others with other shares are at work in; `sweep` does what is left. Returns how many.

    Raises UserError; JaxlmError when members failed, and after a signal (all saved).
    """
    from jaxlm.scaling import sweep as stages
    from jaxlm.scaling.workers import flops, run_members

    sweep, (i, n) = located(sweep), index
    if not 0 <= i < n:
        raise UserError(f"--index: expected i/n with 0 ≤ i < n, got {i}/{n}")
    if sweep.branches:
        raise UserError("--index: expected config.branches=False: its runs wait for their trunks")
    if sweep.halve:
        raise UserError("--index: expected no config.halve: its runs wait for each other")
    if Mirror(workdir).remote:
        raise UserError(f"--workdir: expected a folder that all shares see, got {workdir}")
    with contextlib.ExitStack() as held:
        stop = held.enter_context(StopFlag(grace_s=None)) if stop is None else stop
        folder = held.enter_context(folder_of(workdir))
        stages.check(sweep, folder, say)
        planned = sorted(stages.claim(sweep, folder), key=lambda m: -flops(m))[i::n]
        say(f"share {i} of {n}: {len(planned)} runs")
        run_members(sweep, folder, planned, stop, progress or (lambda board: None))
    return len(planned)


def _current_page(folder: Path) -> Path:
    """A sweep's page, made anew unless it is newer than everything that it is made from."""
    from jaxlm.report.sweep_report import write_sweep_report

    page = folder / "report.html"
    newest = max(path.stat().st_mtime_ns for path in folder.rglob("*.json*"))
    if page.exists() and page.stat().st_mtime_ns >= newest:
        return page
    return write_sweep_report(folder)


def _sending_members(mirror: Mirror, progress: Any) -> Any:
    """`progress` of a sweep, and a remote workdir kept up to date with each finished run."""
    sent: set[str] = set()

    def call(board: Any) -> None:
        if progress is not None:
            progress(board)
        for name in set(board.finished) - sent if mirror.remote else ():
            sent.add(name)
            mirror.push([f"runs/{name}"])  # the others' folders are being written to

    return call


def lint(sweep: Sweep, workdir: str | Path, *, say: Say = print, data_progress: Any = None) -> Any:
    """What is wrong with every member and what it costs (`lint.Found`); only the token shards are
    made."""
    from jaxlm.scaling import sweep as stages

    with workdir_of(workdir) as (folder, _):
        return stages.check(located(sweep), folder, say, data_progress)


def summary(folder: Path) -> dict[str, Any]:
    """What a sweep found, for machines."""
    kinds = ("fit", "prediction", "score")
    there = [kind for kind in kinds if (folder / f"{kind}.json").exists()]
    return {
        "format": "jaxlm.summary/1",
        "report": str(folder / "report.html"),
        **{kind: read_json(folder / f"{kind}.json", kind) for kind in there},
    }


def _sample(sweep: Sweep, folder: Path, name: str) -> None:
    """samples.json: what one run of a sweep makes of the sweep's prompts."""
    path, run = folder / "samples.json", folder / "runs" / name
    if not sweep.sample_prompts:
        return
    if path.exists() and read_json(path, "samples")["run"] == name:
        return
    texts = generate(run, sweep.sample_prompts, max_new_tokens=sweep.base.train.sample_tokens)
    rows = [{"prompt": p, "text": t} for p, t in zip(sweep.sample_prompts, texts, strict=True)]
    write_json(path, {"format": "jaxlm.samples/1", "run": name, "samples": rows})


def report(workdir: str | Path) -> Path:
    """(Re)write the page of a sweep or of a single run from its files."""
    from jaxlm.report.run_report import write_run_report
    from jaxlm.report.sweep_report import write_sweep_report

    with folder_of(workdir) as folder:
        if (folder / "sweep.json").exists():
            return write_sweep_report(folder)
        if (folder / "config.json").exists():
            return write_run_report(folder)
        raise UserError(f"{folder}: neither a sweep (sweep.json) nor a run (config.json) is in it")
