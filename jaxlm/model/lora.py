"""Low-rank adapters (Hu et al. 2022): W + (alpha / rank) · A B, as functions on trees.

A tree of adapters has at each chosen weight's place {"a": [.., inputs, rank], "b": [.., rank,
outputs]}. Several trees stacked on a leading axis run at once by `jax.vmap` of a model over
`merged`.
"""

from __future__ import annotations

import functools
import math
import string
from typing import Any

import jax
import jax.numpy as jnp
from flax.nnx import traversals

from jaxlm.config import ModelConfig
from jaxlm.model import transformer
from jaxlm.model.transformer import Declared, Params
from jaxlm.schema import UserError, hint
from jaxlm.tune_config import LoraConfig

Path = tuple[str, ...]


@functools.lru_cache(maxsize=64)
def chosen(config: ModelConfig, lora: LoraConfig) -> dict[Path, Declared]:
    """The weights that get an adapter. Raises UserError for a name that none has."""
    rows = traversals.flatten_mapping(transformer.table(config))
    matrices = {p: r for p, r in rows.items() if r.role == "hidden" and "layers" in r.axes}
    names = {path[-1] for path in matrices} | {"hidden"}
    for name in lora.on:
        if name not in names:
            raise UserError(f"config.tune.lora.on: no weight {name!r}; {hint(name, sorted(names))}")
    return {p: r for p, r in matrices.items() if p[-1] in lora.on or "hidden" in lora.on}


def table(config: ModelConfig, lora: LoraConfig) -> dict[str, Any]:
    """A `Declared` for each half of each adapter."""
    found: dict[Path, Declared] = {}
    for path, row in chosen(config, lora).items():
        inputs, outputs = row.sides
        many = tuple(range(inputs[0]))
        n_in = math.prod(row.shape[i] for i in inputs)

        def half(axes: tuple[int, ...], at: int, std: float, row: Declared = row) -> Declared:
            shape = [row.shape[i] for i in axes]
            names = [row.axes[i] for i in axes]
            shape.insert(at, lora.rank)
            names.insert(at, "rank")
            return Declared(tuple(shape), tuple(names), "hidden", std, row.active)

        found[*path, "a"] = half((*many, *inputs), len(many) + len(inputs), n_in**-0.5)
        found[*path, "b"] = half((*many, *outputs), len(many), 0.0)
    return traversals.unflatten_mapping(found)


def init(config: ModelConfig, lora: LoraConfig, key: jax.Array) -> Params:
    """A drawn from N(0, 1/inputs), B zero: at first nothing changes."""
    rows = traversals.flatten_mapping(table(config, lora))
    keys = jax.random.split(key, len(rows))

    def make(row: Declared, key: jax.Array) -> jax.Array:
        return jax.reshard(row.std * jax.random.normal(key, row.shape, jnp.float32), row.spec)

    made = {p: make(row, k) for (p, row), k in zip(rows.items(), keys, strict=True)}
    return traversals.unflatten_mapping(made)


def merged(config: ModelConfig, lora: LoraConfig, params: Params, adapters: Params) -> Params:
    """`params` with each chosen weight W as W + (alpha / rank) · A B."""
    flat = dict(traversals.flatten_mapping(params))
    pairs = traversals.flatten_mapping(adapters)
    for path, row in chosen(config, lora).items():
        inputs, outputs = row.sides
        letters = string.ascii_lowercase[: len(row.shape)]
        many, i, o = letters[: inputs[0]], letters[inputs[0] : outputs[0]], letters[outputs[0] :]
        product = jnp.einsum(
            f"{many}{i}z,{many}z{o}->{letters}", pairs[*path, "a"], pairs[*path, "b"],
            out_sharding=row.spec,
        )  # fmt: skip
        flat[path] = flat[path] + (lora.alpha / lora.rank) * product
    return traversals.unflatten_mapping(flat)
