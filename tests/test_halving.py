"""Successive halving: who is ended, and that who is not is the run that it would have been."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from faults import QUICK

from jaxlm.config import Config, DataConfig, ModelConfig, Rung, Shape, Sweep, TrainConfig
from jaxlm.experiment import fingerprint
from jaxlm.scaling import halving, runs
from jaxlm.scaling import sweep as stages
from jaxlm.scaling.ladder import members
from jaxlm.scaling.lint import lint
from jaxlm.schema import UserError
from jaxlm.train import record

RATES = (1e-6, 1e-3, 1e-2, 3e-2, 1e-1)
BASE = Config(
    model=ModelConfig(d_model=16, n_layers=1, n_heads=2, seq_len=16, scan_layers=False),
    train=TrainConfig(global_batch_size=8, steps_per_dispatch=5, log_every=5, checkpoint_every=20),
)
SWEEP = Sweep(
    base=BASE,
    rungs=(Rung(2e8, (Shape(8, 1), Shape(16, 1)), replicates=2),),
    vary=(("optimizer.learning_rate", RATES),),
    halve=(0.25, 0.5),
)


def rate(member) -> float:
    return member.config.optimizer.learning_rate


def test_the_worse_half_of_each_cell_ends_at_each_share(tmp_path: Path, monkeypatch) -> None:
    """Losses as planted: best at 1e-2 in the small model, at 1e-3 in the large; 0.1 diverges."""
    asked: list[dict[str, int]] = []

    def runner(sweep, folder, planned, until) -> None:
        asked.append({m.name: until[m.name] for m in planned})
        for m in planned:
            run, best = folder / "runs" / m.name, 1e-2 if m.config.model.d_model == 8 else 1e-3
            run.mkdir(parents=True, exist_ok=True)
            if rate(m) == 0.1:
                row = record.make(m.config, fingerprint(m.config), "diverged", "d", step=5)
                record.write(run, row)
                continue
            rows = [{"step": s, "train/loss": abs(rate(m) / best - 1) + 1 / s}
                    for s in range(5, until[m.name] + 10, 5)]  # fmt: skip
            (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")

    monkeypatch.setattr(halving, "run_members", runner)
    planned = members(SWEEP)
    halving.thin(SWEEP, tmp_path, planned, "d")
    found = {m.name: record.read(tmp_path / "runs" / m.name) for m in planned}
    for d_model, best in ((8, 1e-2), (16, 1e-3)):
        for seed in (0, 1) if d_model == 8 else (0,):
            cell = [
                m for m in planned if (m.config.model.d_model, m.config.seed) == (d_model, seed)
            ]
            steps = cell[0].config.train.steps
            ends = {rate(m): found[m.name] and (found[m.name].status, found[m.name].steps)
                    for m in cell}  # fmt: skip
            assert ends.pop(0.1) == ("diverged", 5)
            # Of five three go on, of whom two; the diverged one counts as ended.
            order = sorted(ends, key=lambda r: abs(r / best - 1))
            assert {r for r, end in ends.items() if end is None} == set(order[:2])
            first, second = (round(s * steps / 5) * 5 for s in SWEEP.halve)
            assert [ends[r] for r in order[2:]] == [("halved", second), ("halved", first)]
    assert len(asked) == 2 and len(asked[1]) < len(asked[0])
    halving.thin(SWEEP, tmp_path, planned, "d")
    assert asked[2:] == [{}, {}]  # what is done is not done again


@pytest.mark.parametrize("halve", [(0.5, 0.25), (0.0,), (1.0,)])
def test_shares_that_make_no_sense(halve: tuple) -> None:
    with pytest.raises(UserError, match=r"config\.halve"):
        lint(dataclasses.replace(SWEEP, halve=halve))


@pytest.mark.slow
def test_who_goes_on_is_the_same_run(tmp_path: Path, monkeypatch) -> None:
    for name in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, QUICK[name])
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document {i}: the sea is wide. " * 30)
    data = DataConfig(sources=(str(tmp_path / "text"),), eval_sequences=8, max_epochs=50.0)
    sweep = dataclasses.replace(SWEEP, base=dataclasses.replace(BASE, data=data), workers=2)
    found = {}
    for kind in ("halved", "whole"):
        one = sweep if kind == "halved" else dataclasses.replace(sweep, halve=())
        folder = tmp_path / kind
        stages.check(one, folder, print)
        planned = stages.claim(one, folder)
        stages.run_ladder(one, folder, planned)
        found[kind] = {r.name: r for r in stages.records(folder, planned)}
    kept = {n: r for n, r in found["halved"].items() if r.status == "finished"}
    assert len(kept) == 6 and len(found["halved"]) == 15
    for name, row in kept.items():
        assert row.loss == found["whole"][name].loss  # bit for bit
        assert row.train_loss == found["whole"][name].train_loss
    assert len(runs.from_folder(tmp_path / "halved" / "runs")) == 6
