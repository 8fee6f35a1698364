"""Whole texts through a model: rows of about one length on the mesh, and what one pass gives."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import mesh
from jaxlm.config import ModelConfig
from jaxlm.data.loader import Batch
from jaxlm.generate import decode
from jaxlm.model import transformer
from jaxlm.model.transformer import Params

ROWS = 32  # texts at a time
LOGITS = 1 << 27  # and of them at most so many float32 at a time


@dataclass(frozen=True)
class Pooling:
    """How token states become one vector, as sentence-transformers' files say."""

    first: bool = False  # the first token's state ([CLS]); else the mean over tokens
    normalize: bool = False  # to length 1
    max_tokens: int | None = None  # longer texts are cut, as they were in training


def buckets(lengths: Sequence[int], vocab: int = 1) -> list[tuple[list[int], int]]:
    """Rows of about one length, as many as `ROWS` and `LOGITS` allow, and the power of two that
    holds them."""
    groups: dict[int, list[int]] = {}
    for i, n in enumerate(lengths):
        groups.setdefault(decode.slots(n), []).append(i)
    found = []
    for whole, rows in sorted(groups.items()):
        n = min(ROWS, max(1, LOGITS // (whole * vocab)))
        found += [(rows[i : i + n], whole) for i in range(0, len(rows), n)]
    return found


def _padded(ids: Sequence[np.ndarray], t: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments (0: padding), int32 [rows, t], padded on the right."""
    tokens, segments = np.zeros((rows, t), np.int32), np.zeros((rows, t), np.int32)
    for i, row in enumerate(ids):
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
    return tokens, segments


def placed(ids: Sequence[np.ndarray], devices: jax.sharding.Mesh) -> tuple[Any, Any]:
    """Tokens and segments on the mesh, both sizes rounded up."""
    parts = mesh.parts("batch")
    rows = -(-len(ids) // parts) * parts
    padded = _padded(ids, decode.slots(max(map(len, ids))), rows)
    return mesh.put_batch(padded, devices)


def scored(ids: Sequence[np.ndarray], starts: Sequence[int], t: int) -> Batch:
    """Each token from its row's start on as a target, weight 1."""
    tokens, segments = _padded([i[:-1] for i in ids], t, len(ids))
    targets, _ = _padded([i[1:] for i in ids], t, len(ids))
    at = np.arange(t, dtype=np.int32)
    weights = (at + 1 >= np.array(starts)[:, None]) & (segments > 0)
    positions = np.broadcast_to(at, tokens.shape)
    return Batch(tokens, targets, weights.astype(np.float32), segments, positions)


# ---------------------------------------------------------------------------------------- programs
#
# Jitted (params, tokens_bt, segments_bt) → what they are called after.


@functools.lru_cache(maxsize=32)
def logits(config: ModelConfig, devices: Any) -> Any:
    """Float32 [b, t, v]."""
    del devices  # part of the key: traced for the mesh that is set

    def run(params: Params, tokens_bt: jax.Array, segments_bt: jax.Array) -> jax.Array:
        return transformer.apply(config, params, tokens_bt, None, segments_bt)

    return jax.jit(run)


@functools.lru_cache(maxsize=32)
def embedded(config: ModelConfig, pooling: Pooling, devices: Any) -> Any:
    """One float32 vector for each text [b, d]."""
    del devices

    def run(params: Params, tokens_bt: jax.Array, segments_bt: jax.Array) -> jax.Array:
        at_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1], dtype=jnp.int32), tokens_bt.shape)
        x_btd = transformer.hidden(config, params, tokens_bt, at_bt, segments_bt)
        x_btd = x_btd.astype(jnp.float32)
        if pooling.first:
            y_bd = x_btd[:, 0]
        else:
            kept_bt = (segments_bt > 0).astype(jnp.float32)
            n_b1 = jnp.maximum(kept_bt.sum(1, keepdims=True), 1.0)
            y_bd = jnp.einsum("btd,bt->bd", x_btd, kept_bt) / n_b1
        if pooling.normalize:
            y_bd = y_bd / jnp.maximum(jnp.linalg.norm(y_bd, axis=-1, keepdims=True), 1e-12)
        return y_bd

    return jax.jit(run)


@functools.lru_cache(maxsize=32)
def classified(config: ModelConfig, devices: Any) -> Any:
    """Logits of classes [b, c]; of a model that reads each token, [b, t, c]."""
    del devices

    def run(params: Params, tokens_bt: jax.Array, segments_bt: jax.Array) -> jax.Array:
        at_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1], dtype=jnp.int32), tokens_bt.shape)
        x_btd = transformer.hidden(config, params, tokens_bt, at_bt, segments_bt)
        return transformer.pooled(config, params, x_btd, segments_bt)

    return jax.jit(run)


@functools.lru_cache(maxsize=8)
def inspected(config: ModelConfig, devices: Any) -> Any:
    """Attention's weights [l, b, h, t, t], and logits [b, t, v] or None without a head."""
    del devices

    def run(params: Params, tokens_bt: jax.Array, segments_bt: jax.Array) -> tuple[Any, Any]:
        t = tokens_bt.shape[1]
        where_bt = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), tokens_bt.shape)
        x_btd, maps = transformer.attention_maps(config, params, tokens_bt, where_bt, segments_bt)
        says = config.architecture == "decoder" or config.mlm_head
        return maps, transformer.logits(config, params, x_btd) if says else None

    return jax.jit(run)
