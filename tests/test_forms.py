"""The laws of `scaling.forms`: planted and found again, against other optimisers, and refused.

What share of their intervals covers the truth: docs/results/published.md.
"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy.optimize import minimize
from scipy.special import huber, logsumexp

from jaxlm import api, experiment
from jaxlm.config import Config, DataConfig, ModelConfig
from jaxlm.model import scale
from jaxlm.model_config import MoE
from jaxlm.report import form_plots, form_table
from jaxlm.scaling import columns, form_fit, form_use, robust
from jaxlm.scaling.columns import Columns
from jaxlm.scaling.forms import FORMS
from jaxlm.scaling.frontier import Refusal
from jaxlm.schema import UserError

SURFACE = {"A": 400.0, "B": 2000.0, "E": 1.8, "alpha": 0.34, "beta": 0.37}
TRUE = {
    "chinchilla": SURFACE,
    "kaplan": {"A": 8.8e13 ** (0.076 / 0.095), "B": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095},
    "power": {"K": 60.0, "c": 0.07},
    "saturating": {"K": 3000.0, "E": 1.7, "c": 0.18},
    "broken": {"K": 30.0, "E": 1.0, "c0": 0.05, "c1": 0.15, "d": 3e18, "f": 0.3},
    "overtrained": {"a": 150.0, "b": 300.0, "E": 1.8, "eta": 0.14},
    "data-constrained": {"A": 521.0, "B": 1488.0, "E": 1.87, "alpha": 0.353, "beta": 0.353,
                         "R_N": 5.3, "R_D": 15.4},
    "precision": {**SURFACE, "gamma": 2.5},
    "moe": {"A": 400.0, "B": 2000.0, "E": 1.5, "alpha": 0.33, "beta": 0.36, "gamma": -0.01,
            "zeta": 0.005, "delta": -0.1, "omega": 0.05},
    "loss-to-loss": {"K": 0.8, "E1": 0.5, "kappa": 1.2, "E0": 1.5},
    "downstream": {"epsilon": 0.85, "k": 2.0, "gamma": 0.8},
    "learning-rate": {"K": 1.79, "a": -0.713, "b": 0.307},
    "batch-size": {"K": 0.58, "b": 0.571},
}  # fmt: skip


def table(name: str, noise: float = 0.0, seed: int = 0) -> Columns:
    """30 runs, 1e7 to 1e9 parameters and 2e8 to 2e10 tokens, of the planted law."""
    form, rng, choose = FORMS[name], np.random.default_rng([seed, 1]), np.random.default_rng(1)
    grid = np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(2e8, 2e10, 6))
    c = dict(zip(("params", "tokens"), (g.ravel() for g in grid), strict=True))
    c["flops"] = 6 * c["params"] * c["tokens"]
    c["unique_tokens"] = np.minimum(c["tokens"], choose.choice([2e8, 8e8, 3e9], 30))
    c["bits"], c["experts"] = choose.choice([3.0, 4, 6, 8, 16], 30), choose.choice([1.0, 4, 16], 30)
    c["loss"] = c["loss_from"] = (
        SURFACE["E"] + 400 / c["params"] ** 0.34 + 2000 / c["tokens"] ** 0.37
    )
    y, error = robust.law(form, TRUE[name], c), noise * rng.standard_normal(30)
    c[form.target] = y * np.exp(error) if form.residual == "log" else y + error
    return Columns(
        {k: c[k] for k in {*form.columns, form.target, "flops"}},
        np.array([f"{v:.3g}" for v in c["flops"]]),
        tuple(f"run {i}" for i in range(30)),
        np.zeros(30, bool),
        "N planted",
    )


QUICK = ("broken", "downstream")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FORMS]
)
def test_a_planted_law_without_noise_is_found_exactly(name: str) -> None:
    found = form_fit.fit(table(name), name, starts=64, bootstrap=0)
    assert found["objective"] < 1e-20
    for parameter, value in TRUE[name].items():
        assert found["parameters"][parameter]["value"] == pytest.approx(value, rel=1e-4), parameter
    assert found["left_out"]["largest"]["rms"] < 1e-9  # the largest is foretold exactly


def test_below_the_floor_of_one_loss_the_other_is_at_its_own() -> None:
    """As resamples have it whose E0 lies above the point that is asked for."""
    law = robust.law(
        FORMS["loss-to-loss"], TRUE["loss-to-loss"], {"loss_from": np.array([1.2, 1.5])}
    )
    assert law == pytest.approx(TRUE["loss-to-loss"]["E1"])


def kaplan_objective(theta: np.ndarray, data: Columns) -> float:
    """Kaplan et al. 2020, eq. 1.5 in logarithms, with scipy's log-sum-exp and Huber loss."""
    log_a, log_b, alpha_n, alpha_d = theta
    c = data.values
    terms = [log_a - alpha_n / alpha_d * np.log(c["params"]), log_b - np.log(c["tokens"])]
    return float(huber(1e-3, alpha_d * logsumexp(terms, axis=0) - np.log(c["loss"])).sum())


def chinchilla_objective(theta: np.ndarray, data: Columns) -> float:
    """Hoffmann et al. 2022, eq. 3."""
    log_a, log_b, log_e, alpha, beta = theta
    c = data.values
    terms = [log_a - alpha * np.log(c["params"]), log_b - beta * np.log(c["tokens"]),
             np.full(len(data.name), log_e)]  # fmt: skip
    return float(huber(1e-3, logsumexp(terms, axis=0) - np.log(c["loss"])).sum())


@pytest.mark.parametrize(
    ("name", "objective", "logs"),
    [("chinchilla", chinchilla_objective, 3), ("kaplan", kaplan_objective, 2)],
)
def test_no_other_optimiser_finds_a_lower_objective(name: str, objective, logs: int) -> None:
    data = table(name, 0.01, seed=3)
    found = form_fit.fit(data, name, starts=64, bootstrap=0)
    theta = np.array([p["value"] for p in found["parameters"].values()])
    theta[:logs] = np.log(theta[:logs])
    assert objective(theta, data) == pytest.approx(found["objective"], rel=1e-9)
    planted = np.array(list(TRUE[name].values()))
    planted[:logs] = np.log(planted[:logs])
    for start in (theta, planted):
        other = minimize(
            lambda t: 1e6 * objective(t, data), start, method="Nelder-Mead",
            options={"maxiter": 4000, "maxfev": 4000, "xatol": 1e-9, "fatol": 1e-9},
        )  # fmt: skip
        assert found["objective"] <= other.fun / 1e6 * (1 + 1e-9)


def test_parameters_that_are_given_stay() -> None:
    data = table("data-constrained", 0.005)
    given = {k: v for k, v in TRUE["data-constrained"].items() if k not in ("R_N", "R_D")}
    found = form_fit.fit(data, "data-constrained", fixed=given, starts=16, bootstrap=100)
    for name, p in found["parameters"].items():
        if name in given:
            assert p["value"] == pytest.approx(given[name], rel=1e-12)
            assert p["ci95"] is None
        else:
            for low, high in (p["ci95"], p["profile95"]):
                assert low < p["value"] < high
                assert low < 1.3 * TRUE["data-constrained"][name] and high > 0.7 * p["value"]


def test_the_optimum_is_the_closed_form() -> None:
    found = form_fit.fit(table("chinchilla"), "chinchilla", starts=32, bootstrap=0)
    best = form_use.allocate(found, 1e22, {})
    A, B, _, alpha, beta = SURFACE.values()
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))  # Hoffmann et al. 2022, eq. 4
    assert best["params"] == pytest.approx(G * (1e22 / 6) ** (beta / (alpha + beta)), rel=1e-3)
    assert best["tokens"] * best["params"] * 6 == pytest.approx(1e22)
    assert 0 < best["cost_of_half_size"] < 0.02
    assert found["derived"]["a"]["value"] == pytest.approx(beta / (alpha + beta), rel=1e-6)


def test_when_more_stops_helping() -> None:
    data = table("saturating", 0.005, seed=2)
    found = form_fit.fit(data, "saturating", starts=16, bootstrap=200)
    stops = form_use.stops(found, 1.2e20)
    K, E, c = TRUE["saturating"].values()
    loss = [E + K * (x * stops["at"]) ** -c for x in (1, 2)]
    assert 1 - loss[1] / loss[0] == pytest.approx(stops["scatter"], rel=0.25)
    assert stops["at_ci95"][0] <= stops["at"] <= stops["at_ci95"][1]
    assert form_use.stops({"law": "chinchilla"}, 1e20) is None


def test_what_the_table_cannot_carry_is_refused() -> None:
    data = table("chinchilla", 0.005)
    few = data.drop(np.arange(5, 30), "cut")
    with pytest.raises(Refusal, match="5 distinct points, 6 needed for 5 parameters"):
        form_fit.fit(few, "chinchilla")
    one = data.drop(np.flatnonzero(data.values["params"] > 1.1e7), "cut")
    with pytest.raises(Refusal, match=r"6 distinct|params is the same in every run"):
        form_fit.fit(one, "chinchilla")
    n = np.geomspace(1e7, 1e9, 12)
    values = {"params": n, "tokens": 20 * n, "loss": 1.8 + 500 * n**-0.35}
    line = Columns(values, n.astype(str), tuple(map(str, n)), np.zeros(12, bool), "")
    with pytest.raises(Refusal, match="cannot tell"):
        form_fit.fit(line, "chinchilla", starts=16)


@pytest.mark.slow
def test_undetermined_parameters_are_said_so() -> None:
    """Hardly any repetition: R_D may be anything, and its profile stays open."""
    data = table("data-constrained", 0.01)
    values = data.values | {"unique_tokens": 0.8 * data.values["tokens"]}
    data = Columns(values, data.group, data.name, data.held, "")
    found = form_fit.fit(data, "data-constrained", starts=8, bootstrap=40)
    assert found["parameters"]["R_D"]["undetermined"]
    assert any("R_D is not determined" in line for line in found["warnings"])


def coverage(name: str, draws: int, resamples: int, how: str = "runs") -> dict[str, float]:
    """Share of planted tables whose 95 % intervals hold the truth: of every parameter, of the law
    at ten times the largest params, tokens and flops, and of N* at 1e22 FLOPs."""
    form, hits = FORMS[name], {}
    there = {"params": 1e10, "tokens": 2e11, "flops": 1e22, "unique_tokens": 5e10, "bits": 8.0,
             "experts": 8.0, "loss_from": 2.0, "loss": 2.0}  # fmt: skip
    there = {k: there[k] for k in form.columns}
    ahead = float(robust.law(form, TRUE[name], there)[0])
    best = None
    if {"params", "tokens"} <= set(form.columns) and form.target == "loss":
        best = form_use.least(form, TRUE[name], 1e22, there, 6.0)[0]
    for seed in range(draws):
        found = form_fit.fit(
            table(name, 0.005, seed), name, starts=24, bootstrap=resamples, resample=how, at=there,
            profile=False,
        )  # fmt: skip
        inside = {k: (p["ci95"], TRUE[name][k]) for k, p in found["parameters"].items()}
        inside["ahead"] = (found["at"]["ci95_law"], ahead)
        if best is not None:
            optimum = form_use.allocate(found, 1e22, there)
            inside["N*"] = (optimum["params_ci95"], float(np.exp(best)))
        for key, ((low, high), truth) in inside.items():
            hits.setdefault(key, []).append(low <= truth <= high)
    return {k: float(np.mean(v)) for k, v in hits.items()}


@pytest.mark.slow
def test_intervals_cover() -> None:
    """Of 40 draws a true 95 % interval misses more than six once in a hundred times."""
    for key, share in coverage("saturating", 40, 100).items():
        assert share >= 34 / 40, (key, share)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_measured_coverage(name: str) -> None:
    found = coverage(name, 200, 200)
    print(name, {k: round(v, 3) for k, v in found.items()})
    floors = ("E0", "E1") if name == "loss-to-loss" else ()
    for key, share in found.items():
        assert share <= 0.995 and (share >= 0.90 or key in floors), (key, share)
    if any(found[key] < 0.90 for key in floors):
        pytest.xfail("the floors' intervals are too narrow (docs/results/published.md)")


# ---------------------------------------------------------------------------- tables, command line


def test_any_table_by_conditions_and_held_out_rows(tmp_path: Path) -> None:
    data = table("saturating", 0.001)
    rows = [{"run": {"compute": c, "final": y}, "set": "c4"} for c, y in
            zip(data.values["flops"], data.values["loss"], strict=True)]  # fmt: skip
    rows.append({"run": {"compute": 1e21, "final": 9.9}, "set": "other"})
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = api.fit_laws(
        path, ["saturating"],
        columns={"flops": "run.compute", "loss": "run.final"}, where=["set=c4"],
        holdout=["run.compute>5e19"], bootstrap=50, starts=16,
    )  # fmt: skip
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    (law,) = found["laws"]
    assert law["n"] + len(law["held_out"]) == 30
    for row in law["held_out"]:
        assert abs(row["error_relative"]) < 0.01
        assert row["ci95"][0] < row["ci95_law"][0] < row["ci95_law"][1] < row["ci95"][1]
    text = io.StringIO()
    Console(file=text, width=160).print(form_table.table(found["laws"]))
    for part in ("L = E + K C^-c", "held out", "doubling the largest compute", "95 % by profile"):
        assert part in text.getvalue(), part


def test_a_law_s_plots_draw_what_was_fitted(tmp_path: Path) -> None:
    data = table("saturating", 0.005)
    held = data.values["flops"] > 5e19
    found = form_fit.fit(dataclasses.replace(data, held=held), "saturating", starts=8, bootstrap=40)
    made = form_plots.plot_laws([found, {"law": "power", "refused": "why"}], tmp_path)
    names = [f"law_saturating_{kind}.png" for kind in ("measured", "curve", "profiles")]
    assert [path.name for path in made] == names
    assert all(path.stat().st_size > 10_000 for path in made)
    p = {k: v["value"] for k, v in found["parameters"].items()}
    c, y = data.values["flops"][~held], data.values["loss"][~held]
    drawn = form_plots.measured(found).figure.axes[0].lines[0].get_xydata()
    np.testing.assert_allclose(drawn, np.stack([y, p["E"] + p["K"] * c ** -p["c"]], 1), rtol=1e-6)
    assert form_plots.curve({**found, "law": "chinchilla"}) is None  # of two variables


def test_the_optimum_becomes_a_file_that_trains_it(tmp_path: Path) -> None:
    values = table("chinchilla").values
    names = ("params", "tokens", "loss")
    points = zip(*(values[k].tolist() for k in names), strict=True)
    rows = [",".join(map(repr, row)) for row in points]
    (tmp_path / "runs.csv").write_text("\n".join([",".join(names), *rows]))
    base = Config(model=ModelConfig(n_heads=2, activation="swiglu", moe=MoE(n_shared_experts=1)),
                  data=DataConfig(sources=("text/",)))  # fmt: skip
    path = tmp_path / "best.py"
    found = api.fit_laws(
        tmp_path / "runs.csv", ["chinchilla"], bootstrap=20, starts=16, for_compute=1e20,
        base=base, config_out=path,
    )  # fmt: skip
    best = found["laws"][0]["for_compute"]
    config = experiment.load(path)
    counts = scale.size(config.model)
    assert counts.params == pytest.approx(best["params"], rel=0.1)
    assert config.tokens == pytest.approx(best["tokens"], rel=0.01)
    assert config.model.head_dim == base.model.head_dim
    ratio = config.model.d_model / config.model.n_layers
    assert ratio == pytest.approx(128 / 4, rel=0.3)
    kept = dataclasses.replace(config, name=base.name, train=base.train, model=base.model)
    assert kept == base
    with pytest.raises(UserError, match="--base"):
        api.fit_laws(tmp_path / "runs.csv", ["chinchilla"], bootstrap=0, starts=16,
                     for_compute=1e20, config_out=path)  # fmt: skip


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"names": ["chinchila"]}, "did you mean 'chinchilla'"),
        ({"columns": {"lss": "loss"}}, "did you mean 'loss'"),
        ({"columns": {"loss": "los"}}, "did you mean 'loss'"),
        ({"where": ["loss~1"]}, "--where: expected column=value"),
        ({"where": ["los<1"]}, "did you mean 'loss'"),
        ({"where": ["loss<0"]}, "leaves none of the rows"),
        ({"names": ["precision"]}, "precision needs bits"),
        ({"count": "nonembedding"}, "did you mean 'non_embedding'"),
        ({"flops": "6ND"}, "choose from exact, 6nd"),
        ({"fixed": {"alfa": 1.0}}, "did you mean 'alpha'"),
        ({"resample": "points"}, "expected runs or residuals"),
        ({"drop_largest": 99}, "--drop-largest-loss"),
        ({"huber_delta": 0.0}, "--huber-delta"),
        ({"names": ["downstream"], "columns": {"error": "loss", "loss": "tokens"},
          "residual": "log"}, "expected value, got log"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path: Path, how: dict, said: str) -> None:
    path = tmp_path / "runs.csv"
    values = table("chinchilla").values
    rows = [f"{n},{d},{y}" for n, d, y in zip(values["params"], values["tokens"], values["loss"],
                                              strict=True)]  # fmt: skip
    path.write_text("\n".join(["params,tokens,loss", *rows]))
    with pytest.raises(UserError) as e:
        api.fit_laws(path, **{"names": ["chinchilla"], "starts": 2, "bootstrap": 2, **how})
    assert said in str(e.value) and "\n" not in str(e.value)


def test_n_and_c_are_counted_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(
        "params,params_non_embedding,params_effective,tokens,flops,loss\n"
        "100,60,90,1000,540000,3\n200,150,190,1000,1140000,2.5\n"
    )
    form = FORMS["overtrained"]
    for count, first in (("all", 100), ("non_embedding", 60), ("effective", 90)):
        for flops, c in (("exact", 540_000), ("6nd", 6000 * first)):
            found = columns.read(path, form, count=count, flops=flops)
            assert (found.values["params"][0], found.values["flops"][0]) == (first, c)
