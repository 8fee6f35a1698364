"""Losses: pure functions (config, params, batch, key) -> (loss summed over weights, sums).

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


def classify(
    config: Config, params: Params, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Sums]:
    """Cross-entropy of classes: `targets` where `weights` are, of a whole text at its first place.
    Also sums how many are right."""
    logits_btc = outputs(config, params, batch, key)
    t = logits_btc.shape[1]
    targets_bt, weights_bt = batch.targets[:, :t], batch.weights[:, :t]
    hit_btc = targets_bt[..., None] == jnp.arange(logits_btc.shape[-1])
    right_bt = jnp.sum(jnp.where(hit_btc, logits_btc, 0.0), axis=-1)
    nll_bt = jax.nn.logsumexp(logits_btc, axis=-1) - right_bt
    said_bt = jnp.argmax(logits_btc, axis=-1) == targets_bt
    return jnp.sum(nll_bt * weights_bt), {"train/accuracy": jnp.sum(said_bt * weights_bt)}


def regress(config: Config, params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
    """Squared error of one number: `targets` (float32) at the first place of a text."""
    y_bt = outputs(config, params, batch, key)[..., 0]
    t = y_bt.shape[1]
    return jnp.sum(jnp.square(y_bt - batch.targets[:, :t]) * batch.weights[:, :t]), {}


def outputs(config: Config, params: Params, batch: Batch, key: jax.Array | None) -> jax.Array:
    """What a classifier says of each text, float32 [b, 1, classes], or each token [b, t, classes];
    nothing is dropped without a key."""
    key = key if config.model.dropout else None
    x_btd, _ = hidden(config.model, params, Example(*batch[:5]), key)
    y = transformer.pooled(config.model, params, x_btd, batch.segment_ids)
    return y if config.model.pooling == "each" else y[:, None]


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
    log_z_bt = jax.nn.logsumexp(logits_btv, axis=-1)
    # A comparison instead of a gather: it also works, and stays local, when vocab is sharded.
    hit_btv = targets_bt[..., None] == jnp.arange(logits_btv.shape[-1], dtype=targets_bt.dtype)
    target_bt = jnp.sum(jnp.where(hit_btv, logits_btv, 0.0), axis=-1)
    return log_z_bt - target_bt, log_z_bt


OF_EXAMPLES = {"classify": classify, "regress": regress}
"""Objectives of labelled examples, which are never corrupted."""
