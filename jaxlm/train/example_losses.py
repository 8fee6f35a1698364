"""Losses of labelled examples, with the signature of `losses`; nothing in them is corrupted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config import Config
from jaxlm.data.loader import Batch
from jaxlm.data.windows import TaughtBatch
from jaxlm.mesh import spec
from jaxlm.model import transformer
from jaxlm.model.transformer import Params
from jaxlm.train.losses import Sums, hidden, token_losses
from jaxlm.train.objectives import Example


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
    """What a classifier says, float32: of each text [b, 1, classes], or token [b, t, classes]."""
    x_btd = _states(config, params, batch, key)
    y = transformer.pooled(config.model, params, x_btd, batch.segment_ids)
    return y if config.model.pooling == "each" else y[:, None]


def preference(
    config: Config, params: Params, batch: TaughtBatch, key: jax.Array
) -> tuple[jax.Array, Sums]:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7): -log sigmoid of beta times how
    much more likely the model than the reference holds the chosen answer than the other one.

    A row is a pair: segment 1 the chosen text, segment 2 the other; `beside` [b, t, 2] has the
    reference's log p of each target, and 1 where the target is part of the answer. Also sums how
    many pairs are told rightly, and the margins in nats."""
    x_btd = _states(config, params, batch, key)
    nll_bt, _ = token_losses(config.model, params, x_btd, batch.targets)
    gain_bt = (-nll_bt - batch.beside[..., 0]) * batch.beside[..., 1]
    sign_bt = jnp.where(batch.segment_ids == 1, 1.0, -1.0)
    margin_b = jnp.sum(gain_bt * sign_bt, axis=1)
    weights_b = batch.weights.sum(axis=1)
    loss = -jnp.sum(jax.nn.log_sigmoid(config.tune.beta * margin_b) * weights_b)
    right = jnp.sum((margin_b > 0) * weights_b)
    return loss, {"train/accuracy": right, "train/margin": jnp.sum(margin_b * weights_b)}


def _states(config: Config, params: Params, batch: Any, key: jax.Array | None) -> jax.Array:
    """Final hidden states; nothing is dropped without a key."""
    key = key if config.model.dropout else None
    return hidden(config.model, params, Example(*batch[:5]), key)[0]


def distill(
    config: Config, params: Params, batch: TaughtBatch, key: jax.Array
) -> tuple[jax.Array, Sums]:
    """The divergence of the model from its teacher (Hinton et al. 2015, §2), temperature² times
    KL(teacher, model) at that temperature, over the teacher's likeliest tokens: `beside` [b, t, 2k]
    has their ids and logits; weighed by `teacher_share`, and the plain loss by the rest. Also sums
    the plain loss, as train/nll."""
    tau, k = config.tune.temperature, batch.beside.shape[-1] // 2
    ids_btk, theirs_btk = batch.beside[..., :k].astype(jnp.int32), batch.beside[..., k:]
    x_btd = _states(config, params, batch, key)
    logits_btv = transformer.logits(config.model, params, x_btd)
    logits_btv = jax.reshard(logits_btv, spec(("batch", "seq", None)))
    ours_btv = jax.nn.log_softmax(logits_btv / tau)
    ours_btk = jnp.take_along_axis(ours_btv, ids_btk, axis=-1)
    log_p_btk = jax.nn.log_softmax(theirs_btk / tau)
    kl_bt = jnp.sum(jnp.exp(log_p_btk) * (log_p_btk - ours_btk), axis=-1)
    plain = jax.nn.log_softmax(logits_btv)
    nll_bt = -jnp.take_along_axis(plain, batch.targets[..., None], axis=-1)[..., 0]
    share, nll = config.tune.teacher_share, jnp.sum(nll_bt * batch.weights)
    loss = share * tau**2 * jnp.sum(kl_bt * batch.weights) + (1.0 - share) * nll
    return loss, {"train/nll": nll}


OF_EXAMPLES: dict[str, Callable[..., tuple[jax.Array, Sums]]] = {
    "classify": classify,
    "regress": regress,
    "preference": preference,
    "distill": distill,
}
"""Objectives of labelled examples, which are never corrupted."""
