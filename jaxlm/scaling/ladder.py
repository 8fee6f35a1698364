"""From a `Sweep` to its members: sizes, steps and seeds as pure functions of the config."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxlm.config import Config, ModelConfig, Shape, Sweep, validate
from jaxlm.model.scale import size
from jaxlm.schema import UserError, override
from jaxlm.train.record import Role


@dataclass(frozen=True)
class Member:
    """One run of a sweep: what it is, and what it is for."""

    config: Config
    role: Role
    budget: float  # FLOPs

    @property
    def name(self) -> str:
        return self.config.name


def sized(model: ModelConfig, shape: Shape) -> ModelConfig:
    """`model` at another size: head width stays, the other widths keep their ratio to d_model."""
    k = model.head_dim
    if shape.d_model % k:
        near = max(k, round(shape.d_model / k) * k)
        raise UserError(
            f"config.rungs: d_model={shape.d_model} is no multiple of the head width {k};"
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


def at_budget(base: Config, shape: Shape, flops: float, seed: int) -> Config:
    """`base` at this size for this many training FLOPs, in whole dispatches of steps."""
    model = sized(base.model, shape)
    batch_tokens = base.train.global_batch_size * model.seq_len
    k = base.train.steps_per_dispatch
    steps = max(1, round(flops / (size(model).flops_per_token * batch_tokens * k))) * k
    mantissa, exponent = f"{flops:.1e}".split("e")
    name = f"c{mantissa}e{int(exponent)}-d{shape.d_model}-l{shape.n_layers}-s{seed}"
    return dataclasses.replace(
        base,
        name=name,
        seed=seed,
        model=model,
        train=dataclasses.replace(base.train, steps=steps),
    )


def members(sweep: Sweep) -> list[Member]:
    """Every run that the fit is made from, smallest budget first; names are unique.

    The replicates of a rung are further seeds of its middle size. Raises UserError.
    """
    found = [
        Member(config, role, rung.flops)
        for rung in sweep.rungs
        for shape, seed, role in _cells(rung.shapes, rung.replicates)
        for config in _varied(at_budget(sweep.base, shape, rung.flops, sweep.seed + seed), sweep)
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


def _varied(config: Config, sweep: Sweep) -> Iterator[Config]:
    """One config per combination of `sweep.vary`."""
    for values in itertools.product(*(choices for _, choices in sweep.vary)):
        changed = config
        for (field, _), value in zip(sweep.vary, values, strict=True):
            changed = override(changed, field, value, "config.vary")
        marks = [
            f"{f.rpartition('.')[2]}={v}" for (f, _), v in zip(sweep.vary, values, strict=True)
        ]
        yield dataclasses.replace(changed, name="-".join([config.name, *marks]))


def holdout(sweep: Sweep, params_effective: float) -> Member:
    """The held-out run: of its shapes the one nearest (in log) to this effective size."""

    def distance(shape: Shape) -> float:
        n = size(sized(sweep.base.model, shape)).params_effective
        return abs(math.log(n / params_effective))

    shape = min(sweep.holdout_shapes, key=distance)
    config = at_budget(sweep.base, shape, sweep.holdout_flops, sweep.seed)
    return Member(validate(config, config.name), "holdout", sweep.holdout_flops)
