"""Loss and accuracy on held-out examples, while a run goes on."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import mesh, xla
from jaxlm.config import Config
from jaxlm.data.examples import Examples
from jaxlm.data.loader import Batch
from jaxlm.train import ordered
from jaxlm.train import step as steps
from jaxlm.train.loop import Observer
from jaxlm.train.objectives import CORRUPTIONS, corrupted

ROWS = 32  # examples at a time


def heldout(dataset: Examples, most: int) -> Observer:
    """An observer that logs eval/loss, as the objective counts it and nothing dropped, and what the
    objective sums besides (eval/accuracy); on at most `most` examples, evenly spaced."""
    n = min(most, len(dataset))
    batch = dataset.windows(np.arange(n) * len(dataset) // n)

    def observe(config: Config, params: Any, step: int) -> list[dict[str, Any]]:
        sums = totals(config, params, batch)
        weight = sums.pop("weight")
        row = {name.replace("train/", "eval/"): x / weight for name, x in sums.items()}
        return [{"step": step, **row}]

    return observe


def totals(config: Config, params: Any, batch: Any) -> dict[str, float]:
    """eval/loss and the objective's other sums, summed over the examples' weights, and "weight"."""
    devices, n = jax.sharding.get_mesh(), len(batch.tokens)
    rows = min(ROWS, n)
    rows += -rows % (config.train.deterministic_reduce or mesh.parts("batch"))
    run = _totals(steps.static(config), devices)
    total: dict[str, float] = {}
    for i in range(0, n, rows):
        part = jax.tree.map(lambda x, i=i: x[i : i + rows], batch)
        more = rows - len(part.tokens)
        part = jax.tree.map(lambda x, more=more: np.pad(x, ((0, more), (0, 0))), part)
        for name, value in run(params, mesh.put_batch(part, devices)).items():
            total[name] = total.get(name, 0.0) + float(value)
    return total


@functools.lru_cache(maxsize=32)
def _totals(config: Config, devices: Any) -> Any:
    del devices  # part of the key: traced for the mesh that is set
    config = steps.without_dropout(config)

    def of_rows(params: Any, seen: Any, number: jax.Array) -> dict[str, jax.Array]:
        key = jax.random.fold_in(jax.random.key(0), number)
        loss, sums = steps.objective(config)(config, params, seen, key)
        return {"eval/loss": loss, "weight": jnp.sum(seen.weights), **sums}

    def run(params: Any, batch: Batch) -> dict[str, jax.Array]:
        named = config.train.objective in CORRUPTIONS
        seen = corrupted(config, batch, jax.random.key(0)) if named else batch
        return ordered.summed(of_rows, config.train.deterministic_reduce, params, seen)

    options = xla.exact(config.train.deterministic_reduce, mesh.device_kind())
    return jax.jit(run, compiler_options=options or None)
