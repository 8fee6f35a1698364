"""What one model makes of another's examples, computed once and kept beside them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import mesh
from jaxlm.config import ModelConfig
from jaxlm.data.examples import Examples
from jaxlm.data.loader import Batch
from jaxlm.model import transformer
from jaxlm.train.losses import hidden, token_losses
from jaxlm.train.objectives import Example

ROWS = 8  # at a time


def log_p(config: ModelConfig, params: Any, some: Examples) -> list[np.ndarray]:
    """Of each example, float32 [t, 1]: log p of its targets. The mesh of `params` must be set."""
    return _of_each(_log_p(config, jax.sharding.get_mesh()), params, some)


def likeliest(config: ModelConfig, params: Any, some: Examples, k: int) -> list[np.ndarray]:
    """Of each example, float32 [t, 2 k]: the ids and logits of the `k` likeliest next tokens."""
    k = min(k, config.vocab_size)
    return _of_each(_likeliest(config, k, jax.sharding.get_mesh()), params, some)


def _of_each(run: Any, params: Any, some: Examples) -> list[np.ndarray]:
    found: list[Any] = [None] * len(some.ids)
    for first in range(0, len(some), ROWS):
        numbers = [min(first + i, len(some) - 1) for i in range(ROWS)]
        batch = Batch(*some.windows(np.array(numbers))[:5])
        out_btk = np.asarray(run(params, mesh.put_batch(batch, jax.sharding.get_mesh())))
        for number, row_tk in zip(numbers, out_btk, strict=True):
            at = 0
            for i in some.rows[number]:
                found[i] = row_tk[at : at + len(some.ids[i])]
                at += len(some.ids[i])
    return found


@functools.lru_cache(maxsize=8)
def _log_p(config: ModelConfig, devices: Any) -> Any:
    del devices  # part of the key: traced for the mesh that is set

    def run(params: Any, batch: Batch) -> jax.Array:
        x_btd, _ = hidden(config, params, Example(*batch))
        return -token_losses(config, params, x_btd, batch.targets)[0][..., None]

    return jax.jit(run)


@functools.lru_cache(maxsize=8)
def _likeliest(config: ModelConfig, k: int, devices: Any) -> Any:
    del devices

    def run(params: Any, batch: Batch) -> jax.Array:
        x_btd, _ = hidden(config, params, Example(*batch))
        logits_btv = transformer.logits(config, params, x_btd)
        whole_btv = jax.reshard(logits_btv, mesh.spec(("batch", "seq", None)))
        logits_btk, ids_btk = jax.lax.top_k(whole_btv, k)
        return jnp.concatenate([ids_btk.astype(jnp.float32), logits_btk], axis=-1)

    return jax.jit(run)
