"""What can be known to be wrong with a sweep before anything is spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxlm.config import Sweep
from jaxlm.model.scale import size
from jaxlm.scaling.ladder import Member, at_budget, members
from jaxlm.schema import UserError

# Fewer steps than this and a run is still in its steep early phase, off the power law.
MIN_STEPS = 500
CPU_FLOPS_PER_SECOND = 50e9  # two cores at ladder sizes, compilation included
TOKENS_PER_PARAM = 20.0  # Hoffmann et al. 2022: where a budget's minimum is expected


@dataclass(frozen=True)
class Row:
    """A planned run."""

    name: str
    role: str
    budget: float
    d_model: int
    n_layers: int
    params_effective: float
    tokens: int
    steps: int
    epochs: float
    flops: float


@dataclass(frozen=True)
class Plan:
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    flops_per_second: float  # of all workers together, as measured or assumed

    @property
    def flops(self) -> float:
        return sum(r.flops for r in self.rows)

    @property
    def seconds(self) -> float:
        return self.flops / self.flops_per_second


def lint(sweep: Sweep, train_tokens: int | None = None) -> Plan:
    """Every run with its cost, and warnings. Raises UserError for what cannot work at all.

    `train_tokens`: tokens in the train split, if known; a run that needs more than
    `data.max_epochs` of them is refused.
    """
    planned = members(sweep)
    if sweep.holdout_flops:
        if not sweep.holdout_shapes:
            raise UserError(
                "config.holdout_shapes: expected at least one size for the held-out run"
            )
        planned += [  # which of them runs is decided by the prediction; the largest is shown
            Member(at_budget(sweep.base, s, sweep.holdout_flops, sweep.seed), "holdout", 0.0)
            for s in sweep.holdout_shapes[-1:]
        ]
    rows = tuple(_row(m, train_tokens) for m in planned)
    limit = sweep.base.data.max_epochs
    over = [r for r in rows if r.epochs > limit]
    if over:
        worst = max(over, key=lambda r: r.epochs)
        raise UserError(
            f"config.base.data.max_epochs: {worst.name} needs {worst.tokens:,} tokens,"
            f" {worst.epochs:.2f} epochs of {train_tokens:,}, above max_epochs={limit:g};"
            " add text, lower the budget or raise max_epochs"
        )
    return Plan(rows, tuple(_warnings(sweep, planned, rows)), CPU_FLOPS_PER_SECOND)


def _row(member: Member, train_tokens: int | None) -> Row:
    c, counts = member.config, size(member.config.model)
    return Row(
        name=member.name,
        role=member.role,
        budget=member.budget,
        d_model=c.model.d_model,
        n_layers=c.model.n_layers,
        params_effective=counts.params_effective,
        tokens=c.tokens,
        steps=c.train.steps,
        epochs=c.tokens / train_tokens if train_tokens else math.nan,
        flops=float(counts.flops_per_token * c.tokens),
    )


def _warnings(sweep: Sweep, planned: Sequence[Member], rows: Sequence[Row]) -> list[str]:
    found = []
    budgets = sorted({m.budget for m in planned if m.role != "holdout"})
    if len(budgets) < 3:
        found.append(f"{len(budgets)} budgets: a law through fewer than 3 cannot be checked")
    if all(rung.replicates < 2 for rung in sweep.rungs):
        found.append("no replicates: the noise floor is unknown, intervals rest on residuals alone")
    for budget in budgets:
        sizes = sorted({r.params_effective for r in rows if r.budget == budget})
        if len(sizes) < 3:
            found.append(f"{budget:.2g} FLOPs: {len(sizes)} sizes cannot bracket a minimum (≥ 3)")
        expected = math.sqrt(budget / (6 * TOKENS_PER_PARAM))
        if not sizes[0] <= expected <= sizes[-1]:
            found.append(
                f"{budget:.2g} FLOPs: sizes {sizes[0]:,.0f} … {sizes[-1]:,.0f} do not bracket"
                f" {expected:,.0f}, where 20 tokens per parameter put the minimum"
            )
    found += [
        f"{r.name}: {r.steps} steps, fewer than {MIN_STEPS}: likely still in the steep early phase"
        for r in rows
        if r.steps < MIN_STEPS
    ]
    if sweep.holdout_flops and budgets:
        factor = sweep.holdout_flops / budgets[-1]
        if factor < 4:
            found.append(f"the held-out rung is only {factor:.1f} × the largest budget")
        if factor > 10:
            found.append(f"the held-out rung is {factor:.0f} × the largest budget: a far bet")
    return found
