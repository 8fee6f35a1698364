"""`plan`: what an experiment asks of the machine, or of chips that are not here, before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxlm.api.places import Say, quiet, workdir_of
from jaxlm.config import Config, Sweep
from jaxlm.experiment import located
from jaxlm.files import write_json
from jaxlm.schema import UserError


def plan(
    experiment: Config | Sweep,
    workdir: str | Path = "",
    *,
    topology: str = "",
    slices: int = 1,
    mfu: float = 0.4,
    price: float | None = None,
    say: Say = quiet,
    data_progress: Any = None,
) -> dict[str, Any]:
    """Memory, collectives, roofline, time and price of every distinct train step of an experiment.

    `topology` names chips ('v5p:8x8x16', 'h100:8'), as often as there are `slices`; without one it
    is this machine, on which a step is timed, and for a sweep its whole wall time is told. Time and
    price of chips are reckoned at `mfu` (or its bound, if that is less) and at `price`, USD per
    chip and hour. With a `workdir` the plan is kept there as plan.json; a sweep on this machine
    needs one, for its token shards. Raises UserError.
    """
    from jaxlm import chips
    from jaxlm.planning import steps
    from jaxlm.planning.target import without_tpus
    from jaxlm.scaling.ladder import candidates
    from jaxlm.scaling.sweep import plan_members

    without_tpus()
    experiment = located(experiment)
    asked = chips.topology(topology, slices) if topology else None
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu: expected above 0 and at most 1, got {mfu:g}")
    body: dict[str, Any] = {"format": "jaxlm.plan/1", "name": experiment.name}
    if isinstance(experiment, Sweep):
        runs = [m.config for m in [*plan_members(experiment)[0], *candidates(experiment)[-1:]]]
    else:
        runs = [experiment]
    body["tokens"] = sum(c.tokens for c in runs)
    if asked is not None:
        found = []
        for group in steps.distinct(runs):
            say(f"compiling the step of {_names(group)} for {asked.name}")
            found.append(steps.plan_step(group, asked, mfu, price))
        stated = {"mfu": mfu, "price_per_chip_hour": price}
        body |= {"topology": asked.name, "chips": asked.chips, "stated": stated}
    elif isinstance(experiment, Sweep):
        body |= {"topology": "here", **_wall(experiment, workdir, say, data_progress)}
        found = []
    else:
        say("compiling and timing the step on this machine")
        body["topology"] = "here"
        found = [steps.plan_here(experiment)]
    body["steps"] = [steps.as_json(s) for s in found]
    body |= _supply(experiment, runs, workdir)
    if workdir:
        with workdir_of(workdir) as (folder, _):
            write_json(folder / "plan.json", body)
    return body


def _names(group: list[Config]) -> str:
    return group[0].name + (f" and {len(group) - 1} more" if len(group) > 1 else "")


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
