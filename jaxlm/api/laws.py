"""The science of runs: `fit`, `fit_laws`, `compare`, `coordcheck`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.api.places import Say, folder_of, quiet, workdir_of
from jaxlm.config import Config, Sweep
from jaxlm.experiment import located
from jaxlm.files import write_json
from jaxlm.schema import UserError
from jaxlm.train.workdir import StopFlag


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
    table's N otherwise. `left_out` is what `foresight` says of the approaches."""
    from jaxlm.scaling import foresight, laws, runs

    how: dict[str, Any] = {"flops": flops}
    if "://" not in str(source) and not Path(source).is_dir():
        table = runs.from_csv(source, columns or {}, where, count=count or "all", **how)  # type: ignore[arg-type]
    elif columns or where:
        raise UserError("--columns, --where: a folder of runs has fields of its own; use --law")
    else:
        with folder_of(source) as folder:
            table = runs.from_folder(folder, count or "effective", **how)  # type: ignore[arg-type]
    found = laws.fit(table, **options)
    plain = ("approaches", "drop_largest_loss", "huber_delta", "minimum")
    asked = {k: options[k] for k in plain if k in options}
    return {**found, "left_out": foresight.left_out(table, **asked)}


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
    with folder_of(source) if is_folder else contextlib.nullcontext(Path(source)) as path:
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
    say: Say = quiet,
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
        folder, _ = held.enter_context(workdir_of(workdir))
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
    say: Say = quiet,
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
    with workdir_of(workdir) as (folder, _):
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


def plot_laws(found: dict[str, Any], out: str | Path) -> list[Path]:
    """PNG plots of what `fit_laws` found."""
    from jaxlm.report import form_plots

    return form_plots.plot_laws(found["laws"], out)
