"""The fits against planted laws, independent optimisers and published numbers.

Share of planted ladders (15 runs at three budgets, 0.6 % noise, prediction at four times the
largest; 200 resamples; 500 ladders, 200 for approach 1) whose 95 % interval held the truth, and the
median half-width of the predicted loss, as `test_measured_coverage` prints them; `run` is the
measured loss of a run at the predicted size:

    E    alpha beta   approach  a     N*    alpha  beta   best loss  run    half-width
    0.5  0.36  0.40   1         .975  .975                .995       .995   3.9 %
                      2         .946  .938                .982       .974   3.6 %
                      3         .960  .964  .974   .972   .970       .972   2.9 %
    0.5  0.34  0.28   1         .980  .970                .985       .990   3.8 %
                      2         .946  .946                .968       .966   3.4 %
                      3         .962  .968  .974   .970   .964       .976   2.7 %
    0.9  0.50  0.55   1         .980  .975                .965       .970   3.8 %
                      2         .944  .936                .976       .972   3.7 %
                      3         .960  .968  .976   .976   .968       .974   2.9 %
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import time
from collections.abc import Sequence

import numpy as np
import pytest
from planted import BUDGETS, HELD_OUT, QUICK, Law, curves, ladder
from rich.console import Console
from scipy.optimize import minimize
from scipy.special import huber, logsumexp

from jaxlm.report import law_table
from jaxlm.scaling import foresight, laws, runs
from jaxlm.schema import UserError

# ------------------------------------------------------------------------------------- approach 3


def test_a_planted_law_without_noise_is_found_exactly() -> None:
    law = laws.fit(ladder(QUICK), approaches=(3,), bootstrap=0)["approach3"]
    assert law["objective"] < 1e-18
    for name in ("E", "alpha", "beta", "A", "B"):
        assert law[name] == pytest.approx(getattr(QUICK, name), rel=1e-6), name
    assert law["a"] == pytest.approx(QUICK.a, rel=1e-6)


def besiroglu_objective(theta: np.ndarray, points: runs.Points) -> float:
    """Hoffmann et al. 2022, eq. 3, with scipy's log-sum-exp and Huber loss."""
    a, b, e, alpha, beta = theta
    terms = [
        a - alpha * np.log(points.params), b - beta * np.log(points.tokens),
        np.full(len(points), e),
    ]  # fmt: skip
    return float(huber(1e-3, logsumexp(terms, axis=0) - np.log(points.loss)).sum())


def test_no_other_optimiser_finds_a_lower_objective() -> None:
    points = ladder(QUICK, 0.01, seed=4, budgets=np.geomspace(1e10, 1e13, 6), sizes=6)
    law = laws.fit(points, approaches=(3,), bootstrap=0)["approach3"]
    theta = np.array([np.log(law[k]) for k in "ABE"] + [law["alpha"], law["beta"]])
    assert besiroglu_objective(theta, points) == pytest.approx(law["objective"], rel=1e-9)
    planted = np.array([*np.log([QUICK.A, QUICK.B, QUICK.E]), QUICK.alpha, QUICK.beta])
    for start in (planted, theta, [5, 5, 0, 0.3, 0.3], [8, 9, -1, 0.6, 0.5]):
        other = minimize(
            lambda t: 1e6 * besiroglu_objective(t, points), start, method="Nelder-Mead",
            options={"maxiter": 4000, "maxfev": 4000, "xatol": 1e-9, "fatol": 1e-9},
        )  # fmt: skip
        assert law["objective"] <= other.fun / 1e6 * (1 + 1e-9)


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (ladder(QUICK, budgets=[3e11], sizes=5, replicates=4), "5 distinct"),
        (runs.Points(*(np.geomspace(1, 2, 8) * k for k in (1e4, 2e5, 1e10, 2))), "one line"),
        (dataclasses.replace(ladder(QUICK), loss=np.full(15, 2.0)), "all losses are equal"),
    ],
)
def test_approach_3_refuses_what_cannot_carry_it(points: runs.Points, reason: str) -> None:
    fits = laws.fit(points, approaches=(3,), bootstrap=10)
    assert reason in fits["approach3"]["refused"]
    assert laws.predict(fits, "approach3", 1e12) == {"refused": fits["approach3"]["refused"]}


# ------------------------------------------------------------------------------------- approach 2


def test_minima_of_symmetric_slices_are_exact() -> None:
    law = Law(0.6, 0.3, 0.3)  # alpha = beta: loss is symmetric in ln N about the best size
    found = laws.fit(ladder(law), approaches=(2,), bootstrap=0)["approach2"]
    assert found["a"] == pytest.approx(0.5, abs=0.01)
    found = laws.fit(ladder(law, replicates=0), approaches=(2,), bootstrap=0)["approach2"]
    assert found["a"] == pytest.approx(0.5, abs=1e-9)
    assert found["b"] == pytest.approx(0.5, abs=1e-9)
    for row, c in zip(found["minima"], BUDGETS, strict=True):
        assert row["flops"] == pytest.approx(c)
        assert row["params"] == pytest.approx(law.best_size(c), rel=1e-9)
        assert row["tokens"] == pytest.approx(c / 6 / law.best_size(c), rel=1e-9)


def test_parabolas_are_numpy_s() -> None:
    points = ladder(QUICK, 0.005)
    found = laws.fit(points, approaches=(2,), bootstrap=0)["approach2"]
    for parabola, c in zip(found["parabolas"], BUDGETS, strict=True):
        at = points.flops == c
        expected = np.polynomial.Polynomial.fit(np.log(points.params[at]), points.loss[at], 2)
        np.testing.assert_allclose(parabola["coefficients"], expected.convert().coef, rtol=1e-6)
        assert sorted(parabola["params"]) == sorted(points.params[at].tolist())


def test_noise_is_that_of_replicates_and_of_spare_points() -> None:
    found = [laws.fit(ladder(QUICK, 0.006, s), approaches=(2,), bootstrap=0) for s in range(40)]
    noise = [f["approach2"]["noise"] for f in found]
    assert {(n["dof"], n["floor_dof"]) for n in noise} == {(6, 3)}
    assert np.sqrt(np.mean([n["relative"] ** 2 for n in noise])) == pytest.approx(0.006, rel=0.2)
    assert np.sqrt(np.mean([n["floor"] ** 2 for n in noise])) == pytest.approx(0.006, rel=0.2)


def test_budgets_are_refused_one_by_one_with_the_reason() -> None:
    points = ladder(QUICK, budgets=[1e11, *BUDGETS, 2e12, 4e12], replicates=0)
    loss, n, flops = points.loss.copy(), points.params, points.flops
    loss[flops == 1e11] = 5 - loss[flops == 1e11]
    loss[flops == 2e12] = 2 + 0.1 * np.log(n[flops == 2e12] / 1e4) ** 2  # lowest below all sizes
    labels = np.array([f"{c:g}" for c in flops])
    points = dataclasses.replace(points, loss=loss, group=labels)
    points = points.drop(np.flatnonzero(flops == 4e12)[2:], "cut")
    found = laws.fit(points, approaches=(2,), bootstrap=50)["approach2"]
    reasons = {f"{r['flops']:.1g}": r["reason"] for r in found["refused"]}
    assert "opens downwards" in reasons["1e+11"]
    assert "outside the sampled sizes, beyond the smallest" in reasons["2e+12"]
    assert "2 sizes; a parabola needs three" in reasons["4e+12"]
    assert [m["flops"] for m in found["minima"]] == pytest.approx(list(BUDGETS))


def test_fewer_than_two_budgets_refuse_approach_2() -> None:
    fits = laws.fit(ladder(QUICK, 0.005, budgets=BUDGETS[:1]), approaches=(2,), bootstrap=10)
    assert fits["approach2"]["refused"].startswith("1 budgets with a minimum, two needed")


def test_budgets_without_labels_are_found_within_ten_percent() -> None:
    points = ladder(QUICK, 0.004, replicates=0)
    wobble = np.random.default_rng(0).uniform(0.97, 1.03, len(points))
    flops = points.flops * wobble
    strays = runs.Points(*([v] for v in (5e4, 4e5, 1.2e11, 2.6)))  # type: ignore[arg-type]
    both = {
        k: np.append(v, getattr(strays, k))
        for k, v in {"params": points.params, "tokens": points.tokens, "flops": flops,
                     "loss": points.loss}.items()
    }  # fmt: skip
    minima = laws.fit(runs.Points(**both), approaches=(2,), bootstrap=0)["approach2"]["minima"]
    assert [m["flops"] for m in minima] == pytest.approx(list(BUDGETS), rel=0.03)


# ------------------------------------------------------------------------------------- approach 1


@pytest.mark.parametrize("law", [QUICK, Law(0.5, 0.5, 0.3)])
def test_envelope_of_steady_curves_gives_the_exponent(law: Law) -> None:
    n = np.geomspace(1e4, 1e6, 9)
    points = runs.Points(n, np.full(9, 1e7), 6e7 * n, law.loss(n, 6e7 * n))
    flops = [np.geomspace(1e-3, 1, 300) * c for c in points.flops]
    steady = [runs.Curve(s, c, law.loss(s, c)) for s, c in zip(n, flops, strict=True)]
    found = laws.fit(points, steady, approaches=(1,), bootstrap=100)["approach1"]
    assert len(found["minima"]) >= 2
    assert found["a"] == pytest.approx(law.a, abs=0.03)
    for row in found["minima"]:
        assert row["loss"] == pytest.approx(law.best_loss(row["flops"]), rel=0.002)


def test_envelope_of_decaying_curves_is_where_runs_end() -> None:
    points = ladder(QUICK, 0.003, seed=1)
    found = laws.fit(points, curves(points, QUICK), approaches=(1,), bootstrap=0)["approach1"]
    assert [m["flops"] for m in found["minima"]] == pytest.approx(list(BUDGETS), rel=1e-6)
    for row, c in zip(found["minima"], BUDGETS, strict=True):
        assert row["loss"] == pytest.approx(QUICK.best_loss(c), rel=0.01)
        assert row["params"] == pytest.approx(QUICK.best_size(c), rel=0.3)


def test_approach_1_refuses_what_cannot_carry_it() -> None:
    points = ladder(QUICK, 0.003)
    assert "no training curves" in laws.fit(points, bootstrap=0)["approach1"]["refused"]
    two = curves(points, QUICK)[:2]
    assert "2 sizes" in laws.fit(points, two, bootstrap=0)["approach1"]["refused"]
    small = points.drop(np.flatnonzero(points.params > 0.9 * QUICK.best_size(3e11)), "cut")
    refused = laws.fit(small, curves(small, QUICK), bootstrap=0)["approach1"]["refused"]
    assert "two needed" in refused
    bad = [c._replace(loss=c.loss[:-1]) for c in curves(points, QUICK)]
    with pytest.raises(UserError, match="curve point 0: expected two equally long"):
        laws.fit(points, bad)


# ------------------------------------------------------------------------------------- predictions


def test_a_prediction_by_approach_3_is_the_law_at_its_optimum() -> None:
    fits = laws.fit(ladder(QUICK), approaches=(3,), bootstrap=0)
    found = laws.predict(fits, "approach3", HELD_OUT)
    assert found["loss"] == pytest.approx(QUICK.best_loss(HELD_OUT), rel=1e-6)
    assert found["params"] == pytest.approx(QUICK.best_size(HELD_OUT), rel=1e-5)
    assert found["tokens"] * found["params"] * 6 == pytest.approx(HELD_OUT)
    assert found["ci95"] is None
    beside = laws.predict(fits, "approach3", HELD_OUT, params=1e5)
    assert beside["loss"] == pytest.approx(float(QUICK.loss(np.array(1e5), np.array(HELD_OUT))))


@pytest.mark.parametrize("estimator", laws.ESTIMATORS)
def test_every_estimator_predicts_a_ladder_four_times_beyond(estimator: str) -> None:
    points = ladder(QUICK, 0.004, seed=2)
    fits = laws.fit(points, curves(points, QUICK), bootstrap=300)
    found = laws.predict(fits, estimator, HELD_OUT)
    assert found["loss"] == pytest.approx(QUICK.best_loss(HELD_OUT), rel=0.02)
    assert found["ci95"][0] < QUICK.best_loss(HELD_OUT) < found["ci95"][1]
    assert found["half_width"] < 0.05
    assert found["params"] == pytest.approx(QUICK.best_size(HELD_OUT), rel=0.5)
    assert found["extrapolation"] == pytest.approx(4)
    wrong_size = laws.predict(fits, estimator, HELD_OUT, params=4 * found["params"])
    assert wrong_size["loss"] > found["loss"] * 1.02


@pytest.mark.parametrize("E", [0.0, 0.9])
def test_three_budgets_leave_the_asymptote_open(E: float) -> None:
    """The interval holds a pure power law and one with half the loss irreducible alike."""
    law = Law(E, 0.30 if E == 0 else 0.5, 0.30 if E == 0 else 0.5)
    fits = laws.fit(ladder(law, 0.002, seed=3), approaches=(2,), bootstrap=500)
    low, high = laws.predict(fits, "approach2", HELD_OUT)["ci95"]
    assert low < law.best_loss(HELD_OUT) < high


def test_many_budgets_settle_the_asymptote() -> None:
    law = Law(0.9, 0.5, 0.5)
    points = ladder(law, 0.003, budgets=np.geomspace(1e10, 1e13, 9))
    fits = laws.fit(points, approaches=(2,), bootstrap=500)
    found = laws.predict(fits, "approach2", 1e15)
    assert found["loss"] == pytest.approx(law.best_loss(1e15), rel=0.01)
    assert found["ci95_law"][0] < law.best_loss(1e15) < found["ci95_law"][1]


def test_estimators_that_do_not_exist() -> None:
    fits = laws.fit(ladder(QUICK), approaches=(2,), bootstrap=0)
    with pytest.raises(UserError, match="did you mean 'approach2'"):
        laws.predict(fits, "aproach2", 1e12)
    assert laws.predict(fits, "approach3", 1e12) == {"refused": "not asked for"}


# ---------------------------------------------------------------------------- the whole result


def test_the_result_is_json_and_depends_on_nothing_but_its_arguments() -> None:
    points = ladder(QUICK, 0.005)
    options = {"drop_largest_loss": 2, "bootstrap": 50, "for_compute": HELD_OUT}
    seen: list[tuple[int, int]] = []
    fits = laws.fit(
        points, curves(points, QUICK), progress=lambda *at: seen.append(at), seed=1, **options
    )
    assert json.loads(json.dumps(fits, allow_nan=False)) == fits
    assert fits == laws.fit(points, curves(points, QUICK), seed=1, **options)
    assert seen[-1] == (50, 50)
    assert fits["format"] == "jaxlm.fit/1"
    assert fits["n"] == 13
    assert [d["loss"] for d in fits["dropped"]] == sorted(points.loss.tolist())[-2:]
    assert "2 largest losses" in fits["dropped"][0]["reason"]
    assert any("spans 0.48 decades" in line for line in fits["warnings"])
    assert fits["for_compute"]["approach3"] == laws.predict(fits, "approach3", HELD_OUT)
    other = laws.fit(points, approaches=(2,), seed=1, **options)
    assert other["approach2"] == fits["approach2"]  # approaches do not disturb each other


@pytest.mark.filterwarnings("error")
def test_any_table_gives_a_result_or_a_reason() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        rows = int(rng.integers(1, 14))
        n = rng.choice([1e4, 3e4, 1e5, 2e5], rows)
        d = 20 * n if seed % 5 == 0 else 10 ** rng.uniform(3, 12, rows)
        c = rng.choice([1e11, 3e11], rows) if seed % 3 == 0 else 6 * n * d
        points = runs.Points(n, c / 6 / n, c, rng.uniform(1, 10, rows))
        given = [runs.Curve(s, [0.3 * f, 0.6 * f, f], [9, 7, 6]) for s, f in zip(n, c, strict=True)]
        fits = laws.fit(points, given, bootstrap=5, for_compute=1e14)
        json.dumps(fits, allow_nan=False)
        for name in laws.ESTIMATORS:
            assert "a" in fits[name] or fits[name]["refused"]
            assert "loss" in fits["for_compute"][name] or fits["for_compute"][name]["refused"]


@pytest.mark.parametrize(
    "wrong",
    [{"approaches": (4,)}, {"drop_largest_loss": 15}, {"huber_delta": 0.0}, {"bootstrap": -1},
     {"for_compute": -1.0}],
)  # fmt: skip
def test_arguments_out_of_range(wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))[:8]):
        laws.fit(ladder(QUICK), **wrong)


def test_the_largest_budget_is_foretold_from_the_smaller_ones() -> None:
    points = ladder(QUICK, budgets=np.geomspace(1e11, 1.6e12, 5))
    rows = foresight.left_out(points)
    third = [r for r in rows if r["estimator"] == "approach3"]
    assert [round(r["extrapolation"]) for r in third] == [2, 4]
    for row in third:
        assert abs(row["error"]) < 1e-6  # its own law, without noise
        assert row["measured"] == points.loss[points.flops > 1.5e12].min()
    refused = foresight.left_out(ladder(QUICK))
    assert refused == []  # three budgets: two would be left

    fits = laws.fit(points, approaches=(2, 3), bootstrap=0)
    text = io.StringIO()
    Console(file=text, width=160).print(law_table.table({**fits, "left_out": rows}))
    assert "1.6×10¹² FLOPs, from those below" in text.getvalue()


def test_the_table_shows_what_was_found_and_what_was_refused() -> None:
    points = ladder(QUICK, 0.005)
    points = dataclasses.replace(points, name=tuple(f"[run {i}]" for i in range(len(points))))
    fits = laws.fit(points, drop_largest_loss=1, bootstrap=20, for_compute=HELD_OUT)
    text = io.StringIO()
    Console(file=text, width=160).print(law_table.table(fits))
    for part in (
        "14 runs", "refused: no training curves given", f"{fits['approach2']['a']:.3f}", "alpha",
        "IsoFLOP minima", "3.6×10¹²", f"{fits['for_compute']['approach3']['loss']:.4f}",
        "dropped: [run ", "warning: compute spans",
    ):  # fmt: skip
        assert part in text.getvalue(), part


# ------------------------------------------------------------------------------------ the intervals


def coverage(law: Law, draws: int, resamples: int, approaches: Sequence[int]) -> dict[str, float]:
    """Share of planted ladders whose 95 % interval holds the truth, and the median half-width."""
    hits: dict[str, list[float]] = {}
    for seed in range(draws):
        points = ladder(law, 0.006, seed)
        given = curves(points, law) if 1 in approaches else None
        fits = laws.fit(points, given, approaches=approaches, bootstrap=resamples, seed=seed)
        for number in approaches:
            name = f"approach{number}"
            found = laws.predict(fits, name, HELD_OUT)
            measured = float(law.loss(np.array(found["params"]), np.array(HELD_OUT)))
            measured *= np.exp(0.006 * np.random.default_rng([seed, 99]).standard_normal())
            inside = {k: (fits[name]["ci95"][k], getattr(law, k)) for k in ("a",)}
            if number == 3:
                inside |= {k: (fits[name]["ci95"][k], getattr(law, k)) for k in ("alpha", "beta")}
            inside["N*"] = (found["params_ci95"], law.best_size(HELD_OUT))
            inside["best loss"] = (found["ci95_law"], law.best_loss(HELD_OUT))
            inside["run"] = (found["ci95"], measured)
            for key, ((low, high), truth) in inside.items():
                hits.setdefault(f"{number} {key}", []).append(low <= truth <= high)
            hits.setdefault(f"{number} half-width", []).append(found["half_width"])
    return {
        k: float(np.median(v)) if "half-width" in k else float(np.mean(v)) for k, v in hits.items()
    }


def test_intervals_cover() -> None:
    """Of 40 draws a true 95 % interval misses more than six once in a hundred times."""
    for approaches, resamples in (((1, 2), 200), ((3,), 40)):
        for key, share in coverage(QUICK, 40, resamples, approaches).items():
            assert share < 0.05 if "half-width" in key else share >= 34 / 40, (key, share)


@pytest.mark.slow
@pytest.mark.parametrize("law", [QUICK, Law(0.5, 0.34, 0.28), Law(0.9, 0.5, 0.55)])
def test_measured_coverage(law: Law) -> None:
    found = coverage(law, 200, 200, (1,)) | coverage(law, 500, 200, (2, 3))
    print(law, {k: round(v, 3) for k, v in found.items()})
    for key, share in found.items():
        least, most = (0.90, 1.0) if key.startswith("1") else (0.92, 0.985)
        assert share < 0.05 if "half-width" in key else least <= share <= most, (key, share)


# ------------------------------------------------------------------------------- published numbers


@pytest.mark.slow
def test_besiroglu_2024_is_reproduced() -> None:
    """Epoch's reading of Hoffmann et al. 2022, fig. 4 (repository analyzing-chinchilla)."""
    path = os.environ.get("JAXLM_EPOCH_CSV")
    if not path:
        pytest.skip("JAXLM_EPOCH_CSV: not set to epoch-research/analyzing-chinchilla's CSV")
    columns = {"params": "Model Size", "flops": "Training FLOP", "loss": "loss"}
    start = time.perf_counter()
    fits = laws.fit(runs.from_csv(path, columns), drop_largest_loss=5)
    seconds = time.perf_counter() - start
    law = fits["approach3"]
    print({k: law[k] for k in ("objective", "E", "A", "B", "alpha", "beta", "a", "se", "ci95")})
    print(f"{seconds:.1f} s; approach 2: a {fits['approach2']['a']:.4f}")
    assert (fits["n"], len(fits["dropped"])) == (240, 5)
    assert law["objective"] <= 1.01828e-3
    for name, value in {"E": 1.8172, "alpha": 0.3473, "beta": 0.3672}.items():
        assert law[name] == pytest.approx(value, abs=1e-4)
    for name, value in {"E": 0.026, "alpha": 0.015, "beta": 0.021}.items():
        assert law["se"][name] == pytest.approx(value, rel=0.1)
    for name, bounds in {
        "A": (285, 744), "B": (1042, 5810), "E": (1.769, 1.871), "alpha": (0.317, 0.373),
        "beta": (0.331, 0.415),
    }.items():  # fmt: skip
        width = bounds[1] - bounds[0]
        assert np.allclose(law["ci95"][name], bounds, atol=0.1 * width), name
    assert fits["approach2"]["a"] == pytest.approx(0.49, abs=0.03)
    assert seconds < 60
