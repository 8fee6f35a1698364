"""`plan`: what an experiment asks of the machine, or of chips that are not here, before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.api.places import Say, quiet, workdir_of
from jaxlm.chips import Topology
from jaxlm.chips import topology as chips_of
from jaxlm.config import Config, Sweep
from jaxlm.experiment import located
from jaxlm.files import read_json, write_json
from jaxlm.schema import UserError, hint

if TYPE_CHECKING:
    from jaxlm.planning.steps import Step

TRIED = 3  # of a search's best, by the compiler


def plan(
    experiment: Config | Sweep,
    workdir: str | Path = "",
    *,
    topology: str = "",
    slices: int = 1,
    mfu: float = 0.4,
    price: float | None = None,
    prices: str | Path = "",
    search: bool = False,
    say: Say = quiet,
    data_progress: Any = None,
) -> dict[str, Any]:
    """Memory, collectives, roofline, time and price of every distinct train step of an experiment.

    `topology` names chips ('v5p:8x8x16', 'h100:8'), as often as there are `slices`; without one it
    is this machine, on which a step is timed, and for a sweep its whole wall time is told. Time and
    price of chips are reckoned at `mfu` (or its bound, if that is less) and at `price`, USD per
    chip and hour, or what a list `prices` (a file, docs/pods.md) says of the chip. With a `workdir`
    the plan is kept there as plan.json; a sweep on this machine needs one, for its token shards.
    `search` ranks meshes × remat × micro-batches for a run on chips, and plans the best that the
    compiler accepts. Raises UserError.
    """
    from jaxlm.planning import steps
    from jaxlm.planning.target import without_tpus

    without_tpus()
    experiment = located(experiment)
    asked = chips_of(topology, slices) if topology else None
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu: expected above 0 and at most 1, got {mfu:g}")
    listed: dict[str, Any] = {}
    if prices:
        price, listed = _listed(prices, price, asked)
    body: dict[str, Any] = {"format": "jaxlm.plan/1", "name": experiment.name}
    runs = _runs(experiment)
    body["tokens"] = sum(c.tokens for c in runs)
    if search:
        best, body["search"] = _searched(runs, asked, mfu, price, say)
        found = [best]
    elif asked is not None:
        found = []
        for group in steps.distinct(runs):
            say(f"the step of {_names(group)} for {asked.name}")
            found.append(steps.plan_step(group, asked, mfu, price))
    elif isinstance(experiment, Sweep):
        body |= {"topology": "here", **_wall(experiment, workdir, say, data_progress)}
        found = []
    else:
        say("compiling and timing the step on this machine")
        body["topology"] = "here"
        found = [steps.plan_here(experiment)]
    if asked is not None:
        stated = {"mfu": mfu, "price_per_chip_hour": price, **listed}
        body |= {"topology": asked.name, "chips": asked.chips, "stated": stated}
    body["steps"] = [steps.as_json(s) for s in found]
    body |= _supply(experiment, runs, workdir)
    if workdir:
        with workdir_of(workdir) as (folder, _):
            write_json(folder / "plan.json", body)
    return body


def _runs(experiment: Config | Sweep) -> list[Config]:
    """A run alone; of a sweep the ladder and the largest candidate that may be held out."""
    from jaxlm.scaling.ladder import candidates
    from jaxlm.scaling.sweep import plan_members

    if isinstance(experiment, Config):
        return [experiment]
    return [m.config for m in [*plan_members(experiment)[0], *candidates(experiment)[-1:]]]


def _listed(
    path: str | Path, price: float | None, asked: Topology | None
) -> tuple[float, dict[str, Any]]:
    """The chip's USD per hour in a price list, and what the list says of itself."""
    if price is not None or asked is None:
        raise UserError("--prices: expected a --topology, and no --price beside the list")
    found = read_json(path, "prices")
    for name in ("date", "source"):
        if not isinstance(found.get(name), str) or not found[name]:
            raise UserError(f"{path}: expected {name!r}: when these prices held, and where")
    rows, chip = found.get("usd_per_chip_hour"), asked.chip.name
    if not isinstance(rows, dict):
        raise UserError(f"{path}: usd_per_chip_hour: expected {{chip: USD}}, got {rows!r}")
    if chip not in rows:
        raise UserError(f"{path}: usd_per_chip_hour has no {chip!r}; {hint(chip, rows)}")
    usd = rows[chip]
    if isinstance(usd, bool) or not isinstance(usd, int | float) or not 0 <= usd < float("inf"):
        raise UserError(f"{path}: usd_per_chip_hour.{chip}: expected USD, got {usd!r}")
    return float(usd), {"prices": {"date": found["date"], "source": found["source"]}}


def _names(group: list[Config]) -> str:
    return group[0].name + (f" and {len(group) - 1} more" if len(group) > 1 else "")


def _searched(
    runs: list[Config], asked: Topology | None, mfu: float, price: float | None, say: Say
) -> tuple[Step, list[dict[str, Any]]]:
    """The best way to run a config, if one fits that a compiler accepts, and what was tried."""
    from jaxlm.planning.search import ranked
    from jaxlm.planning.steps import plan_step

    if asked is None or len(runs) > 1:
        raise UserError("--search: expected a run (get_config) and a --topology")
    found = ranked(runs[0], asked)
    if not found:
        raise UserError(f"--search: nothing is reckoned to fit {asked.name}: more chips are needed")
    say(f"{len(found)} ways are reckoned to fit; the best are compiled")
    rows: list[dict[str, Any]] = []
    best: Step | None = None
    for candidate in found[:TRIED]:
        step = plan_step([candidate.config], asked, mfu, price)
        rows.append({
            "mesh": step.mesh, "remat": candidate.config.model.remat, "fits": step.fits,
            "accumulation_steps": candidate.config.train.accumulation_steps,
            "reckoned_gib": candidate.gib, "peak_gib": step.memory_gib and step.memory_gib.peak,
            "reckoned_mfu_bound": candidate.roofline.mfu_bound, "mfu_bound": step.mfu_bound,
        })  # fmt: skip
        if best is None or (step.fits, step.mfu_bound) > (best.fits, best.mfu_bound):
            best = step
    assert best is not None
    return best, rows


def _wall(sweep: Sweep, workdir: str | Path, say: Say, data_progress: Any) -> dict[str, Any]:
    """A sweep's wall time on this machine, and what is wrong with it."""
    import dataclasses

    from jaxlm.planning.wall import wall
    from jaxlm.scaling import sweep as stages

    if not workdir:
        raise UserError("--workdir: expected a folder, for the token shards of the sweep")
    with workdir_of(workdir) as (folder, _):
        found = stages.check(sweep, folder, say, data_progress)
        say("timing the sweep in miniature")
        told = wall(sweep, stages.data_dir(sweep, folder))
    return {"warnings": list(found.warnings), "wall": dataclasses.asdict(told)}


def _supply(experiment: Config | Sweep, runs: list[Config], workdir: str | Path) -> dict[str, Any]:
    """Tokens of the train split, where shards are made, and how often the longest run sees each."""
    from jaxlm.data import shards

    base = experiment.base if isinstance(experiment, Sweep) else experiment
    folder = Path(base.data.dir) if base.data.dir else Path(workdir or ".") / "data"
    if not (folder / "manifest.json").exists():
        return {"train_tokens": None, "epochs": None}
    there = shards.read_manifest(folder).train.tokens
    return {"train_tokens": there, "epochs": max(c.tokens for c in runs) / max(there, 1)}
