"""The pure train step, and the one program that runs a chunk of steps.

Everything that may differ between members of one shape (seed, learning rate, decay, horizon) is an
array in `Hyper`, so `program(config)` compiles once per shape; it is cached on the static rest of
the config, and maps over a population of members when asked.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import P

from jaxlm import xla
from jaxlm.config import Config, DataConfig, TuneConfig
from jaxlm.data.loader import Batch
from jaxlm.mesh import HOST_MEMORY, device_kind, spec
from jaxlm.model.transformer import Params
from jaxlm.pyfile import is_reference, resolve
from jaxlm.train import example_losses, losses, optimizer, ordered, parameters
from jaxlm.train.objectives import CORRUPTIONS, Example, corrupted
from jaxlm.train.optimizer import Hyper


class State(NamedTuple):
    params: Params
    opt_state: Any
    step: jax.Array  # int32 scalar, updates made
    frozen: Any = None  # what the model needs besides and no step changes; never saved


Metrics = dict[str, jax.Array]
Space = jax.memory.Space


def static(config: Config) -> Config:
    """`config` without what a compiled program does not depend on."""
    return dataclasses.replace(
        config,
        name="",
        seed=0,
        data=DataConfig(),
        tune=TuneConfig(
            lora=config.tune.lora,
            beta=config.tune.beta,
            temperature=config.tune.temperature,
            teacher_share=config.tune.teacher_share,
        ),
        optimizer=dataclasses.replace(
            config.optimizer,
            learning_rate=1.0,
            weight_decay=0.0,
            warmup_fraction=0.0,
            decay_fraction=0.0,
            final_fraction=0.0,
        ),
        train=dataclasses.replace(
            config.train, steps=1, log_every=1, eval_every=0, checkpoint_every=0,
            keep_checkpoints=1, probes=(), sample_prompts=(), sample_tokens=0, tasks=(),
            task_items=0, track=(), profile="",
        ),
    )  # fmt: skip


def without_dropout(config: Config) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))


def objective(config: Config) -> Callable[..., tuple[jax.Array, losses.Sums]]:
    """(config, params, batch, key) -> (loss summed over weights, sums). Its batch is an Example, or
    where nothing is corrupted the Batch itself."""
    name = config.train.objective
    if is_reference(name):
        return resolve(name, "config.train.objective")
    return example_losses.OF_EXAMPLES.get(name, losses.cross_entropy)


def check_names(config: Config) -> None:
    """Raises UserError where the objective, optimizer or schedule does not exist."""
    objective(config)
    optimizer.check_names(config.optimizer)


def init_state(config: Config, hyper: Hyper) -> State:
    """Fresh parameters and optimizer state on the current mesh."""
    params = parameters.init(config, jax.random.key(hyper.seed))
    opt_state = optimizer.transform(config, 0.0, 0.0).init(params)
    return State(params, _moved(config, opt_state, Space.Host), jnp.zeros((), jnp.int32))


def train_step(config: Config, hyper: Hyper, state: State, batch: Batch) -> tuple[State, Metrics]:
    """One update from one global batch. Loss and gradients are means over token weights."""
    key = jax.random.fold_in(jax.random.key(hyper.seed), state.step)
    seen: Batch | Example = batch
    if config.train.objective in CORRUPTIONS:
        corruption_key, key = jax.random.split(key)
        seen = corrupted(config, batch, corruption_key)
    total = jnp.maximum(_weight(config, seen), 1.0)
    loss, sums, grads = _gradients(config, state, seen, total, key)
    rate = optimizer.learning_rate(config.optimizer, hyper, state.step)
    update: Callable[..., Any] = functools.partial(_update, config)
    if config.train.deterministic_reduce:
        update = ordered.alone(update, state.step >= 0)
    opt_state = _moved(config, state.opt_state, Space.Device)
    params, opt_state, norm = update(grads, opt_state, state.params, hyper.weight_decay, rate)
    opt_state = _moved(config, opt_state, Space.Host)
    metrics = {
        "train/loss": loss,
        "train/grad_norm": norm,
        "learning_rate": rate,
        **{name: value / total for name, value in sums.items()},
    }
    return state._replace(params=params, opt_state=opt_state, step=state.step + 1), metrics


def _update(
    config: Config, grads: Params, opt_state: Any, params: Params, decay: Any, rate: Any
) -> tuple[Params, Any, jax.Array]:
    """Parameters and optimizer state after the update, and the gradient's norm before clipping."""
    tx = optimizer.transform(config, decay, rate)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, optax.global_norm(grads)


def _moved(config: Config, opt_state: Any, space: Any) -> Any:
    """Where `optimizer.offload` asks for it: its arrays, but for counters, in that memory."""
    if not config.optimizer.offload:
        return opt_state
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, opt_state)


def _weight(config: Config, batch: Batch | Example) -> jax.Array:
    shards = config.train.deterministic_reduce
    return ordered.summed(lambda _, w_bt, number: jnp.sum(w_bt), shards, None, batch.weights)


def _gradients(
    config: Config, state: State, batch: Batch | Example, total: jax.Array, key: jax.Array
) -> tuple[jax.Array, losses.Sums, Params]:
    """Loss, extra sums and gradients, accumulated in float32 over micro-batches."""

    def loss_fn(
        params: Params, frozen: Any, total: jax.Array, part: Any, key: jax.Array
    ) -> tuple[jax.Array, losses.Sums]:
        whole = parameters.whole(config, params, frozen)
        loss, sums = objective(config)(config, whole, part, key)
        return loss / total, sums

    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    if shards := config.train.deterministic_reduce:
        same = (state.params, state.frozen, total, key)

        def of_shard(same: Any, part: Any, number: jax.Array) -> Any:
            *given, key = same
            return gradient(*given, part, jax.random.fold_in(key, number))

        (loss, sums), grads = ordered.summed(of_shard, shards, same, batch)
        return loss, sums, grads
    n = config.train.accumulation_steps
    gradient = functools.partial(gradient, state.params, state.frozen, total)
    if n == 1:
        (loss, sums), grads = gradient(batch, key)
        return loss, sums, grads

    def split(x: jax.Array) -> jax.Array:  # rows stay on their device: [b] → [b/n, n] → [n, b/n]
        sharding = spec(("batch", *[None] * x.ndim))
        return x.reshape(x.shape[0] // n, n, *x.shape[1:], out_sharding=sharding).swapaxes(0, 1)

    def add(done: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        (loss, sums), grads = gradient(*part)
        return jax.tree.map(jnp.add, done, (loss, sums, grads)), None

    parts = (jax.tree.map(split, batch), jax.random.split(key, n))
    first, rest = jax.tree.map(lambda x: x[0], parts), jax.tree.map(lambda x: x[1:], parts)
    (loss, sums), grads = gradient(*first)
    return jax.lax.scan(add, (loss, sums, grads), rest)[0]


class Program(NamedTuple):
    """Jitted functions of one shape; with a population, every argument leads with its axis."""

    init: Callable[[Hyper], State]
    chunk: Callable[[Hyper, State, Batch], tuple[State, Metrics]]  # donates the state


def program(config: Config, population: int = 0) -> Program:
    """`init(hyper)`, `chunk(hyper, state, batches [n, b, t])`; population > 0: over members."""
    mesh = jax.sharding.get_mesh()
    return _program(static(config), population, mesh)


@functools.lru_cache(maxsize=32)
def _program(config: Config, population: int, mesh: Any) -> Program:
    del mesh  # part of the key: programs are traced for the mesh that is set

    def init(hyper: Hyper) -> State:
        return init_state(config, hyper)

    def chunk(hyper: Hyper, state: State, batches: Batch) -> tuple[State, Metrics]:
        if batches.tokens.shape[0] == 1:  # a scan of one step would only cost
            state, metrics = train_step(config, hyper, state, jax.tree.map(lambda x: x[0], batches))
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(lambda s, b: train_step(config, hyper, s, b), state, batches)

    if population:
        init, chunk = jax.vmap(init), jax.vmap(chunk)
    options: dict[str, Any] = {
        **xla.options(config.train.xla_preset, device_kind()),
        **xla.exact(config.train.deterministic_reduce, device_kind()),
    }
    chunk = jax.jit(chunk, donate_argnums=1, compiler_options=options or None)
    return Program(jax.jit(init), chunk)


def abstract_state(config: Config, hyper: Hyper) -> State:
    """Shapes, types and shardings of `init`'s result, without computing it."""
    mesh = jax.sharding.get_mesh()
    abstract = jax.eval_shape(program(config).init, hyper)

    def with_sharding(x: Any, memory: str | None = None) -> jax.ShapeDtypeStruct:
        partition = x.sharding.spec if getattr(x, "sharding", None) is not None else P()
        layout = jax.NamedSharding(mesh, partition, memory_kind=memory)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)

    def on_host(x: Any) -> jax.ShapeDtypeStruct:
        return with_sharding(x, HOST_MEMORY if x.ndim else None)

    state: State = jax.tree.map(with_sharding, abstract)
    if config.optimizer.offload:
        state = state._replace(opt_state=jax.tree.map(on_host, abstract.opt_state))
    return state
