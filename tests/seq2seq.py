"""An own objective for an encoder–decoder: rows are a source of `seq_len` / 2 tokens, then a target
as long; both end where 0 begins."""

import jax.numpy as jnp

from jaxlm.model.transformer import Source
from jaxlm.train import losses
from jaxlm.train.objectives import Example


def translate(config, params, batch, key):
    half = config.model.seq_len // 2
    source, target = batch.tokens[:, :half], batch.tokens[:, half:]
    at = jnp.broadcast_to(jnp.arange(half, dtype=jnp.int32), source.shape)
    example = Example(
        tokens=jnp.concatenate([jnp.zeros_like(target[:, :1]), target[:, :-1]], axis=1),
        targets=target,
        weights=batch.weights[:, half:],
        segment_ids=jnp.ones_like(target),
        positions=at,
        source=Source(source, at, (source != 0).astype(jnp.int32)),
    )
    return losses.cross_entropy(config, params, example, key)
