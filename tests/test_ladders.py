"""Ladders beyond IsoFLOP, and what lint says before and after."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxlm.config import Config, DataConfig, Horizon, ModelConfig, Rung, Shape, Sweep, TrainConfig
from jaxlm.data import loader, shards, subset
from jaxlm.experiment import located
from jaxlm.files import write_json
from jaxlm.model.scale import size
from jaxlm.model_config import MoE
from jaxlm.scaling import columns
from jaxlm.scaling.forms import FORMS
from jaxlm.scaling.ladder import candidates, dial, grid, members
from jaxlm.scaling.lint import after, lint
from jaxlm.schema import UserError, to_dict
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


def test_what_varies_changes_the_steps_and_not_the_budget() -> None:
    """Context, batch and experts: a member costs what its rung says, by its own FLOPs per token."""
    choices = {
        "model.seq_len": (16, 32, 128),
        "train.global_batch_size": (2, 16),
        "model.moe.n_experts": (4, 16),
        "optimizer.learning_rate": (1e-3, 2e-3),
    }
    base = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, moe=MoE()))
    for field, values in choices.items():
        sweep = Sweep(base=base, rungs=(Rung(1e9, (Shape(16, 2), Shape(32, 2))),),
                      vary=((field, values),), seed=3)  # fmt: skip
        found = members(sweep)
        assert len(found) == 2 * len(values)
        for m in found:
            flops = size(m.config.model).flops_per_token * m.config.tokens
            assert flops == pytest.approx(1e9, rel=0.06), (field, m.name)
            assert m.config.seed == 3
    with pytest.raises(UserError, match="read the same tokens"):
        members(dataclasses.replace(sweep, vary=(("model.vocab_size", (256, 512)),)))


def test_batch_and_rate_follow_the_horizon() -> None:
    """16 and 1/4 times the tokens at which the base is right, each within its own budget."""
    d0 = 32 * 4 * 1000
    cost = size(BASE.model).flops_per_token
    at = {k: float(f"{k * d0 * cost:.6g}") for k in (0.25, 1, 16)}
    shapes = (Shape(32, 2),)
    sweep = Sweep(
        base=BASE,
        rungs=tuple(Rung(flops, shapes) for flops in at.values()),
        horizon=Horizon(tokens=d0, batch_power=0.5, rate_power=-0.3),
        holdout_flops=at[16],
        holdout_shapes=shapes,
    )
    found = dict(zip(at, (m.config for m in members(sweep)), strict=True))
    assert {k: c.train.global_batch_size for k, c in found.items()} == {0.25: 2, 1: 4, 16: 16}
    for ratio, root in ((0.25, 0.5**0.5), (1, 1), (16, 2)):
        rate = BASE.optimizer.learning_rate * root * ratio**-0.3
        assert found[ratio].optimizer.learning_rate == pytest.approx(rate, rel=1e-3)
        assert found[ratio].tokens == pytest.approx(ratio * d0, rel=0.06)
    assert candidates(sweep)[0].config.train == found[16].train

    # What is varied is the base's, and each choice follows the horizon from there.
    twice = dataclasses.replace(sweep, vary=(("optimizer.learning_rate", (1e-3, 2e-3)),))
    low, high = [m.config.optimizer.learning_rate for m in members(twice)][-2:]
    assert high == pytest.approx(2 * low, rel=1e-3) and low == pytest.approx(
        1e-3 * 2 * 16**-0.3, rel=1e-3
    )
    with pytest.raises(UserError, match="expected 0 with"):
        members(dataclasses.replace(sweep, branches=True))
    with pytest.raises(UserError, match=r"config\.horizon\.tokens: expected at least 0, got -1"):
        located(dataclasses.replace(sweep, horizon=Horizon(tokens=-1)))


def test_lint_of_grids() -> None:
    shapes = dial((1, 2, 4), aspect=16, head_dim=16)
    line = Sweep(base=BASE, rungs=grid(BASE, shapes))
    assert any("same tokens per parameter" in w for w in lint(line).warnings)
    good = Sweep(base=BASE, rungs=grid(BASE, shapes, (), (1e5, 2e5, 4e5)))
    said = " ".join(lint(good).warnings)
    assert "bracket" not in said and "told apart" not in said and "exponent" not in said
    few = Sweep(base=BASE, rungs=grid(BASE, shapes, (), (1e5, 2e5)))
    assert any("D has 2 values" in w for w in lint(few).warnings)


def test_a_grid_of_unique_tokens(tmp_path: Path) -> None:
    """Parts of one split, a smaller inside a larger, each seen as often as counted."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(40):
            text = f"{name} {i}: " + " ".join(str(i * k) for k in range(30 if name == "a" else 90))
            (tmp_path / name / f"{i}.txt").write_text(text)
    data = DataConfig(sources=(str(tmp_path / "a"), str(tmp_path / "b")), max_epochs=8.0)
    manifest = shards.build(data, 256, tmp_path / "data")
    whole = loader.Dataset.open(tmp_path / "data", "train", 32)
    parts = {n: subset.of(whole, n * 32) for n in (10, 40)}
    seen = {}
    for n, part in parts.items():
        batch = loader.chunk(part, seed=3, position=0, steps=3 * n, batch_size=1)
        rows = Counter(row.tobytes() for row in batch.tokens[:, 0])
        assert len(rows) == n and set(rows.values()) == {3}  # three epochs, none left out
        seen[n] = set(rows)
        assert {*loader.epochs(part, 3, 3 * n).values()} == {3.0}
        text = {k: len(own) / n for k, own in part.windows_of.items()}
        assert text[1] == pytest.approx(len(whole.windows_of[1]) / len(whole), abs=0.05)
    assert seen[10] < seen[40]
    with pytest.raises(UserError, match=r"data\.unique_tokens: expected 32"):
        subset.of(whole, 10**9)

    sweep = Sweep(base=dataclasses.replace(BASE, data=data),
                  rungs=(Rung(4e8, (Shape(16, 1), Shape(32, 1))),),
                  vary=(("data.unique_tokens", (1280, 2560)),))  # fmt: skip
    found = lint(sweep, manifest.train.tokens)
    for m, row in zip(members(sweep), found.rows, strict=True):
        assert row.epochs == pytest.approx(m.config.tokens / m.config.data.unique_tokens, rel=0.03)
        run = tmp_path / "runs" / m.name
        row = record.make(m.config, m.name, "finished", "x", "fit", m.budget, loss=2.0)
        record.write(run, row)
        write_json(run / "config.json", {"format": "jaxlm.config/1", "config": to_dict(m.config)})
    table = columns.read(tmp_path / "runs", FORMS["data-constrained"])
    assert sorted({*table.values["unique_tokens"]}) == [1280, 2560]
    with pytest.raises(UserError, match=r"epochs of 100, above max_epochs=8"):
        lint(dataclasses.replace(sweep, vary=(("data.unique_tokens", (100,)),)), 10**6)


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
