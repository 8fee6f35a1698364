"""Successive halving (Jamieson & Talwalkar 2016, algorithm 1) of members that compete: those that
differ in nothing but what `Sweep.vary` changes.

All of a cell (one budget, shape and seed) train to the first share of their steps; the better half,
by training loss on the same data, goes on to the next, and who is left after the last trains to the
end. Who goes on is the same run as without halving, bit for bit: it was stopped and resumed. A run
that is ended early has a record of its own status, which no fit reads; a member that competes with
nobody, a replicate or the held-out run among them, is never touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import Config, Sweep
from jaxlm.experiment import fingerprint
from jaxlm.files import read_jsonl
from jaxlm.scaling.ladder import Member
from jaxlm.scaling.workers import run_members
from jaxlm.schema import UserError, override
from jaxlm.train import record

_WINDOW = 0.1  # of the steps done: what a member is judged by


def check(sweep: Sweep) -> None:
    """Raises UserError where `halve` makes no sense."""
    shares = sweep.halve
    if not all(0 < a < b for a, b in zip((1e-9, *shares), (*shares, 1.0), strict=True)):
        raise UserError(f"config.halve: expected shares of the steps that rise, got {shares}")
    if shares and sweep.branches:
        raise UserError("config.halve: expected config.branches=False: a trunk serves all horizons")


def thin(
    sweep: Sweep, folder: Path, planned: Sequence[Member], data_fingerprint: str, **how: Any
) -> None:
    """Ends the hopeless of `planned` early; the others are left where they are, to go on. `how`: of
    `run_members`, whose errors it raises. What is there is not run again."""
    cells = [cell for cell in _cells(sweep, planned) if len(cell) > 1]
    for number, share in enumerate(sweep.halve, 1):
        open_ = [(c, alive) for c in cells if len(alive := _alive(folder, c)) > _kept(c, number)]
        ends = {m.name: _end(m.config, share) for _, alive in open_ for m in alive}
        racing = [m for _, alive in open_ for m in alive]
        run_members(sweep, folder, racing, until=ends, **how)
        for cell, _ in open_:
            alive = _alive(folder, cell)  # some may have diverged
            for m in _worst(folder, alive, ends, len(alive) - _kept(cell, number)):
                _give_up(folder, m, ends[m.name], data_fingerprint)


def _cells(sweep: Sweep, planned: Sequence[Member]) -> list[list[Member]]:
    found: dict[Config, list[Member]] = {}
    for m in planned:
        same = m.config
        for field, values in sweep.vary:
            same = override(same, field, values[0], "config.vary")
        found.setdefault(_nameless(same), []).append(m)
    return list(found.values())


def _nameless(config: Config) -> Config:
    return override(config, "name", "", "config")


def _alive(folder: Path, cell: Sequence[Member]) -> list[Member]:
    rows = [record.read(folder / "runs" / m.name) for m in cell]
    return [m for m, r in zip(cell, rows, strict=True) if r is None or r.status == "finished"]


def _kept(cell: Sequence[Member], rounds: int) -> int:
    return math.ceil(len(cell) / 2**rounds)


def _end(config: Config, share: float) -> int:
    k = config.train.steps_per_dispatch
    return max(k, round(share * config.train.steps / k) * k)


def _worst(
    folder: Path, alive: Sequence[Member], ends: Mapping[str, int], count: int
) -> list[Member]:
    """The `count` members of the highest loss; of equals, the later ones."""
    losses = [_loss(folder / "runs" / m.name, ends[m.name]) for m in alive]
    order = np.argsort(losses, kind="stable")
    return [alive[i] for i in order[len(alive) - max(0, count) :]]


def _loss(run: Path, end: int) -> float:
    """Mean training loss of the last tenth of the steps up to `end`."""
    rows = [r for r in read_jsonl(run / "metrics.jsonl") if "train/loss" in r and r["step"] <= end]
    late = [r["train/loss"] for r in rows if r["step"] > (1 - _WINDOW) * end] or [
        r["train/loss"] for r in rows[-1:]
    ]
    return float(np.mean(late)) if late else math.inf


def _give_up(folder: Path, m: Member, end: int, data_fingerprint: str) -> None:
    run = folder / "runs" / m.name
    row = record.make(
        m.config, fingerprint(m.config), "halved", data_fingerprint, role=m.role, budget=m.budget,
        step=end, train_loss=_loss(run, end),
    )  # fmt: skip
    record.write(run, row)
