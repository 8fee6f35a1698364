"""The laws that `jaxlm fit --law=NAME` knows, each as data: its terms, parameters and source.

A law is (sum of coefficient x term)^power. Coefficients are at least 0; what is inside a term or
the power is a *free* parameter, with bounds and starting values. `terms` gives the logarithm of
every term without its coefficient, [n] or a scalar, from the natural parameters `p` and the columns
`c`; it uses `jax.numpy` alone, so that the fitter can differentiate it. Another law is another
entry of `FORMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

P = Mapping[str, Any]
Terms = Callable[[P, P], tuple[Any, ...]]


@dataclass(frozen=True)
class Free:
    """A parameter that is no coefficient.

    `scale`: "linear"; "log" searches its logarithm; "within" is a place within a column's values,
    bounds and starts from 0 (the smallest) to 1 (the largest), evenly in logs. `unit`: a column;
    linear values are multiples of its smallest.
    """

    name: str
    low: float
    high: float
    starts: tuple[float, ...]
    scale: Literal["linear", "log", "within"] = "linear"
    unit: str = ""


@dataclass(frozen=True)
class Form:
    """One law. `anchors`: terms that stand for `terms` where those need the coefficients
    themselves. `asymptotes`: coefficients of constant terms, which the target never falls below.
    `signs` of the terms, where they are not all positive. `derived`: further quantities from the
    natural parameters."""

    name: str
    formula: str
    source: str
    columns: tuple[str, ...]
    coefficients: tuple[str, ...]
    free: tuple[Free, ...]
    terms: Terms
    target: str = "loss"
    residual: Literal["log", "value"] = "log"
    asymptotes: tuple[str, ...] = ()
    signs: tuple[int, ...] | None = None
    power: Callable[[P], Any] | None = None
    anchors: Terms | None = None
    derived: Callable[[P], dict[str, Any]] | None = None


def _exponent(name: str, starts: tuple[float, ...] = (0.15, 0.3, 0.5, 0.8, 1.2)) -> Free:
    return Free(name, 0.01, 2.0, starts)


# ----------------------------------------------------------------------------- size, data, compute


def _chinchilla(p: P, c: P) -> tuple[Any, ...]:
    return -p["alpha"] * jnp.log(c["params"]), -p["beta"] * jnp.log(c["tokens"]), 0.0


def _allocation(p: P) -> dict[str, Any]:
    """N* ~ C^a, D* ~ C^b (Hoffmann et al. 2022, eq. 4)."""
    total = p["alpha"] + p["beta"]
    return {"a": p["beta"] / total, "b": p["alpha"] / total}


def _kaplan(p: P, c: P) -> tuple[Any, ...]:
    return -p["alpha_N"] / p["alpha_D"] * jnp.log(c["params"]), -jnp.log(c["tokens"])


def _kaplan_scales(p: P) -> dict[str, Any]:
    """N_c, D_c, and a of N* ~ C^a: in C = 6ND the bracket's terms balance."""
    ratio = p["alpha_N"] / p["alpha_D"]
    return {"N_c": p["A"] ** (1 / ratio), "D_c": p["B"], "a": 1 / (1 + ratio)}


def _power(p: P, c: P) -> tuple[Any, ...]:
    return (-p["c"] * jnp.log(c["flops"]),)


def _saturating(p: P, c: P) -> tuple[Any, ...]:
    return -p["c"] * jnp.log(c["flops"]), 0.0


def _broken(p: P, c: P) -> tuple[Any, ...]:
    bend = p["c1"] * p["f"] * jnp.logaddexp(0.0, jnp.log(c["flops"] / p["d"]) / p["f"])
    return -p["c0"] * jnp.log(c["flops"]) - bend, 0.0


def _overtrained(p: P, c: P) -> tuple[Any, ...]:
    log_c, log_m = jnp.log(c["flops"]), jnp.log(c["tokens"] / c["params"])
    return p["eta"] * (log_m - log_c), p["eta"] * (-log_m - log_c), 0.0


def _repeated(p: P, c: P) -> tuple[Any, ...]:
    """D' and N' of Muennighoff et al. 2023: what repeated tokens and the parameters beyond those
    that unique tokens can use are still worth."""
    log_g = jnp.log(p["alpha"] * p["A"] / (p["beta"] * p["B"])) / (p["alpha"] + p["beta"])
    needed = log_g + (jnp.log(c["unique_tokens"]) + log_g) * p["beta"] / p["alpha"]
    useful = jnp.exp(jnp.clip(needed, 0.0, jnp.log(c["params"])))
    n = useful + _worth(c["params"] - useful, useful, p["R_N"])
    unique = jnp.minimum(c["tokens"], c["unique_tokens"])
    d = unique + _worth(c["tokens"] - unique, unique, p["R_D"])
    return -p["alpha"] * jnp.log(n), -p["beta"] * jnp.log(d), 0.0


def _worth(extra: Any, base: Any, half_life: Any) -> Any:
    return base * half_life * -jnp.expm1(-extra / base / half_life)


def _precision(p: P, c: P) -> tuple[Any, ...]:
    n = c["params"] * -jnp.expm1(-c["bits"] / p["gamma"])
    return -p["alpha"] * jnp.log(n), -p["beta"] * jnp.log(c["tokens"]), 0.0


def _moe(p: P, c: P) -> tuple[Any, ...]:
    e = jnp.log(c["experts"])
    n = p["delta"] * e - (p["alpha"] + p["gamma"] * e) * jnp.log(c["params"])
    d = p["omega"] * e - (p["beta"] + p["zeta"] * e) * jnp.log(c["tokens"])
    return n, d, 0.0


# --------------------------------------------------------------- loss to loss, to error; optima


def _loss_to_loss(p: P, c: P) -> tuple[Any, ...]:
    # From the floor E0 on the other loss is at its own: a resampled E0 may lie above a point asked.
    above = jnp.maximum(c["loss_from"] - p["E0"], 1e-30)
    return p["kappa"] * jnp.log(above), 0.0


def _downstream(p: P, c: P) -> tuple[Any, ...]:
    return 0.0, -p["gamma"] * c["loss"]


def _optimum_nd(p: P, c: P) -> tuple[Any, ...]:
    return (p["a"] * jnp.log(c["params"]) + p["b"] * jnp.log(c["tokens"]),)


def _optimum_d(p: P, c: P) -> tuple[Any, ...]:
    return (p["b"] * jnp.log(c["tokens"]),)


_ANY = (-0.6, -0.2, 0.2, 0.6)
_NEAR_0 = (-0.05, 0.05)

_ALL = (
    Form(
        "chinchilla", "L = E + A/N^alpha + B/D^beta", "Hoffmann et al. 2022, eq. 2",
        ("params", "tokens"), ("A", "B", "E"), (_exponent("alpha"), _exponent("beta")),
        _chinchilla, asymptotes=("E",), derived=_allocation,
    ),
    Form(
        "kaplan", "L = (A N^-(alpha_N/alpha_D) + B/D)^alpha_D, A = N_c^(alpha_N/alpha_D), B = D_c",
        "Kaplan et al. 2020, eq. 1.5", ("params", "tokens"), ("A", "B"),
        (Free("alpha_N", 0.005, 1.5, (0.05, 0.1, 0.2, 0.4)),
         Free("alpha_D", 0.005, 1.5, (0.05, 0.1, 0.2, 0.4))),
        _kaplan, power=lambda p: p["alpha_D"], derived=_kaplan_scales,
    ),
    Form(
        "power", "L = K C^-c", "Kaplan et al. 2020, eq. 1.3", ("flops",), ("K",),
        (Free("c", 0.001, 3.0, (0.05, 0.15, 0.4)),), _power,
    ),
    Form(
        "saturating", "L = E + K C^-c", "Henighan et al. 2020, eq. 1.1", ("flops",), ("K", "E"),
        (Free("c", 0.005, 3.0, (0.05, 0.1, 0.2, 0.4, 0.8)),), _saturating, asymptotes=("E",),
    ),
    Form(
        "broken", "L = E + K C^-c0 (1 + (C/d)^(1/f))^(-c1 f)", "Caballero et al. 2022, eq. 1",
        ("flops",), ("K", "E"),
        (Free("c0", -1.0, 2.0, (0.03, 0.1, 0.3)), Free("c1", -2.0, 3.0, (-0.1, 0.1, 0.4)),
         Free("d", 0.02, 0.98, (0.2, 0.5, 0.8), "within", "flops"),
         Free("f", 0.02, 3.0, (0.1, 0.5), "log")),
        _broken, asymptotes=("E",),
    ),
    Form(
        "overtrained", "L = E + (a M^eta + b M^-eta) C^-eta, M = D/N", "Gadre et al. 2024, eq. 4",
        ("params", "tokens", "flops"), ("a", "b", "E"),
        (Free("eta", 0.01, 1.0, (0.05, 0.1, 0.2, 0.3, 0.5)),), _overtrained, asymptotes=("E",),
    ),
    Form(
        "data-constrained",
        "L = E + A/N'^alpha + B/D'^beta, D' = U + U R_D (1 - e^(-(D/U - 1)/R_D)), N' likewise",
        "Muennighoff et al. 2023, eq. 5-6, 11-12", ("params", "tokens", "unique_tokens"),
        ("A", "B", "E"),
        (_exponent("alpha", (0.2, 0.35, 0.6)), _exponent("beta", (0.2, 0.35, 0.6)),
         Free("R_N", 0.01, 1e4, (0.5, 3.0, 12.0, 100.0), "log"),
         Free("R_D", 0.01, 1e4, (0.5, 3.0, 12.0, 100.0), "log")),
        _repeated, asymptotes=("E",), anchors=_chinchilla, derived=_allocation,
    ),
    Form(
        "precision", "L = E + A/(N (1 - e^(-P/gamma)))^alpha + B/D^beta",
        "Kumar et al. 2024, eq. 3 (bits of the weights)", ("params", "tokens", "bits"),
        ("A", "B", "E"),
        (_exponent("alpha", (0.2, 0.4, 0.8)), _exponent("beta", (0.2, 0.4, 0.8)),
         Free("gamma", 0.05, 100.0, (0.5, 2.0, 8.0), "log")),
        _precision, asymptotes=("E",), derived=_allocation,
    ),
    Form(
        "moe",
        "L = E + A X^delta N^-(alpha + gamma ln X) + B X^omega D^-(beta + zeta ln X), N active,"
        " X experts",
        "Ludziejewski et al. 2025, eq. 6, X without its saturation",
        ("params", "tokens", "experts"), ("A", "B", "E"),
        (_exponent("alpha", (0.2, 0.4, 0.8)), _exponent("beta", (0.2, 0.4, 0.8)),
         Free("gamma", -0.5, 0.5, (0.0,)), Free("zeta", -0.5, 0.5, (0.0,)),
         Free("delta", -5.0, 5.0, (-0.2, 0.2)), Free("omega", -5.0, 5.0, (-0.2, 0.2))),
        _moe, asymptotes=("E",),
    ),
    Form(
        "loss-to-loss", "L1 = E1 + K (L0 - E0)^kappa", "Brandfonbrener et al. 2024, eq. 2",
        ("loss_from",), ("K", "E1"),
        (Free("kappa", 0.05, 5.0, (0.5, 0.8, 1.0, 1.3, 2.0)),
         Free("E0", 0.0, 0.999, (0.0, 0.3, 0.6, 0.8, 0.95), "linear", "loss_from")),
        _loss_to_loss, asymptotes=("E1",),
    ),
    Form(
        "downstream", "error = epsilon - k e^(-gamma L)", "Gadre et al. 2024, eq. 5", ("loss",),
        ("epsilon", "k"), (Free("gamma", 0.01, 20.0, (0.2, 0.5, 1.0, 2.0, 4.0), "log"),),
        _downstream, target="error", residual="value", signs=(1, -1),
    ),
    Form(
        "learning-rate", "best rate = K N^a D^b", "Li et al. 2025 (Step Law), eq. 1",
        ("params", "tokens"), ("K",), (Free("a", -3.0, 3.0, _ANY), Free("b", -3.0, 3.0, _ANY)),
        _optimum_nd, target="learning_rate",
    ),
    Form(
        "batch-size", "best batch = K D^b", "Li et al. 2025 (Step Law), eq. 1", ("tokens",), ("K",),
        (Free("b", -3.0, 3.0, _ANY),), _optimum_d, target="batch_tokens",
    ),
)  # fmt: skip
FORMS = {form.name: form for form in _ALL}
