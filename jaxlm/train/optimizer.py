"""optax chains and schedules whose numbers are arrays, so that one program serves many members."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from jaxlm.config import Config, OptimizerConfig
from jaxlm.model.scale import MATRICES, by_role, learning_rate_multipliers
from jaxlm.model.transformer import Declared
from jaxlm.pyfile import is_reference, resolve
from jaxlm.schema import UserError, hint
from jaxlm.train.parameters import moving


class Hyper(NamedTuple):
    """What may differ between runs of one compiled program; float32 scalars but for the seed."""

    seed: Any  # int32
    learning_rate: Any
    weight_decay: Any
    steps: Any
    warmup_steps: Any
    decay_steps: Any
    final_fraction: Any


def hyper(config: Config) -> Hyper:
    """The numbers of one run, shares turned into steps."""
    o, steps = config.optimizer, config.train.steps
    f32 = np.float32
    warmup = round(o.warmup_fraction * steps)
    return Hyper(
        seed=np.int32(config.seed),
        learning_rate=f32(o.learning_rate),
        weight_decay=f32(o.weight_decay),
        steps=f32(steps),
        warmup_steps=f32(warmup),
        # Rounding of the two shares must not let the decay begin within the warm-up.
        decay_steps=f32(max(1, min(round(o.decay_fraction * steps), steps - warmup))),
        final_fraction=f32(o.final_fraction),
    )


# ------------------------------------------------------------------------------------- schedules


def _constant(done: jax.Array, h: Hyper) -> jax.Array:
    return jnp.ones_like(done)


def _linear(done: jax.Array, h: Hyper) -> jax.Array:
    return 1.0 - (1.0 - h.final_fraction) * done


def _cosine(done: jax.Array, h: Hyper) -> jax.Array:
    return h.final_fraction + (1.0 - h.final_fraction) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))


def _wsd(done: jax.Array, h: Hyper) -> jax.Array:
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM §4), with a linear decay."""
    left = (1.0 - done) * jnp.maximum(h.steps - h.warmup_steps, 1.0)
    return jnp.clip(left / h.decay_steps, 0.0, 1.0) * (1.0 - h.final_fraction) + h.final_fraction


SCHEDULES = {"constant": _constant, "linear": _linear, "cosine": _cosine, "wsd": _wsd}


def learning_rate(config: OptimizerConfig, h: Hyper, step: jax.Array) -> jax.Array:
    """Learning rate of update number `step` (0 first): linear warm-up, then the schedule.

    A schedule maps the share of steps done after warm-up (0 … 1) and the Hyper to a factor;
    'file.py:function' brings another with the same signature.
    """
    after = _named(config.schedule, SCHEDULES, "config.optimizer.schedule")
    step = step.astype(jnp.float32)
    warm = jnp.minimum(1.0, (step + 1.0) / jnp.maximum(h.warmup_steps, 1.0))
    done = jnp.clip((step - h.warmup_steps) / jnp.maximum(h.steps - h.warmup_steps, 1.0), 0.0, 1.0)
    return h.learning_rate * warm * after(done, h)


# ------------------------------------------------------------------------------------ optimizers


def _adam(config: Config) -> optax.GradientTransformation:
    """Adam's direction (Kingma & Ba 2015), matrices scaled as the parametrisation says."""
    o, multipliers = config.optimizer, learning_rate_multipliers(config.model, rows=moving(config))
    return optax.chain(
        optax.scale_by_adam(o.b1, o.b2, o.eps),
        optax.stateless(lambda u, _: jax.tree.map(lambda a, m: a * m, u, multipliers)),
    )


def _muon(config: Config) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for hidden matrices, Adam for the rest.

    Orthogonalised updates get an RMS of 0.2 (Liu et al. 2025, eq. 4), so that one learning rate
    serves both. Under muP and CompleteP they shrink as 1/√width, which keeps their spectral norm.
    """
    o, rows = config.optimizer, moving(config)
    is_row = {"is_leaf": lambda x: isinstance(x, Declared)}
    role = jax.tree.map(lambda row: "muon" if row.role == "hidden" else "adam", rows, **is_row)
    axes = jax.tree.map(_matrix_axes, rows, **is_row)

    def scale(row: Declared, axes: Any, multiplier: float) -> float:
        if row.role != "hidden":
            return multiplier
        sides = [math.prod(row.shape[i] for i in side) for side in axes]
        return 0.2 * max(sides) ** 0.5 * multiplier

    multipliers = learning_rate_multipliers(config.model, 0.5, rows)
    scales = jax.tree.map(scale, rows, axes, multipliers, **is_row)
    return optax.chain(
        optax.partition(
            {
                "muon": optax.contrib.scale_by_muon(
                    beta=o.muon_momentum, eps=o.eps, weight_dimension_numbers=axes
                ),
                "adam": optax.scale_by_adam(o.b1, o.b2, o.eps),
            },
            role,
        ),
        optax.stateless(lambda u, _: jax.tree.map(lambda a, m: a * m, u, scales)),
    )


def _matrix_axes(row: Declared) -> Any:
    """Which axes of a hidden matrix are its input and which its output (the rest: many matrices);
    other parameters are masked."""
    if row.role != "hidden":
        return optax.MaskedNode()
    return optax.contrib.MuonDimensionNumbers(*row.sides)


OPTIMIZERS = {"adamw": _adam, "muon": _muon}


def transform(config: Config, weight_decay: Any, rate: Any) -> optax.GradientTransformation:
    """Clip, direction, decoupled decay of matrices, step; `weight_decay` and `rate` may be traced.

    'file.py:function' brings another direction: (Config) -> optax.GradientTransformation.
    """
    o = config.optimizer
    direction = _named(o.name, OPTIMIZERS, "config.optimizer.name")(config)
    if o.name != "adamw":
        direction = _any_layout(direction)
    clip = optax.clip_by_global_norm(o.grad_clip) if o.grad_clip else optax.identity()
    matrices = by_role(config.model, MATRICES, moving(config))
    decay = optax.add_decayed_weights(weight_decay, mask=matrices)
    return optax.chain(clip, direction, decay, optax.scale(-rate))


def _any_layout(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx`, what it computes inside laid out by the compiler: products along a sharded axis, such
    as x·xᵀ in optax's Newton–Schulz, have no rule under Explicit axes (not even at 1×1×1)."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if jax.sharding.get_abstract_mesh().are_all_axes_manual:
            return tx.update(grads, state, params)
        layouts = jax.tree.map(lambda x: jax.typeof(x).sharding, (grads, state))
        return jax.sharding.auto_axes(tx.update, out_sharding=layouts)(grads, state, params)

    return optax.GradientTransformation(tx.init, update)


def check_names(config: OptimizerConfig) -> None:
    """Raises UserError where the optimizer or the schedule does not exist."""
    _named(config.name, OPTIMIZERS, "config.optimizer.name")
    _named(config.schedule, SCHEDULES, "config.optimizer.schedule")


def _named(name: str, known: dict[str, Any], where: str) -> Any:
    if is_reference(name):
        return resolve(name, where)
    if name not in known:
        raise UserError(f"{where}: no {name!r}; {hint(name, known)}, or 'file.py:function'")
    return known[name]
