"""`jaxlm compare`: what the sequential test calls different, and real pairs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from jaxlm import api
from jaxlm.main import main
from jaxlm.scaling import paired
from jaxlm.scaling.paired import Pair
from jaxlm.schema import UserError

NOISE = 0.006  # of ln loss between seeds: the quickstart's rungs


def trial(seed: int, improvement: float) -> str:
    """The verdict on runs of A and B whose losses scatter by `NOISE`, B lower by `improvement`."""
    rng = np.random.default_rng(seed)
    pairs: list[Pair] = []
    for s in range(paired.MOST):
        a, b = 2.0 * np.exp(NOISE * rng.standard_normal(2) - [0, improvement])
        pairs.append(Pair(s, "small", 1e15, a, b))
        verdict = paired.compare(pairs)["effect"]["verdict"]
        if verdict != "open":
            return verdict
    raise AssertionError("no verdict at the last look")


def test_differences_are_found_and_not_invented() -> None:
    """1,000 trials each, as issue 5 asks."""
    same = [trial(i, 0.0) for i in range(1000)]
    better = [trial(i, 2 * NOISE) for i in range(1000)]
    false = 1 - same.count("no difference") / 1000
    found = better.count("better") / 1000
    print(f"A/A called different {false:.1%}; twice the noise floor found {found:.1%}")
    assert false <= 0.065
    assert found >= 0.90
    assert better.count("worse") == 0


def test_p_values_and_intervals_are_scipy_s() -> None:
    gains = np.random.default_rng(0).normal(0.01, 0.02, 7)
    found = paired.decide(list(gains), smallest=0.0)
    assert found["p"] == pytest.approx(stats.ttest_1samp(gains, 0).pvalue, rel=1e-9)
    band = stats.ttest_1samp(gains, 0).confidence_interval(1 - found["threshold"])
    assert found["ci95"] == pytest.approx([band.low, band.high], rel=1e-6)


def test_the_level_is_spent_over_all_looks() -> None:
    """Against an independent simulation of the looks, with other random numbers."""
    d = np.random.default_rng(5).standard_normal((20_000, 8))
    looks = [stats.ttest_1samp(d[:, :n], 0, axis=1).pvalue for n in range(paired.FIRST, 9)]
    called = (np.min(looks, 0) < paired.threshold(8)).mean()
    assert called == pytest.approx(0.05, abs=0.006)


@pytest.mark.parametrize(
    ("grows", "verdict"), [(0.01, "grows"), (0.0, "holds"), (-0.01, "shrinks")]
)
def test_what_the_change_does_to_the_law(grows: float, verdict: str) -> None:
    rng = np.random.default_rng(1)
    pairs = []
    for seed in range(6):
        for i, flops in enumerate((1e15, 1e16, 1e17)):
            a = 3.0 * (flops / 1e15) ** -0.07 * np.exp(0.002 * rng.standard_normal())
            b = a * np.exp(-0.03 - grows * i + 0.002 * rng.standard_normal())
            pairs.append(Pair(seed, f"c{i}", flops, a, b))
    law = paired.compare(pairs)["law"]
    assert law["verdict"] == verdict
    assert law["gain_per_decade"] == pytest.approx(grows, abs=0.003)
    assert law["loss_exponent_of_a"] == pytest.approx(0.07, abs=0.005)
    expected = np.exp((0.03 + grows) / 0.07)  # L ~ C^-0.07: a lower loss is more compute
    assert law["compute_multiplier"] == pytest.approx(expected, rel=0.15)


TINY = """
from jaxlm.config import *

def get_config():
    return Config(
        name="tiny",
        model=ModelConfig(d_model=16, n_layers=1, n_heads=2, seq_len=16),
        data=DataConfig(sources=({source!r},), eval_sequences=16, eval_fraction=0.3, max_epochs=99),
        optimizer=OptimizerConfig(learning_rate={rate}),
        train=TrainConfig(steps=20, global_batch_size=8, steps_per_dispatch=10, log_every=10),
    )
"""


def test_two_experiments_are_run_until_it_is_decided(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"document {i}: the sky is blue and the sea wide. " * 6)
    files = []
    for name, rate in (("a", 1e-4), ("b", 1e-2)):
        path = tmp_path / f"{name}.py"
        path.write_text(TINY.format(source=str(tmp_path / "*.txt"), rate=rate))
        files.append(str(path))
    folder = tmp_path / "runs"
    arguments = ["compare", *files, f"--workdir={folder}", "--json"]
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert not done.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["effect"]["verdict"] == "better"
    assert found["effect"]["pairs"] == paired.FIRST  # as few as decide it
    rows = json.loads((folder / "sweep.json").read_text())["members"]
    seeds = {(r["config"]["seed"], r["config"]["data"]["seed"]) for r in rows}
    assert seeds == {(s, s) for s in range(paired.FIRST)}  # both arms, one order per seed
    before = {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/record.json")}
    again = api.compare(files[0], files[1], folder)
    assert again == found
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/record.json")}
    with pytest.raises(UserError, match="the same computation"):
        api.compare(files[0], files[0], folder)
    with pytest.raises(UserError, match="holds other runs"):
        api.compare(files[1], files[0], folder)


def write(folder: Path, seed: int, loss: float, **changed: object) -> None:
    row = {"format": "jaxlm.record/1", "name": f"s{seed}", "fingerprint": f"{folder}{seed}",
           "role": "single", "status": "finished", "budget": 1e9, "seed": seed, "d_model": 16,
           "n_layers": 1, "n_heads": 2, "seq_len": 16, "vocab_size": 256, "params": 9000,
           "params_non_embedding": 5000, "params_effective": 9000.0, "flops_per_token": 54000,
           "tokens": 50000, "flops": 2.7e9, "steps": 100, "global_batch_size": 8,
           "learning_rate": 1e-3, "train_loss": loss, "loss": loss, "eval_bpb": loss,
           "data_fingerprint": "x", "wall_time_s": 1.0} | changed  # fmt: skip
    (folder / f"s{seed}").mkdir(parents=True)
    (folder / f"s{seed}" / "record.json").write_text(json.dumps(row))


def test_folders_are_paired_by_what_their_records_say(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for seed in range(5):
        write(a, seed, 2.0 + 0.01 * seed)
        write(b, seed, 1.9 + 0.01 * seed, flops=2.9e9)
    write(b, 5, 1.9)  # no partner
    write(b, 6, 9.0, data_fingerprint="other")
    found = api.compare(a, b)
    assert found["effect"]["pairs"] == 5
    assert found["effect"]["gain"] == pytest.approx(np.log(2.02 / 1.92), rel=1e-3)
    assert found["effect"]["verdict"] == "better"
    assert found["unpaired"] == ["s5", "s6"]
    with pytest.raises(UserError, match="there are no pairs"):
        write(tmp_path / "c", 9, 2.0)
        api.compare(a, tmp_path / "c")


def test_arms_that_are_no_pair(tmp_path: Path) -> None:
    from jaxlm.config import Config

    a = Config()
    wider = dataclasses.replace(a, model=dataclasses.replace(a.model, seq_len=64))
    with pytest.raises(UserError, match=r"model\.seq_len differs"):
        api.compare(a, wider, tmp_path / "runs")
    with pytest.raises(UserError, match="--workdir"):
        api.compare(a, wider)
