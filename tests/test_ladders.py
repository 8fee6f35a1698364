"""Ladders beyond IsoFLOP, and what lint says before and after."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxlm.config import Config, ModelConfig, Rung, Shape, Sweep, TrainConfig
from jaxlm.model.scale import size
from jaxlm.scaling.ladder import dial, grid, members
from jaxlm.scaling.lint import after, lint
from jaxlm.train import record

BASE = Config(
    model=ModelConfig(d_model=32, n_heads=2, n_layers=2, seq_len=32),
    train=TrainConfig(global_batch_size=4),
)


def test_one_dial_gives_shapes_and_a_ratio_gives_their_tokens() -> None:
    shapes = dial((1, 2, 4), aspect=16, head_dim=16)
    assert shapes == (Shape(16, 1), Shape(32, 2), Shape(64, 4))
    sweep = Sweep(base=BASE, rungs=grid(BASE, shapes, (20.0, 320.0)))
    models = [(m.config.model, m.config.tokens) for m in members(sweep)]
    found = {(m.d_model, round(tokens / size(m).params_effective)) for m, tokens in models}
    assert {d for d, _ in found} == {16, 32, 64}
    for _, ratio in found:
        assert ratio == pytest.approx(20, rel=0.05) or ratio == pytest.approx(320, rel=0.05)


def test_lint_of_grids() -> None:
    shapes = dial((1, 2, 4), aspect=16, head_dim=16)
    line = Sweep(base=BASE, rungs=grid(BASE, shapes))
    assert any("same tokens per parameter" in w for w in lint(line).warnings)
    good = Sweep(base=BASE, rungs=grid(BASE, shapes, (), (1e5, 2e5, 4e5)))
    said = " ".join(lint(good).warnings)
    assert "bracket" not in said and "told apart" not in said and "exponent" not in said
    few = Sweep(base=BASE, rungs=grid(BASE, shapes, (), (1e5, 2e5)))
    assert any("D has 2 values" in w for w in lint(few).warnings)


def test_lint_afterwards_flags_edges_outliers_and_divergence() -> None:
    rates = (1e-3, 2e-3, 4e-3)
    sweep = Sweep(base=BASE, rungs=(Rung(1e9, (Shape(16, 1), Shape(32, 2))),),
                  vary=(("optimizer.learning_rate", rates),))  # fmt: skip
    rows = []
    for m in members(sweep):
        rate = m.config.optimizer.learning_rate
        best = 4e-3 if m.config.model.d_model == 16 else 2e-3
        loss = 2 + abs(np.log(rate / best))
        rows.append(record.make(m.config, m.name, "finished", "x", "fit", m.budget, loss=loss))
    rows[0] = dataclasses.replace(rows[0], status="diverged", loss=None)
    residuals = 0.001 * np.resize([1.0, -1.0], 20)
    residuals[3] = 0.05
    fit = {"approach3": {"residuals": residuals.tolist()},
           "points": {"names": [f"run {i}" for i in range(20)]}}  # fmt: skip
    said = after(sweep, rows, fit)
    assert said[0].startswith(f"{rows[0].name} diverged")
    assert "edge of those tried in 1 of 2 cells" in said[1]
    assert len(said) == 3 and said[2].startswith("run 3 lies +34 times")
