"""Loss, perplexity and bits per byte on held-out text."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import mesh
from jaxlm.config import Config, ModelConfig
from jaxlm.data import loader
from jaxlm.data.loader import Batch
from jaxlm.model import transformer
from jaxlm.train.loop import Observer
from jaxlm.train.losses import token_losses

ROWS = 32  # sequences at a time


def heldout(dataset: loader.Dataset, sequences: int) -> Observer:
    """An observer that logs eval/loss (nats per token), eval/perplexity and eval/bpb.

    The same evenly spaced windows of the eval split for every run; bits per byte counts the bytes
    of text that the targets stand for (an end of text costs its nats and stands for none).
    """
    batch, target_bytes = loader.eval_batch(dataset, sequences)
    n_bytes = int(target_bytes.sum())

    def observe(config: Config, params: Any, step: int) -> list[dict[str, Any]]:
        nats, weight = total_nats(config.model, params, batch)
        loss = nats / weight
        return [
            {
                "step": step,
                "eval/loss": loss,
                "eval/perplexity": math.exp(min(loss, 700.0)),
                "eval/bpb": nats / math.log(2) / n_bytes,
            }
        ]

    return observe


def total_nats(config: ModelConfig, params: Any, batch: Batch) -> tuple[float, float]:
    """Σ weights · negative log-likelihood, and Σ weights, of [n, t] sequences; sums in float64."""
    nats_nt = token_nats(config, params, batch)
    return float(nats_nt.sum()), float(np.asarray(batch.weights, np.float64).sum())


def token_nats(config: ModelConfig, params: Any, batch: Batch) -> np.ndarray:
    """Float64 [n, t]: weights · negative log-likelihood of the targets."""
    n = batch.tokens.shape[0]
    devices = jax.sharding.get_mesh()
    rows = min(ROWS, n)
    rows += -rows % math.prod(devices.shape[a] for a in ("data", "fsdp"))
    whole = -(-n // rows) * rows
    padded = jax.tree.map(lambda x: np.pad(x, ((0, whole - n), (0, 0))), batch)
    parts = jax.tree.map(lambda x: x.reshape(-1, rows, x.shape[-1]), padded)
    nll = _losses(config, devices)(params, mesh.put_batch(parts, devices, leading=1))
    weights = np.asarray(parts.weights, np.float64)
    return (np.asarray(nll, np.float64) * weights).reshape(whole, -1)[:n]


@functools.lru_cache(maxsize=32)
def _losses(config: ModelConfig, devices: Any) -> Any:
    del devices  # part of the key: traced for the mesh that is set

    def losses(params: Any, parts: Batch) -> jax.Array:
        def some(part: Batch) -> jax.Array:
            x_btd = transformer.hidden(
                config, params, part.tokens, part.positions, part.segment_ids
            )
            return token_losses(config, params, x_btd, part.targets)[0]

        return jax.lax.map(some, parts).astype(jnp.float32)

    return jax.jit(losses)
