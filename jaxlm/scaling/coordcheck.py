"""The coordinate check (Yang et al. 2022, appendix D.1): does what training does to activations
stay the same size as a model grows? Flat under muP against width and under CompleteP against depth,
not under the standard parametrisation.

Per size, after a few steps at the experiment's own learning rate: the change of the residual stream
(as normalised for the output) half-way and at the end, the change of the logits, all RMS on one
batch, and the update of the hidden matrices, spectral norm against spectral norm (largest layer).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import mesh
from jaxlm.config import Config, Shape, validate
from jaxlm.data import loader
from jaxlm.model import scale, transformer
from jaxlm.scaling.ladder import sized
from jaxlm.train import optimizer, step

Json = dict[str, Any]
QUANTITIES = ("stream_half_way", "stream_at_the_end", "logits", "update")
FLAT = 2.0  # largest over smallest that counts as flat


def check(
    config: Config,
    widths: Sequence[int],
    depths: Sequence[int],
    data_dir: Path,
    steps: int = 5,
    seeds: int = 2,
    say: Callable[[str], None] = lambda line: None,
) -> Json:
    """`measure` at every width (at the config's depth) and every depth (at its width), as
    jaxlm.coordcheck/1: `rows` and, per direction and quantity, `spread` (largest / smallest, mean
    over seeds taken first)."""
    m = config.model
    rows = []
    once = functools.cache(lambda shape, seed: measure(_at(config, shape, seed), data_dir, steps))
    for direction, shapes in (
        ("width", [Shape(w, m.n_layers) for w in widths]),
        ("depth", [Shape(m.d_model, n) for n in depths]),
    ):
        for shape in shapes:
            found = [once(shape, seed) for seed in range(seeds)]
            mean = {q: float(np.mean([f[q] for f in found])) for q in QUANTITIES}
            size = shape.d_model if direction == "width" else shape.n_layers
            rows.append({"direction": direction, "size": size, **mean})
            say(f"{direction} {size}: " + ", ".join(f"{q} {v:.3g}" for q, v in mean.items()))
    return {
        "format": "jaxlm.coordcheck/1",
        "parametrization": m.parametrization,
        "optimizer": config.optimizer.name,
        "learning_rate": config.optimizer.learning_rate,
        "steps": steps,
        "rows": rows,
        "spread": {d: _spread([r for r in rows if r["direction"] == d])
                   for d in ("width", "depth") if any(r["direction"] == d for r in rows)},
    }  # fmt: skip


def _spread(rows: Sequence[Json]) -> dict[str, float]:
    return {q: max(r[q] for r in rows) / max(min(r[q] for r in rows), 1e-30) for q in QUANTITIES}


def _at(config: Config, shape: Shape, seed: int) -> Config:
    return validate(
        dataclasses.replace(
            config,
            seed=seed,
            model=sized(config.model, shape),
            optimizer=dataclasses.replace(
                config.optimizer, schedule="constant", warmup_fraction=0.0
            ),
            mesh=dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1),
        ),
        "config",
    )


def measure(config: Config, data_dir: Path, steps: int) -> Json:
    """The `QUANTITIES` of one model after so many steps on the experiment's own data."""
    data = loader.Dataset.open(data_dir, "train", config.model.seq_len)
    batches = loader.chunk(data, config.seed, 0, steps, config.train.global_batch_size)
    first = jax.tree.map(lambda x: jnp.asarray(x[0]), batches)
    with jax.set_mesh(mesh.make(config, jax.devices()[:1])):
        program, hyper = step.program(config), optimizer.hyper(config)
        state = program.init(hyper)
        params = jax.tree.map(jnp.copy, state.params)  # the chunk donates its state
        state, _ = program.chunk(hyper, state, jax.tree.map(jnp.asarray, batches))
        before, after = (_outputs(config, p, first) for p in (params, state.params))
        moved = [float(jnp.sqrt(jnp.mean((b - a) ** 2)))
                 for a, b in zip(before, after, strict=True)]  # fmt: skip
        return dict(zip(QUANTITIES, [*moved, _update(config, params, state.params)], strict=True))


@functools.partial(jax.jit, static_argnums=0)
def _outputs(config: Config, params: Any, batch: loader.Batch) -> list[jax.Array]:
    """The stream after half and after all layers [b, t, d], and the logits [b, t, v]."""
    read = (batch.tokens, batch.positions, batch.segment_ids)
    found = []
    for layers in (max(1, config.model.n_layers // 2), config.model.n_layers):
        cut = {**params, "layers": jax.tree.map(lambda x, n=layers: x[:n], params["layers"])}
        part = dataclasses.replace(config.model, n_layers=layers)
        found.append(transformer.hidden(part, cut, *read))
    return [*found, transformer.logits(config.model, params, found[-1])]


def _update(config: Config, before: Any, after: Any) -> float:
    """Spectral norm of a hidden matrix's change over that of the matrix, the largest of all."""
    hidden = jax.tree.leaves(scale.by_role(config.model, ("hidden",)))
    largest = 0.0
    for is_hidden, old, new in zip(
        hidden, jax.tree.leaves(before), jax.tree.leaves(after), strict=True
    ):
        if is_hidden:
            # Whatever is summed over first: [layers, in …, out …] with d_model at one of the ends.
            first_is_width = old.shape[1] == config.model.d_model
            shape = (
                (len(old), old.shape[1], -1) if first_is_width else (len(old), -1, old.shape[-1])
            )
            w, moved = (np.asarray(x, np.float32).reshape(shape) for x in (old, new - old))
            largest = max(largest, float((_norms(moved) / _norms(w)).max()))
    return largest


def _norms(w_lio: np.ndarray, iterations: int = 20) -> np.ndarray:
    """Spectral norms [l] by power iteration."""
    x_lo = np.random.default_rng(0).standard_normal((len(w_lio), w_lio.shape[2], 1))
    for _ in range(iterations):
        x_lo = w_lio.swapaxes(1, 2) @ (w_lio @ x_lo)
        x_lo /= np.maximum(np.linalg.norm(x_lo, axis=1, keepdims=True), 1e-30)
    return np.linalg.norm(w_lio @ x_lo, axis=(1, 2))
