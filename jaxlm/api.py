"""The Python and notebook face: `jaxlm.train(config)`, `jaxlm.sweep(sweep)`, `jaxlm.fit(source)`.

The command line calls the same functions; what they do can be told from the folders they leave.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.config import Config, MeshConfig, Sweep
from jaxlm.experiment import fingerprint, located
from jaxlm.files import Mirror, read_json, write_json
from jaxlm.schema import JaxlmError, UserError
from jaxlm.train.record import RunRecord
from jaxlm.train.workdir import StopFlag, lock

if TYPE_CHECKING:
    from jaxlm.language_model import LanguageModel

Say = Callable[[str], None]


def _quiet(line: str) -> None:
    pass


@contextlib.contextmanager
def _workdir(url: str | Path) -> Iterator[tuple[Path, Mirror]]:
    """The local folder of a workdir, locked by this process; a URL's is fetched and sent back."""
    mirror = Mirror(url)
    mirror.local.mkdir(parents=True, exist_ok=True)
    with lock(mirror.local):  # before pulling: another process may be at work in the copy
        mirror.pull()
        try:
            yield mirror.local, mirror
        except BaseException:
            with contextlib.suppress(JaxlmError):  # the first failure is the one to tell
                mirror.push()
            raise
        mirror.push()


@contextlib.contextmanager
def _folder(url: str | Path) -> Iterator[Path]:
    """As `_workdir`; a folder on disk as it lies, since its owner may be at work in it."""
    mirror = Mirror(url)
    if not mirror.remote:
        yield mirror.local
        return
    with _workdir(url) as (folder, _):
        yield folder


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

    Raises UserError; JaxlmError if the run diverged; Stopped after SIGTERM or Ctrl-C (all saved).
    """
    from jaxlm import job, mesh
    from jaxlm.data import shards
    from jaxlm.train import record
    from jaxlm.train.checkpoint import Checkpoints
    from jaxlm.train.step import check_names
    from jaxlm.train.trackers import need

    config = located(config)
    check_names(config)
    for tracker in config.train.track:
        need(tracker)
    with contextlib.ExitStack() as held:
        stop = held.enter_context(StopFlag(grace_s=None)) if stop is None else stop
        folder, mirror = held.enter_context(_workdir(workdir))
        row = record.read(folder)
        if row is not None and row.fingerprint == fingerprint(config):
            say(f"{folder}: {row.status} before; nothing is left to do")
        else:
            mesh.make(config)  # what these devices cannot be is told before any text is read
            data_dir = Path(config.data.dir) if config.data.dir else folder / "data"
            shards.build(config.data, config.text_ids, data_dir, data_progress)
            if stop:
                raise _stopped(stop)
            say(banner(config))
            send = _sending(mirror, progress)
            [row] = job.train([job.Task(config, folder)], data_dir, stop, send)
        if row.status == "diverged":
            kept = Checkpoints(folder / "checkpoints").steps()
            good = f"the last good checkpoint is step {kept[-1]}" if kept else "no checkpoint"
            raise JaxlmError(
                f"{folder}: loss or gradient is not finite at step {row.steps}; {good}"
            )
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


def _sending(mirror: Mirror, progress: Any) -> Any:
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
        folder, mirror = held.enter_context(_workdir(workdir))
        plan = stages.plan(sweep, folder, say, data_progress)
        planned = stages.claim(sweep, folder)
        mirror.push()
        for warning in plan.warnings:
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


def plan(sweep: Sweep, workdir: str | Path, *, say: Say = print, data_progress: Any = None) -> Any:
    """Lint and cost of every member (`lint.Plan`); only the token shards are made."""
    from jaxlm.scaling import sweep as stages

    with _workdir(workdir) as (folder, _):
        return stages.plan(located(sweep), folder, say, data_progress)


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
    """Continuations of `prompts` by what `from_pretrained(workdir)` gives."""
    texts = from_pretrained(workdir).generate(
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        return_full_text=False,
    )
    return [text for [text] in texts]


def from_pretrained(source: str | Path, *, devices: MeshConfig | None = None) -> LanguageModel:
    """A model to use: a Hugging Face folder, a .gguf file, a run's or sweep's workdir (its best
    run), or else a name on the Hugging Face hub, which is fetched.

    It lies on one device (a run on its own mesh) unless `devices` names sizes of mesh axes, over
    all of them. Raises UserError for what is not there, damaged, or not computed by these layers.
    """
    from jaxlm import job, language_model
    from jaxlm.scaling import sweep as stages

    job.cache_compilations()
    if "://" not in str(source) and not _is_ours(Path(source)):
        return language_model.of_checkpoint(source, devices)
    with _folder(source) as folder:
        if (folder / "sweep.json").exists():
            folder = folder / "runs" / stages.best(folder)
        return language_model.of_run(folder, devices)


def _is_ours(folder: Path) -> bool:
    """Whether a run or a sweep lies there, finished or not."""
    config = folder / "config.json"
    others = config.exists() and "model_type" in config.read_text("utf-8", "replace")
    return folder.is_dir() and not others and not any(folder.glob("*.gguf"))


def inspect(source: str | Path, prompt: str, out: str | Path) -> Path:
    """Writes a page that shows what the model that `from_pretrained(source)` gives makes of
    `prompt`: its tokens, where each head looks, what may follow. Returns the page's path."""
    from jaxlm.report.inspect_page import write_inspect_page

    found = from_pretrained(source).inspect(prompt)
    return write_inspect_page(str(source), prompt, found, Path(out))


def export(
    source: str | Path, out: str | Path, *, dtype: str = "float32", verify: bool = False
) -> dict[str, Any]:
    """Writes what `from_pretrained(source)` gives as a folder that `transformers` loads.

    Returns its `model_type` and, with `verify`, the largest |Δlogit| of the folder read back, by
    jaxlm and by transformers (None where it is not installed). Raises UserError; JaxlmError where
    logits differ by more than 1e-3 (float32 only).
    """
    import jax

    from jaxlm import language_model
    from jaxlm.model.hf.verify import differences

    model = from_pretrained(source)
    family = language_model.export(model, Path(out), dtype=dtype)
    found: dict[str, Any] = {
        "format": "jaxlm.export/1",
        "out": str(out),
        "family": family.model_type,
    }
    if verify:
        with jax.set_mesh(model.mesh):
            found["verified"] = differences(model.config, model.params, Path(out))
        worst = max(d for d in found["verified"].values() if d is not None)
        if dtype == "float32" and not worst <= 1e-3:
            raise JaxlmError(f"{out}: logits differ by {worst:.2g} after export")
    return found


def fit(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    where: Sequence[str] = (),
    count: str | None = None,
    flops: str = "exact",
    **options: Any,
) -> dict[str, Any]:
    """Approaches 1, 2 and 3 on a folder of runs or a CSV; see `runs.from_csv` for what chooses and
    counts the rows and `laws.fit` for `options`. `count` None: "effective" for a folder, the
    table's N otherwise."""
    from jaxlm.scaling import laws, runs

    how: dict[str, Any] = {"flops": flops}
    if "://" not in str(source) and not Path(source).is_dir():
        table = runs.from_csv(source, columns or {}, where, count=count or "all", **how)  # type: ignore[arg-type]
        return laws.fit(table, **options)
    if columns or where:
        raise UserError("--columns, --where: a folder of runs has fields of its own; use --law")
    with _folder(source) as folder:
        return laws.fit(runs.from_folder(folder, count or "effective", **how), **options)  # type: ignore[arg-type]


def fit_laws(
    source: str | Path,
    names: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    where: Sequence[str] = (),
    holdout: Sequence[str] = (),
    count: str | None = None,
    flops: str = "exact",
    for_compute: float | None = None,
    at: Mapping[str, float] | None = None,
    base: str | Path | Config | None = None,
    config_out: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Laws of `scaling.forms` by name, fitted to a table (jaxlm.laws/1); see `columns.read` for
    what chooses the rows, `form_fit.fit` for `options` and the result, `form_use` for what
    `for_compute` (FLOPs) and `at` (a point, by quantity) add. `config_out`: an experiment file to
    write, that trains the optimum of the first law for `for_compute`, as a shape of `base`."""
    from jaxlm.scaling import columns as tables
    from jaxlm.scaling import form_fit, form_use
    from jaxlm.scaling.frontier import Refusal

    is_folder = "://" in str(source) or Path(source).is_dir()
    counted = count or ("effective" if is_folder else "all")
    found = []
    with _folder(source) if is_folder else contextlib.nullcontext(Path(source)) as path:
        for name in names:
            form = form_fit.form_of(name)
            data = tables.read(path, form, columns, where, holdout, counted, flops)  # type: ignore[arg-type]
            point = None if for_compute else at
            try:
                law = form_fit.fit(data, name, at=point, **options)
            except Refusal as reason:
                found.append({"law": name, "refused": str(reason)})
                continue
            law["for_compute"] = for_compute and form_use.allocate(law, for_compute, at or {})
            largest = data.values.get("flops")
            law["stops"] = None if largest is None else form_use.stops(law, float(largest.max()))
            found.append(law)
    if config_out is not None:
        _write_optimal(found[0], base, Path(config_out), counted, str(source))
    return {"format": "jaxlm.laws/1", "laws": found}


def _write_optimal(
    law: dict[str, Any], base: str | Path | Config | None, path: Path, count: str, source: str
) -> None:
    from jaxlm import experiment
    from jaxlm.scaling import optimal

    best = law.get("for_compute")
    if not best or best.get("refused"):
        why = law.get("refused") or (best or {}).get("refused") or "expected --for-compute=FLOPs"
        raise UserError(f"--config-out: {why}")
    if base is None:
        raise UserError("--base: expected an experiment whose model and data are to be scaled")
    config = base if isinstance(base, Config) else experiment.load(base)
    if isinstance(config, Sweep):
        config = config.base
    chosen = optimal.config_for(config, best["params"], best["tokens"], count)
    ci = best["params_ci95"]
    interval = f" (95 %: {ci[0]:.3g} to {ci[1]:.3g})" if ci else ""
    optimal.write(
        path, chosen,
        f"Compute-optimal for {best['flops']:.3g} FLOPs by {law['law']} on {source}:"
        f" {best['params']:.3g} parameters{interval}, {best['tokens']:.3g} tokens,"
        f" loss {best['loss']:.4f}.",
    )  # fmt: skip


def compare(
    a: str | Path | Config | Sweep,
    b: str | Path | Config | Sweep,
    workdir: str | Path | None = None,
    *,
    say: Say = _quiet,
    stop: Any = None,
    **how: Any,
) -> dict[str, Any]:
    """Did the change from A to B help (jaxlm.compare/1)? See `paired.compare`.

    A and B are folders of runs, or experiments (files, Config or Sweep) that are run seed by seed
    in `workdir` until the sequential test ends; see `comparison`. Raises UserError, JaxlmError.
    """
    from jaxlm import experiment
    from jaxlm.scaling import comparison

    folders = [Path(x) for x in (a, b) if isinstance(x, (str, Path)) and Path(x).is_dir()]
    if len(folders) == 2:
        how = {k: v for k, v in how.items() if k in ("most", "smallest")}
        return comparison.of_folders(folders[0], folders[1], **how)
    if workdir is None:
        raise UserError("--workdir: expected a folder for the runs of A and B")
    arms = [located(x) if isinstance(x, (Config, Sweep)) else experiment.load(x) for x in (a, b)]
    names = [x.name if isinstance(x, (Config, Sweep)) else str(x) for x in (a, b)]
    with contextlib.ExitStack() as held:
        stop = held.enter_context(StopFlag()) if stop is None else stop
        folder, _ = held.enter_context(_workdir(workdir))
        return comparison.of_experiments(
            arms[0], arms[1], (names[0], names[1]), folder, say=say, stop=stop, **how
        )


def coordcheck(
    config: Config,
    workdir: str | Path,
    *,
    widths: Sequence[int] = (32, 64, 128, 256, 512, 1024),
    depths: Sequence[int] = (2, 4, 8, 16, 32),
    steps: int = 5,
    seeds: int = 2,
    say: Say = _quiet,
    data_progress: Any = None,
) -> dict[str, Any]:
    """The coordinate check of an experiment (jaxlm.coordcheck/1) and its plot, in `workdir`; see
    `scaling.coordcheck`. Raises UserError."""
    from jaxlm import job
    from jaxlm.data import shards
    from jaxlm.report.coordcheck_plot import plot
    from jaxlm.scaling import coordcheck as science

    config = located(config)
    job.cache_compilations()
    with _workdir(workdir) as (folder, _):
        data_dir = Path(config.data.dir) if config.data.dir else folder / "data"
        shards.build(config.data, config.model.vocab_size, data_dir, data_progress)
        found = science.check(config, widths, depths, data_dir, steps, seeds, say)
        write_json(folder / "coordcheck.json", found)
        say(f"plot: {plot(found, folder)}")
    return found


def plot_fit(found: dict[str, Any], out: str | Path) -> list[Path]:
    """PNG plots of what `fit` found."""
    from jaxlm.report import plots

    return plots.plot_fit(found, out)


def report(workdir: str | Path) -> Path:
    """(Re)write the page of a sweep or of a single run from its files."""
    from jaxlm.report.run_report import write_run_report
    from jaxlm.report.sweep_report import write_sweep_report

    with _folder(workdir) as folder:
        if (folder / "sweep.json").exists():
            return write_sweep_report(folder)
        if (folder / "config.json").exists():
            return write_run_report(folder)
        raise UserError(f"{folder}: neither a sweep (sweep.json) nor a run (config.json) is in it")
