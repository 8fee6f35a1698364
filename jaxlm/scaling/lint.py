"""What can be known to be wrong with a sweep before anything is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.config import Config, Sweep
from jaxlm.model.scale import size
from jaxlm.scaling import halving
from jaxlm.scaling.ladder import Member, candidates, members
from jaxlm.scaling.runs import FEW_STEPS
from jaxlm.schema import UserError
from jaxlm.train.record import RunRecord
from jaxlm.train.step import check_names

FAR_OFF = 6.0  # robust standard deviations, beyond which a run is shown as an outlier
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
    checkpoint_bytes: int  # of all that it keeps: parameters and two moments, float32


@dataclass(frozen=True)
class Found:
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]

    @property
    def flops(self) -> float:
        return sum(r.flops for r in self.rows)

    @property
    def checkpoint_bytes(self) -> int:
        """Of all members together, until the sweep is done (`sweep.keep_checkpoints`)."""
        return sum(r.checkpoint_bytes for r in self.rows)


def lint(sweep: Sweep, train_tokens: int | None = None) -> Found:
    """Every run with its cost, and warnings. Raises UserError for what cannot work at all.

    `train_tokens`: tokens in the train split, if known; a run that needs more than
    `data.max_epochs` of them is refused.
    """
    planned, held_out = members(sweep), candidates(sweep)
    halving.check(sweep)
    for member in planned:
        check_names(member.config)
    # Which candidate runs is decided by the prediction, so the data must do for each; they cost
    # the same, and the largest is shown.
    _need_text(sweep, [*planned, *held_out], train_tokens)
    planned += held_out[-1:]
    rows = tuple(_row(m, train_tokens) for m in planned)
    return Found(rows, tuple(_warnings(sweep, rows)))


def _epochs(config: Config, train_tokens: int) -> float:
    there = min(train_tokens - 1, config.data.unique_tokens or train_tokens)
    windows = max(1, there // config.model.seq_len)
    return config.train.steps * config.train.global_batch_size / windows


def _need_text(sweep: Sweep, planned: Sequence[Member], train_tokens: int | None) -> None:
    if train_tokens is None:
        return
    limit = sweep.base.data.max_epochs
    worst = max(planned, key=lambda m: _epochs(m.config, train_tokens))
    epochs = _epochs(worst.config, train_tokens)
    if epochs > limit:
        raise UserError(
            f"config.base.data.max_epochs: {worst.name} needs {worst.config.tokens:,} tokens,"
            f" {epochs:.2f} epochs of {worst.config.data.unique_tokens or train_tokens:,}, above"
            f" max_epochs={limit:g};"
            " add text, lower the budget or raise max_epochs"
        )


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
        epochs=_epochs(c, train_tokens) if train_tokens else math.nan,
        flops=float(counts.flops_per_token * c.tokens),
        checkpoint_bytes=counts.params * 12 * c.train.keep_checkpoints,
    )


def _warnings(sweep: Sweep, rows: Sequence[Row]) -> list[str]:
    found = []
    fitted = [r for r in rows if r.role != "holdout"]
    budgets = sorted({r.budget for r in fitted})
    if len(budgets) < 3:
        found.append(f"{len(budgets)} budgets: a law through fewer than 3 cannot be checked")
    if all(rung.replicates < 2 for rung in sweep.rungs):
        found.append("no replicates: the noise floor is unknown, intervals rest on residuals alone")
    is_grid = all(len(rung.shapes) == 1 for rung in sweep.rungs)  # for laws of N and D
    if is_grid and any(r.budget for r in fitted):
        found += _degenerate(fitted)
    for budget in [] if is_grid else budgets:
        sizes = sorted({r.params_effective for r in fitted if r.budget == budget})
        if len(sizes) < 3:
            found.append(f"{budget:.2g} FLOPs: {len(sizes)} sizes cannot bracket a minimum (≥ 3)")
        expected = math.sqrt(budget / (6 * TOKENS_PER_PARAM))
        if not sizes[0] <= expected <= sizes[-1]:
            found.append(
                f"{budget:.2g} FLOPs: sizes {sizes[0]:,.0f} … {sizes[-1]:,.0f} do not bracket"
                f" {expected:,.0f}, where 20 tokens per parameter put the minimum"
            )
    short = [r for r in rows if r.steps < FEW_STEPS]
    if short:
        least = min(short, key=lambda r: r.steps)
        found.append(
            f"{len(short)} of {len(rows)} runs take fewer than {FEW_STEPS} steps ({least.name}:"
            f" {least.steps}): likely still in the steep early phase"
        )
    if sweep.holdout_flops and budgets:
        factor = sweep.holdout_flops / budgets[-1]
        if factor < 4:
            found.append(f"the held-out rung is only {factor:.1f} × the largest budget")
        if factor > 10:
            found.append(f"the held-out rung is {factor:.0f} × the largest budget: a far bet")
    return found


def _degenerate(rows: Sequence[Row]) -> list[str]:
    """Of a grid of (N, D): what keeps its two terms from being told apart."""
    n = {round(math.log(r.params_effective), 1) for r in rows}
    d = {round(math.log(r.tokens), 1) for r in rows}
    ratios = {round(math.log(r.tokens / r.params_effective), 1) for r in rows}
    if len(ratios) == 1:
        return ["every run has the same tokens per parameter: A and B cannot be told apart"]
    few = [f"{name} has {len(v)} values" for name, v in (("N", n), ("D", d)) if len(v) < 3]
    return [f"{' and '.join(few)}: its exponent needs three or more"] if few else []


def after(sweep: Sweep, rows: Sequence[RunRecord], fit: dict[str, Any]) -> list[str]:
    """What the finished ladder shows to be wrong: members that diverged, a varied number whose best
    value is the smallest or the largest tried, runs far off the law."""
    found = [f"{r.name} diverged at step {r.steps}" for r in rows if r.status == "diverged"]
    configs = {m.name: m.config for m in members(sweep)}
    for field, values in sweep.vary:
        if len(values) >= 3 and all(isinstance(v, (int, float)) for v in values):
            found += _at_edge(field, sorted(values), rows, configs)
    law = fit.get("approach3", {})
    if "residuals" in law:
        residuals = np.array(law["residuals"])
        scale = 1.4826 * float(np.median(np.abs(residuals))) + 1e-12
        names = fit["points"]["names"]
        found += [
            f"{names[i]} lies {residuals[i] / scale:+.0f} times the usual scatter off the law"
            for i in np.flatnonzero(np.abs(residuals) > FAR_OFF * scale)
        ]
    return found


def _at_edge(
    field: str, values: Sequence[float], rows: Sequence[RunRecord], configs: Mapping[str, Config]
) -> list[str]:
    best: dict[Any, tuple[float, float]] = {}
    group, _, key = field.partition(".")
    for r in rows:
        if r.loss is None or r.name not in configs:
            continue
        at = float(getattr(getattr(configs[r.name], group), key))
        cell = (r.budget, r.d_model, r.n_layers)
        best[cell] = min(best.get(cell, (math.inf, at)), (r.loss, at))
    edge = [cell for cell, (_, at) in best.items() if at in (values[0], values[-1])]
    if not edge:
        return []
    return [
        f"{field}: the best value is at the edge of those tried in {len(edge)} of {len(best)}"
        " cells; widen the range"
    ]
