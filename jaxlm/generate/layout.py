"""Weights as decoding wants them: each layer's apart, and for one row each matrix `Turned`.

One new token reads every weight once, so that memory is what a step waits for. Apart, because a
slice of a stack is copied before it is multiplied; outputs first, because a product with one vector
then reads its matrix from beginning to end; of more rows than one it is faster as it was
(docs/performance.md).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import mesh
from jaxlm.config import ModelConfig
from jaxlm.model import transformer
from jaxlm.model.transformer import Declared, Params
from jaxlm.model.turned import joined, turned


def laid_out(config: ModelConfig, params: Params, rows: int = 1, bits: int = 32) -> Params:
    """`params` with "layers" a tuple of trees, for batches of so many rows, in 32 bits, 8 or 4; as
    they are where they have been laid out already. All but the layers are the same arrays."""
    if isinstance(params["layers"], tuple):
        return params
    return {**params, "layers": _apart(config, rows == 1, bits, params["layers"])}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _apart(config: ModelConfig, one_row: bool, bits: int, layers: Params) -> tuple[Params, ...]:
    table = transformer.table(config)["layers"]

    def one(row: Declared, w: jax.Array) -> Any:
        axes = row.axes[1:]  # without "layers"
        other = {"experts", "routes"} & set(axes)
        if row.role != "hidden" or len(axes) < 2 or other or config.layer:
            return w
        return turned(w, axes, bits)

    # Keys and values of few heads are matrices too small to be read at the memory's speed.
    few = config.kv_heads < config.n_heads and mesh.parts("heads") == 1 and not config.layer

    def layer(i: int) -> Params:
        own = jax.tree.map(lambda w: w[i], layers)
        if not one_row and bits == 32:
            return own
        own = jax.tree.map(one, table, own)
        return _joined(own) if few else own

    return tuple(layer(i) for i in range(config.n_layers))


def _joined(layer: Params) -> Params:
    """The queries', keys' and values' matrices as one, head after head, in the queries' place."""
    attention = layer["attention"]
    one = joined([attention[name] for name in ("query", "key", "value")])
    nothing = jnp.zeros(())
    return {**layer, "attention": {**attention, "query": one, "key": nothing, "value": nothing}}
