"""The compiled programs of a running batch (`slots`); each belongs to the mesh that is set."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.generate import decode
from jaxlm.generate import sampling as draws
from jaxlm.generate.sampling import Knobs, Method, Said
from jaxlm.model import transformer
from jaxlm.model.transformer import Params

CHUNKS = (16, 64, 256)  # tokens of a prompt that are read at once: the sizes compiled for


@functools.lru_cache(maxsize=64)
def forward(config: ModelConfig, visible: int, devices: Any) -> Any:
    """(laid, cache, rows_b, last_b, at_b) → what follows `last` in slot `at` of each of the rows,
    float32 [b, v], and the cache with it."""
    del devices

    def forward(
        laid: Params, cache: Any, rows_b: Any, last_b: Any, at_b: Any
    ) -> tuple[jax.Array, Any]:
        b = last_b.shape[0]
        segments = jnp.ones((b, 1), jnp.int32), jnp.ones((b, visible), jnp.int32)
        x_btd, cache = transformer.hidden_cached(
            config, laid, last_b[:, None], at_b[:, None], *segments, at_b, cache, rows_b=rows_b
        )
        return decode.last_logits(config, laid, x_btd), cache

    return jax.jit(forward, donate_argnums=(1,))


@functools.lru_cache(maxsize=64)
def reader(config: ModelConfig, visible: int, devices: Any) -> Any:
    """(laid, cache, row, tokens_t, start) → the cache with the tokens' keys and values in slots
    start … start + t of the row."""
    del devices

    def read(laid: Params, cache: Any, row: Any, tokens_t: Any, start: Any) -> Any:
        t, context = tokens_t.shape[0], cache[0][0].shape[-1] - CHUNKS[-1]
        at_bt = jnp.minimum(start + jnp.arange(t, dtype=jnp.int32), context - 1)[None]
        segments = jnp.ones((1, t), jnp.int32), jnp.ones((1, visible), jnp.int32)
        given = laid, tokens_t[None], at_bt, *segments, start[None], cache
        return transformer.hidden_cached(config, *given, rows_b=row[None])[1]

    return jax.jit(read, donate_argnums=(1,))


@functools.lru_cache(maxsize=64)
def chooser(method: Method, top: int, devices: Any) -> Any:
    """(logits_bv, rows_b, streams_b2, at_b, knobs, said, allowed_bv) → (the next ids [b], how
    likely they were [b], the `top` most likely ids and how likely they were [b, top]), said."""
    del devices

    def choose(
        logits_bv: Any, rows_b: Any, streams_b2: Any, at_b: Any, knobs: Knobs, said: Said,
        allowed_bv: Any,
    ) -> tuple[tuple[jax.Array, ...], Said]:  # fmt: skip
        own = jax.tree.map(lambda a: a[rows_b], said)
        held_bv = logits_bv if allowed_bv is None else jnp.where(allowed_bv, logits_bv, -jnp.inf)
        next_b = draws.choose(method, held_bv, streams_b2, at_b, knobs, own)
        chosen_b = draws.log_probs(logits_bv, next_b)
        best_bk, ids_bk = jax.lax.top_k(jax.nn.log_softmax(logits_bv), top)
        noted = draws.noted(own, jnp.where(jnp.isfinite(chosen_b), next_b, -1)).generated
        said = said._replace(generated=said.generated.at[rows_b].set(noted))
        return (next_b, chosen_b, ids_bk, best_bk), said

    return jax.jit(choose, donate_argnums=(5,))


@functools.lru_cache(maxsize=64)
def copier(visible: int, devices: Any) -> Any:
    """(cache, source, target) → the cache with the first slots of one row in another, too."""
    del devices

    def copy(cache: Any, source: Any, target: Any) -> Any:
        def one(a: jax.Array, slots_at: int) -> jax.Array:
            shape = [1, *a.shape[1:]]
            shape[slots_at] = visible
            part = jax.lax.dynamic_slice(a, (source, 0, 0, 0), shape)
            return jax.lax.dynamic_update_slice(a, part, (target, 0, 0, 0))

        return tuple((one(keys, 3), one(values, 2)) for keys, values in cache)

    return jax.jit(copy, donate_argnums=(0,))


@functools.lru_cache(maxsize=64)
def wiper(devices: Any) -> Any:
    """(cache, row) → the cache with zeros in the row: a slot that is not seen is still multiplied,
    by 0, which of NaN makes NaN."""
    del devices
    return jax.jit(
        lambda cache, row: jax.tree.map(lambda a: a.at[row].set(0), cache), donate_argnums=(0,)
    )


@functools.lru_cache(maxsize=64)
def noter(devices: Any) -> Any:
    """(said, row, one row's) → said."""
    del devices
    return jax.jit(
        lambda said, row, new: jax.tree.map(lambda a, x: a.at[row].set(x[0]), said, new),
        donate_argnums=(0,),
    )
