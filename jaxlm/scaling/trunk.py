"""Many horizons from one run: trunks at a constant rate, with cool-down branches.

A warm-up–stable–decay run and a longer one of the same size, seed and warm-up are the same
computation until the shorter one decays (Hu et al. 2024; Hägele et al. 2024). So the stable part is
run once per size, as a *trunk*, and every horizon starts from a checkpoint of it, data position
included. A branch is a run like any other: its config describes it whole, and alone from step 0 it
gives bitwise the same (`tests/test_trunk.py`), so nothing downstream knows of trunks.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.config import Config, Sweep, validate
from jaxlm.files import read_jsonl, write_bytes
from jaxlm.scaling.ladder import Member
from jaxlm.scaling.workers import run_apart
from jaxlm.schema import UserError
from jaxlm.train import record

_PIECES = 4  # checkpoints of a trunk before its first branch: how finely branches may start


@dataclass(frozen=True)
class Trunk:
    """`config` runs at a constant rate; `starts`: branch → the step that it starts from."""

    config: Config
    starts: dict[str, int]


def branched(members: Sequence[Member]) -> tuple[list[Member], list[Trunk]]:
    """The members with warm-up and decay in whole steps of their trunks, and the trunks; a size of
    one horizon keeps its config and has none. Raises UserError unless the schedule is 'wsd'."""
    groups: dict[Config, list[Member]] = {}
    for m in members:
        groups.setdefault(_shared(m.config), []).append(m)
    changed: dict[str, Member] = {}
    trunks: list[Trunk] = []
    for group in groups.values():
        if len(group) > 1:
            trunk, branches = _trunk(sorted(group, key=lambda m: m.config.train.steps), len(trunks))
            trunks.append(trunk)
            changed |= {m.name: m for m in branches}
    return [changed.get(m.name, m) for m in members], trunks


def _shared(config: Config) -> Config:
    """What runs of one trunk have in common."""
    return dataclasses.replace(config, name="", train=dataclasses.replace(config.train, steps=1))


def _trunk(group: Sequence[Member], number: int) -> tuple[Trunk, list[Member]]:
    first = group[0].config
    if first.optimizer.schedule != "wsd":
        raise UserError(
            f"config.branches: expected optimizer.schedule='wsd', got {first.optimizer.schedule!r}"
        )
    k, share = first.train.steps_per_dispatch, first.optimizer.decay_fraction
    warmup = round(first.optimizer.warmup_fraction * first.train.steps)
    stable = first.train.steps - round(share * first.train.steps)
    unit = max(k, stable // _PIECES // k * k)
    if stable < max(warmup, unit):
        raise UserError(
            f"config.branches: {group[0].name} decays before a dispatch of {k} steps is done; "
            "expected a smaller optimizer.decay_fraction or train.steps_per_dispatch"
        )
    branches, starts = [], {}
    for m in group:
        steps = m.config.train.steps
        start = max(unit, round(steps * (1 - share) / unit) * unit)
        starts[m.name] = start if start < steps else start - unit
        rates = dataclasses.replace(
            m.config.optimizer,
            warmup_fraction=warmup / steps,
            decay_fraction=(steps - starts[m.name]) / steps,
        )
        config = validate(dataclasses.replace(m.config, optimizer=rates), m.name)
        branches.append(dataclasses.replace(m, config=config))
    # One dispatch beyond the last branch: the decay of no step at its end touches none of them.
    steps = max(starts.values()) + k
    train = dataclasses.replace(
        first.train, steps=steps, checkpoint_every=unit, keep_checkpoints=steps // unit + 1
    )
    rates = dataclasses.replace(first.optimizer, warmup_fraction=warmup / steps, decay_fraction=0.0)
    name = f"trunk{number}-d{first.model.d_model}-l{first.model.n_layers}-s{first.seed}"
    config = dataclasses.replace(first, name=name, train=train, optimizer=rates)
    return Trunk(validate(config, name), starts), branches


def grow(sweep: Sweep, folder: Path, trunks: Sequence[Trunk], data_dir: Path, **how: Any) -> None:
    """Runs, in trunks/, the trunks that branches still wait for, and gives every branch its start.
    `how`: of `run_members`, whose errors it raises."""
    waiting = [t for t in trunks if any(_waits(folder, name) for name in t.starts)]
    if not waiting:
        return
    wood = folder / "trunks"
    run_apart(sweep, wood, [Member(t.config, "trunk", 0.0) for t in waiting], data_dir, **how)
    for t in waiting:
        for name, step in t.starts.items():
            if _waits(folder, name):
                _start(folder / "runs" / name, wood / "runs" / t.config.name, step)


def _waits(folder: Path, name: str) -> bool:
    run = folder / "runs" / name
    return record.read(run) is None and not any((run / "checkpoints").glob("[0-9]*"))


def _start(branch: Path, trunk: Path, step: int) -> None:
    """The trunk's rows up to the step, then its checkpoint, which makes the start complete."""
    rows = (trunk / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    kept = [line for line, row in zip(rows, read_jsonl(trunk / "metrics.jsonl"), strict=True)
            if row["step"] <= step]  # fmt: skip
    write_bytes(branch / "metrics.jsonl", b"".join(kept))
    final = branch / "checkpoints" / str(step)
    part = final.with_name(f"{step}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(trunk / "checkpoints" / str(step), part)
    part.rename(final)


def saved(members: Sequence[Member], trunks: Sequence[Trunk]) -> float:
    """Share of the members' steps that trunks save, weighed by FLOPs per step."""
    from jaxlm.model.scale import size

    def flops(config: Config, steps: int) -> float:
        return float(size(config.model).flops_per_token * config.batch_tokens * steps)

    configs = {m.name: m.config for m in members}
    whole = sum(flops(c, c.train.steps) for c in configs.values())
    shared = sum(flops(configs[n], s) for t in trunks for n, s in t.starts.items())
    return (shared - sum(flops(t.config, t.config.train.steps) for t in trunks)) / whole
