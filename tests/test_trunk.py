"""Trunks and branches: what is shared, and that a branch is the run it claims to be."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from jaxlm.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Rung,
    Shape,
    Sweep,
    TrainConfig,
)
from jaxlm.files import write_json
from jaxlm.scaling import sweep as stages
from jaxlm.scaling import trunk
from jaxlm.scaling.workers import run_members
from jaxlm.schema import UserError, to_dict


def sweep(source: str = "stdlib", **optimizer: object) -> Sweep:
    base = Config(
        model=ModelConfig(d_model=16, n_layers=1, n_heads=1, d_head=16, seq_len=16),
        data=DataConfig(sources=(source,), eval_sequences=8, eval_fraction=0.2, max_epochs=1e6),
        optimizer=OptimizerConfig(warmup_fraction=0.1, decay_fraction=0.25, **optimizer),
        train=TrainConfig(global_batch_size=4, steps_per_dispatch=5, log_every=5),
    )
    shapes = (Shape(16, 1),)
    return Sweep(base=base, branches=True, workers=1,
                 rungs=tuple(Rung(c, shapes) for c in (1e8, 2e8, 4e8)))  # fmt: skip


def test_what_a_trunk_shares() -> None:
    members, (one,) = stages.plan_members(sweep())
    steps = [m.config.train.steps for m in members]
    assert steps == sorted(steps) and len(steps) == 3
    warm = {round(m.config.optimizer.warmup_fraction * m.config.train.steps) for m in members}
    assert warm == {round(0.1 * steps[0])}  # the shortest run's
    for m in members:
        start, decay = one.starts[m.name], m.config.optimizer.decay_fraction
        assert start % one.config.train.checkpoint_every == 0
        assert start + round(decay * m.config.train.steps) == m.config.train.steps
        assert decay == pytest.approx(0.25, abs=0.13)
    assert one.config.train.steps == max(one.starts.values()) + 5
    assert 0.2 < trunk.saved(members, [one]) < 0.6
    with pytest.raises(UserError, match="schedule='wsd'"):
        stages.plan_members(sweep(schedule="cosine"))
    alone = dataclasses.replace(sweep(), rungs=sweep().rungs[:1])
    assert stages.plan_members(alone)[1] == []


def events(run: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (run / "events.jsonl").open()]


def test_a_branch_is_bitwise_the_run_alone(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"document {i}: the sky is blue, the sea is wide. " * 9)
    asked = dataclasses.replace(sweep(str(tmp_path / "*.txt")), keep_checkpoints="all")
    folder = tmp_path / "sweep"
    (alone := tmp_path / "alone").mkdir()
    folder.mkdir()
    stages.check(asked, folder, lambda line: None)
    planned = stages.claim(asked, folder)
    stages.run_ladder(asked, folder, planned)
    rows = [stages.member_row(m) for m in planned[:2]]
    data = dataclasses.replace(asked.base.data, dir=str(folder / "data"))
    plain = dataclasses.replace(asked, base=dataclasses.replace(asked.base, data=data))
    body = {"format": "jaxlm.sweep/1", "sweep": to_dict(plain), "members": rows}
    write_json(alone / "sweep.json", body)
    run_members(plain, alone, planned[:2])
    for member in planned[:2]:
        shared, own = (f / "runs" / member.name for f in (folder, alone))
        assert events(shared) == ["resume", "finish"]  # it did not start from nothing
        assert events(own) == ["start", "finish"]
        one, other = (json.loads((f / "record.json").read_text()) for f in (shared, own))
        for name in ("fingerprint", "loss", "train_loss", "eval_bpb", "tokens", "flops"):
            assert one[name] == other[name], name
        last = f"checkpoints/{one['steps']}/MANIFEST.json"
        arrays = [json.loads((f / last).read_text())["arrays"] for f in (shared, own)]
        assert arrays[0] == arrays[1]
        rates = [[json.loads(line).get("learning_rate") for line in (f / "metrics.jsonl").open()]
                 for f in (shared, own)]  # fmt: skip
        assert rates[0] == rates[1]
    again = dataclasses.replace(asked, reuse=(str(folder),), seed=asked.seed)
    other = tmp_path / "other"
    (other / "runs").mkdir(parents=True)
    shutil.copytree(folder / "data", other / "data")
    members = stages.claim(again, other)
    stages.run_ladder(again, other, members)  # nothing is left to run
    for m in members:
        one, copy = (json.loads((f / "runs" / m.name / "record.json").read_text())
                     for f in (folder, other))  # fmt: skip
        assert one == copy
        assert events(other / "runs" / m.name) == events(folder / "runs" / m.name)
    assert not (other / "trunks").exists()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("record.json")}
    stages.run_ladder(asked, folder, planned)
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("record.json")}
