"""Losses: pure functions (config, params, batch, key) -> (loss summed over weights, sums).

The train step divides by the batch's total weight, so micro-batches and devices add up exactly.
`train.objective = 'file.py:function'` brings another one with this signature.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.config import Config, ModelConfig
from jaxlm.data.loader import Batch
from jaxlm.mesh import spec
from jaxlm.model import transformer
from jaxlm.model.transformer import Params
from jaxlm.train.objectives import Example

Sums = dict[str, jax.Array]


def cross_entropy(
    config: Config, params: Params, example: Example, key: jax.Array
) -> tuple[jax.Array, Sums]:
    """Cross-entropy of the targets in nats, summed over weights, plus z_loss · log(Z)², plus the
    losses of a mixture of experts times the weights' sum. Drops where `model.dropout` says so."""
    x_btd, sums = hidden(config.model, params, example, key if config.model.dropout else None)
    nll_bt, log_z_bt = token_losses(config.model, params, x_btd, example.targets)
    loss = jnp.sum(nll_bt * example.weights)
    if config.train.z_loss:
        loss = loss + config.train.z_loss * jnp.sum(jnp.square(log_z_bt) * example.weights)
    if not sums:
        return loss, {}
    total, moe = jnp.sum(example.weights), config.model.moe
    sums = {name: total * value for name, value in sums.items()}
    if moe.n_experts:
        loss = loss + moe.balance_loss * sums["moe/balance"]
        loss = loss + moe.router_z_loss * sums["moe/router_z"]
    return loss, sums


def next_token(
    config: Config, params: Params, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Sums]:
    """`cross_entropy` of the token after each token."""
    return cross_entropy(config, params, Example(*batch[:5]), key)


def hidden(
    config: ModelConfig, params: Params, example: Example, key: jax.Array | None = None
) -> tuple[jax.Array, Sums]:
    """Final hidden states of an example, and the means of what layers report."""
    return transformer.hidden_and_sums(
        config, params, example.tokens, example.positions, example.segment_ids,
        source=example.source, prefix_bt=example.prefix, key=key,
    )  # fmt: skip


def token_losses(
    config: ModelConfig, params: Params, x_btd: jax.Array, targets_bt: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood and log Z, float32 [b, t], of each target."""
    logits_btv = transformer.logits(config, params, x_btd)
    targets_bt = jax.reshard(targets_bt, spec(("batch", "seq")))
    log_z_bt = jax.nn.logsumexp(logits_btv, axis=-1)
    # A comparison instead of a gather: it also works, and stays local, when vocab is sharded.
    hit_btv = targets_bt[..., None] == jnp.arange(logits_btv.shape[-1], dtype=targets_bt.dtype)
    target_bt = jnp.sum(jnp.where(hit_btv, logits_btv, 0.0), axis=-1)
    return log_z_bt - target_bt, log_z_bt
