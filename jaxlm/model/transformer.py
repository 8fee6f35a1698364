"""The functional face of the model: `init(config, key) -> params`, `apply(config, params, …)`.

NNX defines layers (`model.layers`) and is split once, here: params are plain nested dicts of
`jax.Array`, and everything above uses only `jax.jit`, `grad`, `scan`, `checkpoint`, `vmap`.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from jaxlm.config import ModelConfig
from jaxlm.mesh import platform, spec
from jaxlm.model import stacks
from jaxlm.model.layers import Context, Memory
from jaxlm.model.moe import Sums
from jaxlm.model.parts import activated, dropout, lookup, product, use
from jaxlm.model.stacks import Model, Params
from jaxlm.schema import UserError


@dataclass(frozen=True)
class Declared:
    """One row of the table of parameters."""

    shape: tuple[int, ...]  # with the leading layer axis where stacked
    axes: tuple[str, ...]
    role: str
    std: float
    active: float  # share of it that one token is multiplied by

    @property
    def spec(self) -> P:
        return spec(self.axes)

    @property
    def sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a matrix: which axes are its input, which its output; the rest are many of them."""
        first = next(i for i, axis in enumerate(self.axes) if axis not in ("layers", "experts"))
        inner = tuple(range(first, len(self.axes)))
        cut = len(inner) - 1 if self.axes[-1] == "d_model" else 1
        return inner[:cut], inner[cut:]


class Source(NamedTuple):
    """What the encoder of an encoder–decoder reads, int32 [b, s] each. A decoder's token sees what
    has its own segment."""

    tokens: jax.Array
    positions: jax.Array
    segments: jax.Array  # 0 is padding


@functools.lru_cache(maxsize=64)
def _abstract(config: ModelConfig) -> tuple[Any, Any]:
    """The model's graph definition and abstract state."""
    return nnx.split(nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(params=0))))


@functools.lru_cache(maxsize=64)
def table(config: ModelConfig) -> dict[str, Any]:
    """The table of parameters: a tree like `params` with a `Declared` at each leaf."""

    def row(path: tuple[Any, ...], variable: Any) -> Declared:
        meta = variable.get_metadata()
        axes = (*(("layers",) if "layers" in path else ()), *meta["axes"])
        return Declared(variable.shape, axes, meta["role"], meta["std"], meta["active"])

    rows = {path: row(path, v) for path, v in nnx.to_flat_state(_abstract(config)[1])}
    return nnx.traversals.unflatten_mapping(rows)


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Parameters, float32, laid out on the current mesh by the table's logical axes."""

    def make(key: jax.Array) -> Params:
        model = Model(config, rngs=nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    specs = jax.tree.map(lambda row: row.spec, table(config))
    return jax.tree.map(jax.reshard, make(key), specs)


def relaid(config: ModelConfig, params: Params) -> Params:
    """Parameters from another mesh of the same devices on the one that is set."""
    devices = jax.sharding.get_mesh()
    first = jax.tree.leaves(params)[0]
    if first.sharding.mesh == devices:
        return params
    layout = jax.tree.map(lambda row: jax.NamedSharding(devices, row.spec), table(config))
    return jax.device_put(params, layout)


def compute_dtype(config: ModelConfig) -> Any:
    if config.compute_dtype == "auto":
        return jnp.float32 if platform() == "cpu" else jnp.bfloat16
    return jnp.dtype(config.compute_dtype)


def hidden(
    config: ModelConfig,
    params: Params,
    tokens_bt: jax.Array,
    positions_bt: jax.Array,
    segments_bt: jax.Array,
    *,
    source: Source | None = None,
    types_bt: jax.Array | None = None,
) -> jax.Array:
    """Final hidden states [b, t, d] after the last norm; no cache, nothing dropped.

    `source`: of an encoder–decoder, which needs one. `types_bt`: of `n_token_types` (0 unless
    given).
    """
    return hidden_and_sums(
        config, params, tokens_bt, positions_bt, segments_bt, source=source, types_bt=types_bt
    )[0]


def hidden_and_sums(
    config: ModelConfig,
    params: Params,
    tokens_bt: jax.Array,
    positions_bt: jax.Array,
    segments_bt: jax.Array,
    *,
    source: Source | None = None,
    memory: Memory | None = None,
    types_bt: jax.Array | None = None,
    prefix_bt: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Sums]:
    """As `hidden`, and the means over layers of what they report (`moe.router_sums`).

    `memory` is what `remember` made of a source, in its place. `prefix_bt` (bool): tokens that
    earlier ones of their document see too (a prefix LM). `key`: of dropout, which there is only
    with one.
    """
    keys = [None] * 2 if key is None else jax.random.split(key)
    sums = Sums()
    if source is not None:
        memory, sums = remember(config, params, source, keys[1])
    x_btd, _, more = _run(
        config, params, tokens_bt, positions_bt, segments_bt, segments_bt, 0, None,
        memory=memory, types_bt=types_bt, prefix_bt=prefix_bt, key=keys[0],
    )  # fmt: skip
    return x_btd, {name: (x + sums[name]) / 2 if sums else x for name, x in more.items()}


def attention_maps(
    config: ModelConfig,
    params: Params,
    tokens_bt: jax.Array,
    positions_bt: jax.Array,
    segments_bt: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """As `hidden`, and what each layer's and head's attention weighs [l, b, h, t, s]; of a decoder
    or an encoder. For looking at: slow, and quadratic in memory."""
    config = dataclasses.replace(config, scan_layers=False, remat="none")
    maps: list[jax.Array] = []
    x_btd, _, _ = _run(
        config, params, tokens_bt, positions_bt, segments_bt, segments_bt, 0, None, maps=maps
    )
    return x_btd, jnp.stack(maps)


def remember(
    config: ModelConfig, params: Params, source: Source, key: jax.Array | None = None
) -> tuple[Memory, Sums]:
    """The encoder's part of an encoder–decoder: what the decoder looks at, and the layers' sums."""
    tokens, positions, segments = _by_time(*source)
    x_bsd = _embed(config, _model(config, params), tokens, positions, None, key)
    context = Context(positions, segments, segments, 0, None, causal=False)
    encoder = params["encoder"]
    x_bsd, _, sums = stacks.run(
        config, _model(config, params).encoder, encoder["layers"], x_bsd, context, None, key
    )
    x_bsd = dropout(x_bsd, config.dropout, key, 1)
    return stacks.remember(config, params["layers"], x_bsd, segments), sums


def hidden_cached(
    config: ModelConfig,
    params: Params,
    tokens_bt: jax.Array,
    positions_bt: jax.Array,
    segments_bt: jax.Array,
    segments_bs: jax.Array,
    offset: jax.Array | int,
    cache: Any,
    memory: Memory | None = None,
    prefix_bt: jax.Array | None = None,
    rows_b: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """As `hidden`; keys and values go to slots offset … offset + t of `cache`, each layer's
    (`layers.Cache`) in one stack.

    Where `params["layers"]` is a tuple of each layer's weights, so are `cache`, which comes back
    so, and the keys and values of `memory`. `memory`: of an encoder–decoder, from `remember`.
    `prefix_bt`: as in `hidden_and_sums`, where there are as many queries as slots. `rows_b` (int32)
    of a cache that has more rows and slots than `segments_bs`: which are used, each from its own
    `offset` (int32 [b]) on. Raises UserError for an own layer that keeps no cache.
    """
    x_btd, cache_out, _ = _run(
        config, params, tokens_bt, positions_bt, segments_bt, segments_bs, offset, cache,
        memory=memory, prefix_bt=prefix_bt, rows_b=rows_b,
    )  # fmt: skip
    if not jax.tree.leaves(cache_out):
        raise UserError(f"config.model.layer: {config.layer} returns no cache, so cannot generate")
    return x_btd, cache_out


def logits(config: ModelConfig, params: Params, x_btd: jax.Array) -> jax.Array:
    """Float32 logits [b, t, v] of final hidden states."""
    w_vd = unembedding(config, params)
    head = _model(config, params).masked if config.mlm_head else None
    if head is not None:
        x_btd = jnp.einsum("btd,de->bte", x_btd, use(head.dense, x_btd)) + use(head.bias, x_btd)
        x_btd = head.norm(activated(config.activation, x_btd, None))
    used, out = spec(("vocab", "d_model"), gathered=True), spec(("batch", "seq", "vocab"))
    logits_btv = product("btd,vd->btv", x_btd, w_vd, used, out, jnp.float32)
    if head is not None:
        logits_btv = logits_btv + use(head.output_bias, logits_btv)
    cap = config.final_soft_cap
    return logits_btv if cap is None else cap * jnp.tanh(logits_btv / cap)


def pooled(
    config: ModelConfig, params: Params, x_btd: jax.Array, segments_bt: jax.Array
) -> jax.Array:
    """A summary [b, d] of final hidden states, or [b, t, d] of each token's: what `pooling` says of
    those outside padding (segment 0), through BERT's tanh layer where there is one (`pooler`). With
    `n_classes` it becomes float32 logits [b, classes] or [b, t, classes]."""
    model = _model(config, params)
    real_bt = (segments_bt > 0).astype(jnp.float32)
    y_bd = x_btd
    if config.pooling == "first":
        y_bd = x_btd[:, 0]
    elif config.pooling != "each":
        last_bt = real_bt * (jnp.cumsum(real_bt, axis=1) == real_bt.sum(axis=1, keepdims=True))
        w_bt = last_bt if config.pooling == "last" else real_bt
        w_bt = w_bt / jnp.maximum(w_bt.sum(axis=1, keepdims=True), 1.0)
        y_bd = jnp.einsum("btd,bt->bd", x_btd, w_bt.astype(x_btd.dtype))
    if config.pooler:
        y_bd = jnp.tanh(model.pooler(y_bd))
    return model.classifier(y_bd).astype(jnp.float32) if config.n_classes else y_bd


def unembedding(config: ModelConfig, params: Params) -> jax.Array:
    """The output matrix [v, d], gathered over fsdp, muP's or T5's output scale included."""
    w_vd = params["embedding"] if config.tie_embeddings else params["unembedding"]
    w_vd = jax.reshard(w_vd, spec(("vocab", "d_model"), gathered=True))
    if config.tie_embeddings and config.parametrization != "standard":
        w_vd = w_vd * config.width_shrinks
    return w_vd * config.d_model**-0.5 if config.scale_output else w_vd


def apply(
    config: ModelConfig,
    params: Params,
    tokens_bt: jax.Array,
    positions_bt: jax.Array | None = None,
    segments_bt: jax.Array | None = None,
    *,
    source: Source | None = None,
    types_bt: jax.Array | None = None,
) -> jax.Array:
    """Float32 logits [b, t, v] of token ids int32 [b, t]; one document per row unless told."""
    b, t = tokens_bt.shape
    if positions_bt is None:
        positions_bt = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
    if segments_bt is None:
        segments_bt = jnp.ones((b, t), jnp.int32)
    where = positions_bt, segments_bt
    x_btd = hidden(config, params, tokens_bt, *where, source=source, types_bt=types_bt)
    return logits(config, params, x_btd)


def _model(config: ModelConfig, params: Params) -> Any:
    """What stands around the layers; these are given to `stacks.run` as plain arrays."""
    return nnx.merge(_abstract(config)[0], {**params, "layers": table(config)["layers"]})


def _run(
    config: ModelConfig,
    params: Params,
    tokens_bt: jax.Array,
    positions_bt: jax.Array,
    segments_bt: jax.Array,
    segments_bs: jax.Array,
    offset: jax.Array | int,
    cache: Any,
    *,
    memory: Memory | None = None,
    types_bt: jax.Array | None = None,
    prefix_bt: jax.Array | None = None,
    key: jax.Array | None = None,
    maps: list[jax.Array] | None = None,
    rows_b: jax.Array | None = None,
) -> tuple[jax.Array, Any, Sums]:
    model, causal = _model(config, params), config.architecture != "encoder"
    tokens_bt, positions_bt, segments_bt, segments_bs, types_bt, prefix_bt = _by_time(
        tokens_bt, positions_bt, segments_bt, segments_bs, types_bt, prefix_bt
    )
    context = Context(
        positions_bt, segments_bt, segments_bs, offset, None, causal=causal, prefix_bs=prefix_bt,
        memory=memory, maps=maps, rows=rows_b,
    )  # fmt: skip
    keys = [None] * 2 if key is None else jax.random.split(key)
    x_btd = _embed(config, model, tokens_bt, positions_bt, types_bt, keys[0])
    return stacks.run(config, model, params["layers"], x_btd, context, cache, keys[1])


def _by_time(*arrays_bt: Any) -> Any:
    """Rows of whole sequences, cut as the activations are."""
    return jax.tree.map(lambda x: jax.reshard(x, spec(("batch", "seq"))), arrays_bt)


def _embed(
    config: ModelConfig,
    model: Any,
    tokens_bt: jax.Array,
    positions_bt: jax.Array,
    types_bt: jax.Array | None,
    key: jax.Array | None,
) -> jax.Array:
    dtype, out = compute_dtype(config), spec(("batch", "seq", None))
    x_btd = lookup(model.embedding, tokens_bt, out, dtype)
    if config.scale_embeddings:
        x_btd = x_btd * config.d_model**0.5
    if config.positions == "learned":
        x_btd = x_btd + lookup(model.positions, positions_bt, out, dtype)
    if config.n_token_types:
        types_bt = jnp.zeros_like(tokens_bt) if types_bt is None else types_bt
        x_btd = x_btd + lookup(model.token_types, types_bt, out, dtype)
    if config.embedding_norm:
        x_btd = model.embedding_norm(x_btd)
    return dropout(x_btd, config.dropout, key, 0)
