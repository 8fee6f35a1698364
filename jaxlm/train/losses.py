"""Objectives: pure functions (config, params, batch, key) -> (loss summed over weights, sums).

The train step divides by the batch's total weight, so micro-batches and devices add up exactly.
`train.objective = 'file.py:function'` brings another one with this signature.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.config import Config
from jaxlm.data.loader import Batch
from jaxlm.model import transformer
from jaxlm.model.transformer import Params

Sums = dict[str, jax.Array]


def next_token(
    config: Config, params: Params, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Sums]:
    """Cross-entropy of the next token in nats, summed over weights, plus z_loss · log(Z)²."""
    del key
    x_btd = transformer.hidden(
        config.model, params, batch.tokens, batch.positions, batch.segment_ids
    )
    w_vd = transformer.unembedding(config.model, params).astype(x_btd.dtype)
    nll_bt, log_z_bt = token_losses(x_btd, w_vd, batch.targets)
    loss = jnp.sum(nll_bt * batch.weights)
    if config.train.z_loss:
        loss = loss + config.train.z_loss * jnp.sum(jnp.square(log_z_bt) * batch.weights)
    return loss, {}


def token_losses(
    x_btd: jax.Array, w_vd: jax.Array, targets_bt: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood and log Z, float32 [b, t], of each target."""
    logits_btv = jnp.einsum("btd,vd->btv", x_btd, w_vd, preferred_element_type=jnp.float32)
    log_z_bt = jax.nn.logsumexp(logits_btv, axis=-1)
    # A comparison instead of a gather: it also works, and stays local, when vocab is sharded.
    hit_btv = targets_bt[..., None] == jnp.arange(logits_btv.shape[-1], dtype=targets_bt.dtype)
    target_bt = jnp.sum(jnp.where(hit_btv, logits_btv, 0.0), axis=-1)
    return log_z_bt - target_bt, log_z_bt
