"""The Python and notebook face: `jaxlm.train(config)`, `jaxlm.sweep(sweep)`, `jaxlm.fit(source)`.

The command line calls the same functions; what they do can be told from the folders they leave.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import Config, Sweep, validate
from jaxlm.files import Mirror, read_json, write_json
from jaxlm.schema import JaxlmError, UserError
from jaxlm.train.record import RunRecord
from jaxlm.train.workdir import StopFlag, lock

Say = Callable[[str], None]


def _quiet(line: str) -> None:
    pass


@contextlib.contextmanager
def _workdir(url: str | Path) -> Iterator[tuple[Path, Mirror]]:
    """The local folder of a workdir (a URL is worked on in a copy), locked by this process."""
    mirror = Mirror(url)
    mirror.local.mkdir(parents=True, exist_ok=True)
    with lock(mirror.local):  # before pulling: another process may be at work in the copy
        mirror.pull()
        yield mirror.local, mirror


def train(
    config: Config,
    workdir: str | Path,
    *,
    say: Say = _quiet,
    progress: Any = None,
    stop: Any = None,
    data_progress: Any = None,
) -> RunRecord:
    """Train one run in `workdir`, from wherever it is; the same call again goes on or does nothing.

    Raises UserError, Diverged, or Stopped after SIGTERM or Ctrl-C (all saved).
    """
    from jaxlm import job
    from jaxlm.data import shards
    from jaxlm.train.trackers import Trackers

    validate(config)
    with contextlib.ExitStack() as held:
        stop = held.enter_context(StopFlag(grace_s=None)) if stop is None else stop
        folder, mirror = held.enter_context(_workdir(workdir))
        data_dir = Path(config.data.dir) if config.data.dir else folder / "data"
        shards.build(config.data, config.model.vocab_size, data_dir, data_progress)
        if stop:
            raise _stopped(stop)
        say(banner(config))
        trackers = Trackers(config.train.track, config, folder)
        send = _sending(mirror, trackers, progress)
        try:
            done = job.train([job.Task(config, folder)], data_dir, stop, send)
        finally:
            trackers.close()
            mirror.push()
    row = done[0]
    if row.status == "diverged":
        raise JaxlmError(f"{folder}: the run diverged at step {row.steps}; its record is kept")
    return row


def banner(config: Config) -> str:
    """What is about to run: devices, mesh, parameters, tokens, FLOPs."""
    import jax

    from jaxlm import mesh
    from jaxlm.model.scale import size

    counts, n = size(config.model), len(jax.devices())
    axes = zip(mesh.AXES, mesh.sizes(config.mesh, n), strict=True)
    state_gib = counts.params * 16 / 2**30  # float32 parameters, gradients and two moments
    return (
        f"{config.name}: {n} × {jax.devices()[0].device_kind},"
        f" mesh {' × '.join(f'{a} {k}' for a, k in axes)};"
        f" {counts.params:,} parameters ({counts.params_non_embedding:,} without embeddings),"
        f" {config.tokens:,} tokens, {counts.flops_per_token * config.tokens:.3g} FLOPs,"
        f" {config.train.steps:,} steps; {state_gib:.2g} GiB of state"
    )


def _sending(mirror: Mirror, trackers: Any, progress: Any) -> Any:
    """`progress`, the trackers, and a remote workdir kept up to date with each checkpoint."""
    seen: set[int] = set()

    def call(run: Any, row: dict[str, Any]) -> None:
        trackers.row(row)
        if progress is not None:
            progress(run, row)
        steps = set(run.checkpoints.steps()) if mirror.remote else set()
        if steps - seen:
            seen.update(steps)
            mirror.push()

    return call


def _stopped(stop: Any) -> JaxlmError:
    error = JaxlmError("stopped; the same command goes on from here")
    error.exit_code = getattr(stop, "exit_code", 1)
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
    """Run a whole sweep, from wherever it is, to its report; returns the report's path."""
    from jaxlm.report.sweep_report import write_sweep_report
    from jaxlm.scaling import sweep as stages

    with contextlib.ExitStack() as held:
        stop = held.enter_context(StopFlag(grace_s=None)) if stop is None else stop
        folder, mirror = held.enter_context(_workdir(workdir))
        how = {"stop": stop, "progress": progress or (lambda board: None)}
        plan = stages.plan(sweep, folder, say, data_progress)
        planned = stages.claim(sweep, folder)
        for warning in plan.warnings:
            say(f"lint: {warning}")
        say(f"ladder: {len(planned)} runs")
        stages.run_ladder(sweep, folder, planned, **how)
        mirror.push()
        fit = stages.fit_ladder(sweep, folder, planned, say)
        if sweep.holdout_flops:
            prediction = stages.predict(sweep, folder, fit, say)
            mirror.push()
            member = stages.run_holdout(sweep, folder, planned, prediction, **how)
            planned = [*planned, member]
            stages.score(folder, member, prediction, say)
        sample(sweep, folder, stages.best(folder, planned).name)
        stages.drop_checkpoints(sweep, folder, planned)
        page = write_sweep_report(folder)
        mirror.push()
    return page


def plan(sweep: Sweep, workdir: str | Path, *, say: Say = print, data_progress: Any = None) -> Any:
    """Lint and cost of every member (`lint.Plan`); only the token shards are made."""
    from jaxlm.scaling import sweep as stages

    with _workdir(workdir) as (folder, _):
        return stages.plan(sweep, folder, say, data_progress)


def summary(folder: Path) -> dict[str, Any]:
    """What a sweep found, for machines."""
    kinds = ("fit", "prediction", "score")
    there = [kind for kind in kinds if (folder / f"{kind}.json").exists()]
    return {
        "format": "jaxlm.summary/1",
        "report": str(folder / "report.html"),
        **{kind: read_json(folder / f"{kind}.json", kind) for kind in there},
    }


def sample(sweep: Sweep, folder: Path, name: str) -> None:
    """samples.json: what one run of a sweep makes of the sweep's prompts."""
    path, run = folder / "samples.json", folder / "runs" / name
    if not sweep.sample_prompts:
        return
    if path.exists() and read_json(path, "samples")["run"] == name:
        return
    texts = generate(run, sweep.sample_prompts, max_new_tokens=sweep.base.train.sample_tokens)
    rows = [{"prompt": p, "text": t} for p, t in zip(sweep.sample_prompts, texts, strict=True)]
    write_json(path, {"format": "jaxlm.samples/1", "run": name, "samples": rows})


def generate(
    workdir: str | Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Continuations of `prompts` by the newest checkpoint in a run's folder."""
    import jax

    from jaxlm import job, mesh
    from jaxlm.data import tokenizer
    from jaxlm.generate import decode
    from jaxlm.train.run import read_config

    job.cache_compilations()
    folder = Mirror(workdir).local
    config = read_config(folder)
    words = tokenizer.load(folder / "tokenizer")
    with jax.set_mesh(mesh.make(config)):
        params = job.load_params(config, folder)
        return decode.continue_text(
            config.model,
            params,
            words,
            list(prompts),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )


def fit(source: str | Path, **options: Any) -> dict[str, Any]:
    """Scaling laws from a folder of runs or a CSV (`columns=` maps its names); see `laws.fit`."""
    from jaxlm.scaling import laws, runs

    path, columns = Path(source), options.pop("columns", None)
    if path.is_dir():
        return laws.fit(runs.from_folder(path), **options)
    return laws.fit(runs.from_csv(path, columns or {}), **options)


def plot_fit(found: dict[str, Any], out: str | Path) -> list[Path]:
    """PNG plots of what `fit` found."""
    from jaxlm.report import plots

    return plots.plot_fit(found, out)


def report(workdir: str | Path) -> Path:
    """(Re)write the page of a sweep or of a single run from its files."""
    from jaxlm.report.run_report import write_run_report
    from jaxlm.report.sweep_report import write_sweep_report

    folder = Path(workdir)
    if (folder / "sweep.json").exists():
        return write_sweep_report(folder)
    if (folder / "config.json").exists():
        return write_run_report(folder)
    raise UserError(f"{folder}: neither a sweep (sweep.json) nor a run (config.json) is in it")
