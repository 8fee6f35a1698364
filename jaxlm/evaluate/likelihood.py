"""Loss, perplexity and bits per byte on held-out text."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import mesh, xla
from jaxlm.config import OBJECTIVES, Config, ModelConfig, TrainConfig
from jaxlm.data import loader
from jaxlm.data.loader import Batch
from jaxlm.model import transformer
from jaxlm.pyfile import is_reference
from jaxlm.train import ordered
from jaxlm.train.loop import Observer
from jaxlm.train.losses import hidden, token_losses
from jaxlm.train.objectives import Example, corrupted

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


def by_source(dataset: loader.Dataset, sequences: int) -> Observer:
    """An observer that logs eval/loss/SOURCE of each source with windows in the eval split: what is
    learnt of one, and what is forgotten of another."""
    windows = {dataset.sources[k]: own for k, own in dataset.windows_of.items() if len(own)}
    each = max(1, sequences // max(1, len(windows)))
    batches = {name: loader.eval_batch(dataset, each, own)[0] for name, own in windows.items()}

    def observe(config: Config, params: Any, step: int) -> list[dict[str, Any]]:
        row: dict[str, Any] = {"step": step}
        for name, batch in batches.items():
            nats, weight = total_nats(config, params, batch)
            row[f"eval/loss/{name}"] = nats / max(weight, 1.0)
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
    train = TrainConfig(
        objective=objective(config),
        corruption=config.train.corruption,
        deterministic_reduce=config.train.deterministic_reduce,
    )
    nll_nt, weights_nt = _evaluated(Config(model=config.model, train=train), params, batch)
    return float((nll_nt * weights_nt).sum()), float(weights_nt.sum())


def continuations(config: ModelConfig, params: Any, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Of each of [n, t] sequences: Σ weights · negative log-likelihood, float64 [n], and whether
    every target with a weight was the likeliest token, bool [n]."""
    n, devices = batch.tokens.shape[0], jax.sharding.get_mesh()
    more = -n % mesh.parts("batch")
    padded = jax.tree.map(lambda x: np.pad(x, ((0, more), (0, 0))), batch)
    found = _continued(config, devices)(params, mesh.put_batch(padded, devices))
    nll_nt, likeliest_nt = (np.asarray(x)[:n] for x in found)
    nats = (nll_nt.astype(np.float64) * batch.weights).sum(axis=1)
    return nats, (likeliest_nt | (batch.weights == 0)).all(axis=1)


def _evaluated(config: Config, params: Any, batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihoods and weights of the examples, float64 [n, t]."""
    n = batch.tokens.shape[0]
    devices = jax.sharding.get_mesh()
    rows = min(ROWS, n)
    rows += -rows % (config.train.deterministic_reduce or mesh.parts("batch"))
    whole = -(-n // rows) * rows
    padded = jax.tree.map(lambda x: np.pad(x, ((0, whole - n), (0, 0))), batch)
    parts = jax.tree.map(lambda x: x.reshape(-1, rows, x.shape[-1]), padded)
    found = _losses(config, devices)(params, mesh.put_batch(parts, devices, leading=1))
    nll, weights = (np.asarray(x, np.float64).reshape(whole, -1)[:n] for x in found)
    return nll, weights


@functools.lru_cache(maxsize=32)
def _losses(config: Config, devices: Any) -> Any:
    del devices  # part of the key: traced for the mesh that is set

    def of_rows(params: Any, example: Example, number: jax.Array) -> jax.Array:
        x_btd, _ = hidden(config.model, params, example)
        nll_bt = token_losses(config.model, params, x_btd, example.targets)[0]
        return nll_bt.astype(jnp.float32)

    def losses(params: Any, parts: Batch) -> Any:
        def some(numbered: tuple[Batch, jax.Array]) -> tuple[jax.Array, jax.Array]:
            part, number = numbered
            example = corrupted(config, part, jax.random.fold_in(jax.random.key(0), number))
            shards = config.train.deterministic_reduce
            return ordered.each(of_rows, shards, params, example), example.weights

        return mesh.whole(jax.lax.map(some, (parts, jnp.arange(len(parts.tokens)))))

    options = xla.exact(config.train.deterministic_reduce, mesh.device_kind())
    return jax.jit(losses, compiler_options=options or None)


@functools.lru_cache(maxsize=32)
def _continued(config: ModelConfig, devices: Any) -> Any:
    """Jitted (params, batch) → negative log-likelihoods, which targets are likeliest, [b, t]."""
    del devices

    def run(params: Any, batch: Batch) -> Any:
        x_btd, _ = hidden(config, params, Example(*batch))
        nll_bt, _ = token_losses(config, params, x_btd, batch.targets)
        best_bt = jnp.argmax(transformer.logits(config, params, x_btd), axis=-1)
        return mesh.whole((nll_bt.astype(jnp.float32), best_bt == batch.targets))

    return jax.jit(run)
