"""From a `Sweep` to its members: sizes, steps and seeds as pure functions of the config."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlm.config import Config, Horizon, ModelConfig, Rung, Shape, Sweep, validate
from jaxlm.model.scale import size
from jaxlm.schema import UserError, override
from jaxlm.train.record import Role

EVERYWHERE = Horizon()
_FOLLOW = ("optimizer.learning_rate", "train.global_batch_size")  # a horizon


@dataclass(frozen=True)
class Member:
    """One run of a sweep: what it is, and what it is for."""

    config: Config
    role: Role
    budget: float  # FLOPs

    @property
    def name(self) -> str:
        return self.config.name


def sized(model: ModelConfig, shape: Shape, where: str = "rungs") -> ModelConfig:
    """`model` at another size: head width stays, the other widths keep their ratio to d_model."""
    k = model.head_dim
    if shape.d_model % k:
        near = max(k, round(shape.d_model / k) * k)
        raise UserError(
            f"config.{where}: d_model={shape.d_model} is no multiple of the head width {k};"
            f" nearest: {near}"
        )
    heads = shape.d_model // k
    kv = None if model.n_kv_heads is None else max(1, heads * model.kv_heads // model.n_heads)
    ff = None if model.d_ff is None else round(model.d_ff * shape.d_model / model.d_model)
    return dataclasses.replace(
        model,
        d_model=shape.d_model,
        n_layers=shape.n_layers,
        n_heads=heads,
        n_kv_heads=kv,
        d_head=k,
        d_ff=ff,
    )


def at_budget(
    base: Config,
    shape: Shape,
    flops: float,
    seed: int,
    horizon: Horizon = EVERYWHERE,
    where: str = "rungs",
) -> Config:
    """`base` at this size for this many training FLOPs, in whole dispatches of steps."""
    model = sized(base.model, shape, where)
    tokens = flops / size(model).flops_per_token
    base = at_horizon(base, horizon, tokens)
    k = base.train.steps_per_dispatch
    steps = max(1, round(tokens / (base.train.global_batch_size * model.seq_len * k))) * k
    name = f"c{_short(flops)}-d{shape.d_model}-l{shape.n_layers}-s{seed}"
    return dataclasses.replace(
        base,
        name=name,
        seed=seed,
        model=model,
        train=dataclasses.replace(base.train, steps=steps),
    )


def at_horizon(base: Config, horizon: Horizon, tokens: float) -> Config:
    """`base` with the batch and the learning rate that `horizon` gives a run of so many tokens."""
    if not horizon.tokens:
        return base
    ratio = tokens / horizon.tokens
    doublings = round(horizon.batch_power * math.log2(ratio))
    batch = max(1, round(base.train.global_batch_size * 2.0**doublings))
    grown = batch / base.train.global_batch_size
    rate = base.optimizer.learning_rate * math.sqrt(grown) * ratio**horizon.rate_power
    return dataclasses.replace(
        base,
        optimizer=dataclasses.replace(base.optimizer, learning_rate=float(f"{rate:.4g}")),
        train=dataclasses.replace(base.train, global_batch_size=batch),
    )


def _short(flops: float) -> str:
    """'3.0e11': as few digits, but at least two, as tell it from every other number."""
    texts = (f"{flops:.{digits}e}" for digits in range(1, 17))
    mantissa, exponent = next(t for t in texts if float(t) == flops).split("e")
    return f"{mantissa}e{int(exponent)}"


def grid(
    base: Config,
    shapes: Sequence[Shape],
    tokens_per_param: Sequence[float] = (20.0,),
    tokens: Sequence[float] = (),
) -> tuple[Rung, ...]:
    """Rungs of one run each: every shape at so many tokens per effective parameter (one value: a
    fixed-ratio ladder; several: an over-training grid) and at these tokens in all. For laws of
    N and D; a parabola needs several sizes in a rung."""
    rungs = []
    for shape in shapes:
        counts = size(sized(base.model, shape))
        horizons = [ratio * counts.params_effective for ratio in tokens_per_param] + [*tokens]
        rungs += [Rung(float(f"{d * counts.flops_per_token:.3g}"), (shape,)) for d in horizons]
    return tuple(sorted(rungs, key=lambda r: r.flops))


def dial(depths: Sequence[int], aspect: float, head_dim: int) -> tuple[Shape, ...]:
    """One shape per depth, `aspect` times as wide, in whole heads."""
    return tuple(
        Shape(max(1, round(depth * aspect / head_dim)) * head_dim, depth) for depth in depths
    )


def members(sweep: Sweep) -> list[Member]:
    """Every run that the fit is made from, smallest budget first; names are unique.

    The replicates of a rung are further seeds of its middle size. Raises UserError.
    """
    if sweep.horizon.tokens and sweep.branches:
        raise UserError(
            "config.horizon.tokens: expected 0 with config.branches, got"
            f" {sweep.horizon.tokens:g}: the runs of a trunk share their batch and rate"
        )
    found = [
        Member(config, role, rung.flops)
        for rung in sweep.rungs
        for shape, seed, role in _cells(rung.shapes, rung.replicates)
        for config in _varied(sweep, shape, rung.flops, sweep.seed + seed)
    ]
    if not found:
        raise UserError("config.rungs: expected at least one rung with shapes, got none")
    for member in found:
        validate(member.config, member.name)
    names = [m.name for m in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"config.rungs: {name} would be run {names.count(name)} times")
    return found


def _cells(shapes: Sequence[Shape], replicates: int) -> Iterator[tuple[Shape, int, Role]]:
    for shape in shapes:
        yield shape, 0, "fit"
    for seed in range(1, replicates):
        yield shapes[(len(shapes) - 1) // 2], seed, "replicate"


def _varied(sweep: Sweep, shape: Shape, flops: float, seed: int) -> Iterator[Config]:
    """One config per combination of `sweep.vary`, each of this budget: its steps follow from what
    a step costs then."""
    fields = [field for field, _ in sweep.vary]
    for field in fields:
        if field.startswith("data.") and field not in ("data.seed", "data.unique_tokens"):
            raise UserError(f"config.vary: {field}: all members of a sweep read the same data")
        if field == "model.vocab_size":
            raise UserError(f"config.vary: {field}: all members of a sweep read the same tokens")
    for values in itertools.product(*(choices for _, choices in sweep.vary)):

        def put(
            config: Config, but: Sequence[str] = (), values: tuple[Any, ...] = values
        ) -> Config:
            for field, value in zip(fields, values, strict=True):
                if field not in but:
                    config = override(config, field, value, "config.vary")
            return config

        changed = at_budget(put(sweep.base), shape, flops, seed, sweep.horizon)
        changed = put(changed, _FOLLOW if sweep.horizon.tokens else ())
        marks = [f"{f.rpartition('.')[2]}={v}" for f, v in zip(fields, values, strict=True)]
        name = re.sub(r"[^\w.=+-]+", "_", "-".join([changed.name, *marks]))  # it names a folder
        yield dataclasses.replace(changed, name=name)


def holdout(sweep: Sweep, params_effective: float) -> Member:
    """The held-out run: of its candidates the one nearest (in log) to this effective size."""

    def distance(member: Member) -> float:
        return abs(math.log(size(member.config.model).params_effective / params_effective))

    return min(candidates(sweep), key=distance)


def candidates(sweep: Sweep) -> list[Member]:
    """What the held-out run may be: one member per `holdout_shapes`. Raises UserError."""
    if sweep.holdout_flops and not sweep.holdout_shapes:
        raise UserError("config.holdout_shapes: expected at least one size for the held-out run")
    found = [
        at_budget(
            sweep.base, shape, sweep.holdout_flops, sweep.seed, sweep.horizon, "holdout_shapes"
        )
        for shape in (sweep.holdout_shapes if sweep.holdout_flops else ())
    ]
    return [Member(validate(c, c.name), "holdout", sweep.holdout_flops) for c in found]
