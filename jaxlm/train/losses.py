"""Objectives: pure functions (config, params, batch, key) -> (loss summed over weights, sums).

The train step divides by the batch's total weight, so micro-batches and devices add up exactly.
`train.objective = 'file.py:function'` brings another one with this signature.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.config import Config, ModelConfig
from jaxlm.data.loader import Batch
from jaxlm.model import transformer
from jaxlm.model.transformer import Params

Sums = dict[str, jax.Array]


def next_token(
    config: Config, params: Params, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Sums]:
    """Cross-entropy of the next token in nats, summed over weights, plus z_loss · log(Z)²."""
    x_btd, sums = transformer.hidden_and_sums(
        config.model, params, batch.tokens, batch.positions, batch.segment_ids,
        key=key if config.model.dropout else None,
    )  # fmt: skip
    return summed(config, params, x_btd, sums, batch.targets, batch.weights)


def summed(
    config: Config,
    params: Params,
    x_btd: jax.Array,
    sums: Sums,
    targets_bt: jax.Array,
    weights_bt: jax.Array,
) -> tuple[jax.Array, Sums]:
    """Cross-entropy and z-loss of final hidden states, and what the layers add to it, summed over
    weights. `sums` are means, as from `transformer.hidden_and_sums`; they come back as sums."""
    nll_bt, log_z_bt = token_losses(config.model, params, x_btd, targets_bt)
    loss = jnp.sum(nll_bt * weights_bt)
    if config.train.z_loss:
        loss = loss + config.train.z_loss * jnp.sum(jnp.square(log_z_bt) * weights_bt)
    if not sums:
        return loss, {}
    total, moe = jnp.sum(weights_bt), config.model.moe
    sums = {name: total * value for name, value in sums.items()}
    if moe.n_experts:
        loss = loss + moe.balance_loss * sums["moe/balance"]
        loss = loss + moe.router_z_loss * sums["moe/router_z"]
    return loss, sums


def token_losses(
    config: ModelConfig, params: Params, x_btd: jax.Array, targets_bt: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood and log Z, float32 [b, t], of each target."""
    logits_btv = transformer.logits(config, params, x_btd)
    log_z_bt = jax.nn.logsumexp(logits_btv, axis=-1)
    # A comparison instead of a gather: it also works, and stays local, when vocab is sharded.
    hit_btv = targets_bt[..., None] == jnp.arange(logits_btv.shape[-1], dtype=targets_bt.dtype)
    target_bt = jnp.sum(jnp.where(hit_btv, logits_btv, 0.0), axis=-1)
    return log_z_bt - target_bt, log_z_bt
