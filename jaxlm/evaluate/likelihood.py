"""Loss, perplexity and bits per byte on held-out text."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import mesh
from jaxlm.config import OBJECTIVES, Config, ModelConfig, TrainConfig
from jaxlm.data import loader
from jaxlm.data.loader import Batch
from jaxlm.pyfile import is_reference
from jaxlm.train.loop import Observer
from jaxlm.train.losses import hidden, token_losses
from jaxlm.train.objectives import corrupted

ROWS = 32  # sequences at a time


def heldout(dataset: loader.Dataset, sequences: int) -> Observer:
    """An observer that logs eval/loss (nats per token), eval/perplexity and eval/bpb.

    The same evenly spaced windows of the eval split for every run, corrupted in the same way as the
    objective says. Bits per byte are of a next-token model alone; they count the bytes of text that
    the targets stand for (an end of text costs its nats and stands for none).
    """
    batch, target_bytes = loader.eval_batch(dataset, sequences)
    n_bytes = int(target_bytes.sum())

    def observe(config: Config, params: Any, step: int) -> list[dict[str, Any]]:
        nats, weight = total_nats(config, params, batch)
        loss = nats / weight
        row = {"step": step, "eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}
        if objective(config) == "next_token":
            row["eval/bpb"] = nats / math.log(2) / n_bytes
        return [row]

    return observe


def objective(config: Config) -> str:
    """What a run is evaluated on: its objective, or in place of an own one the first that suits the
    architecture."""
    name = config.train.objective
    return OBJECTIVES[config.model.architecture][0] if is_reference(name) else name


def total_nats(config: Config, params: Any, batch: Any) -> tuple[float, float]:
    """Σ weights · negative log-likelihood, and Σ weights, of [n, t] sequences; sums in float64.

    The weights are those of the examples that the objective makes, with the same key each time.
    """
    train = TrainConfig(objective=objective(config), corruption=config.train.corruption)
    nll_nt, weights_nt = _evaluated(Config(model=config.model, train=train), params, batch)
    return float((nll_nt * weights_nt).sum()), float(weights_nt.sum())


def token_nats(config: ModelConfig, params: Any, batch: Batch) -> np.ndarray:
    """Float64 [n, t]: weights · negative log-likelihood of the next tokens."""
    nll_nt, weights_nt = _evaluated(Config(model=config), params, batch)
    return nll_nt * weights_nt


def _evaluated(config: Config, params: Any, batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihoods and weights of the examples, float64 [n, t]."""
    n = batch.tokens.shape[0]
    devices = jax.sharding.get_mesh()
    rows = min(ROWS, n)
    rows += -rows % math.prod(devices.shape[a] for a in ("data", "fsdp"))
    whole = -(-n // rows) * rows
    padded = jax.tree.map(lambda x: np.pad(x, ((0, whole - n), (0, 0))), batch)
    parts = jax.tree.map(lambda x: x.reshape(-1, rows, x.shape[-1]), padded)
    found = _losses(config, devices)(params, mesh.put_batch(parts, devices, leading=1))
    nll, weights = (np.asarray(x, np.float64).reshape(whole, -1)[:n] for x in found)
    return nll, weights


@functools.lru_cache(maxsize=32)
def _losses(config: Config, devices: Any) -> Any:
    del devices  # part of the key: traced for the mesh that is set

    def losses(params: Any, parts: Batch) -> tuple[jax.Array, jax.Array]:
        def some(numbered: tuple[Batch, jax.Array]) -> tuple[jax.Array, jax.Array]:
            part, number = numbered
            example = corrupted(config, part, jax.random.fold_in(jax.random.key(0), number))
            x_btd, _ = hidden(config.model, params, example)
            nll_bt = token_losses(config.model, params, x_btd, example.targets)[0]
            return nll_bt.astype(jnp.float32), example.weights

        return jax.lax.map(some, (parts, jnp.arange(len(parts.tokens))))

    return jax.jit(losses)
