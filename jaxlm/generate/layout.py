"""Weights as decoding wants them: each layer's apart, each matrix with its outputs first.

One new token reads every weight once, so that memory is what a step waits for. Apart, because a
slice of a stack is copied before it is multiplied; outputs first, because then a product with one
vector reads its matrix from beginning to end.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.model import transformer
from jaxlm.model.transformer import Declared, Params


def laid_out(config: ModelConfig, params: Params) -> Params:
    """`params` with "layers" a tuple of trees, matrices turned. `restored` undoes the turning; what
    the decoder of an encoder–decoder does not use (its encoder) stays as it is."""
    rows = transformer.table(config)["layers"]
    turned = jax.tree.map(lambda row, w: _turn(row, w, 1), rows, params["layers"])
    layers = tuple(jax.tree.map(lambda w, i=i: w[i], turned) for i in range(config.n_layers))
    return {**params, "layers": layers}


def restored(config: ModelConfig, laid: Params) -> Params:
    """Matrices turned back, for `transformer.hidden_cached`. Call it where the product is (in the
    body of a loop): the compiler then makes the turning part of the product."""
    rows = transformer.table(config)["layers"]
    back = tuple(
        jax.tree.map(lambda row, w: _turn(row, w, -1), rows, one) for one in laid["layers"]
    )
    return {**laid, "layers": back}


def _turn(row: Declared, w: jax.Array, by: int) -> jax.Array:
    """A matrix with its input axes last (`by` 1, in a stack) or back again (-1, one layer's)."""
    axes = row.axes[1:]  # without "layers"
    if row.role != "hidden" or "experts" in axes or len(axes) < 2:
        return w
    inputs = 1 if axes[0] == "d_model" else len(axes) - 1
    if by < 0:
        return jnp.moveaxis(w, range(len(axes) - inputs, len(axes)), range(inputs))
    return jnp.moveaxis(w, range(1, 1 + inputs), range(1 + len(axes) - inputs, 1 + len(axes)))
