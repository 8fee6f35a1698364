"""The functional face of the model: `init(config, key) -> params`, `apply(config, params, …)`.

NNX defines layers (`model.layers`) and is split once, here: params are plain nested dicts of
`jax.Array`, and everything above uses only `jax.jit`, `grad`, `scan`, `checkpoint`, `vmap`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from jaxlm.config import ModelConfig
from jaxlm.mesh import spec
from jaxlm.model.attention import rotary_angles
from jaxlm.model.layers import Block, Cache, Context, Decoder, Norm, use
from jaxlm.pyfile import resolve
from jaxlm.schema import UserError

Params = dict[str, Any]


@dataclass(frozen=True)
class Declared:
    """One row of the table of parameters."""

    shape: tuple[int, ...]  # with the leading layer axis where stacked
    axes: tuple[str, ...]
    role: str
    std: float

    @property
    def spec(self) -> P:
        return spec(self.axes)


def block_class(config: ModelConfig) -> Any:
    return resolve(config.layer, "config.model.layer") if config.layer else Block


@functools.lru_cache(maxsize=64)
def _abstract(config: ModelConfig) -> tuple[Any, Any, Any]:
    """Graph definitions of the decoder and of one block, and the decoder's abstract state."""
    block = block_class(config)
    decoder = nnx.eval_shape(lambda: Decoder(config, block, rngs=nnx.Rngs(params=0)))
    one = nnx.eval_shape(lambda: block(config, rngs=nnx.Rngs(params=0)))
    graph, state = nnx.split(decoder)
    return graph, nnx.split(one)[0], state


def table(config: ModelConfig) -> dict[str, Any]:
    """The table of parameters: a tree like `params` with a `Declared` at each leaf."""

    def row(path: tuple[Any, ...], variable: Any) -> Declared:
        meta = variable.get_metadata()
        stacked = ("layers",) if path[0] == "layers" else ()
        return Declared(variable.shape, (*stacked, *meta["axes"]), meta["role"], meta["std"])

    rows = {path: row(path, v) for path, v in nnx.to_flat_state(_abstract(config)[2])}
    return nnx.traversals.unflatten_mapping(rows)


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Parameters, float32, laid out on the current mesh by the table's logical axes."""

    def make(key: jax.Array) -> Params:
        decoder = Decoder(config, block_class(config), rngs=nnx.Rngs(params=key))
        return nnx.to_pure_dict(nnx.state(decoder, nnx.Param))

    specs = jax.tree.map(lambda row: row.spec, table(config))
    return jax.tree.map(jax.reshard, make(key), specs)


def compute_dtype(config: ModelConfig) -> Any:
    if config.compute_dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(config.compute_dtype)


def hidden(
    config: ModelConfig,
    params: Params,
    tokens_bt: jax.Array,
    positions_bt: jax.Array,
    segments_bt: jax.Array,
) -> jax.Array:
    """Final hidden states [b, t, d] after the last norm; no cache."""
    x_btd, _ = _run(config, params, tokens_bt, positions_bt, segments_bt, segments_bt, 0, None)
    return x_btd


def hidden_cached(
    config: ModelConfig,
    params: Params,
    tokens_bt: jax.Array,
    positions_bt: jax.Array,
    segments_bt: jax.Array,
    segments_bs: jax.Array,
    offset: jax.Array | int,
    cache: Cache,
) -> tuple[jax.Array, Cache]:
    """As `hidden`; keys, values go to slots offset … offset + t of `cache` [l, b, s, g, k].

    Raises UserError for an own layer that keeps no cache.
    """
    x_btd, cache_out = _run(
        config, params, tokens_bt, positions_bt, segments_bt, segments_bs, offset, cache
    )
    if cache_out is None:
        raise UserError(f"config.model.layer: {config.layer} returns no cache, so cannot generate")
    return x_btd, cache_out


def logits(config: ModelConfig, params: Params, x_btd: jax.Array) -> jax.Array:
    """Float32 logits [b, t, v]."""
    w_vd = unembedding(config, params).astype(x_btd.dtype)
    return jnp.einsum("btd,vd->btv", x_btd, w_vd, preferred_element_type=jnp.float32)


def unembedding(config: ModelConfig, params: Params) -> jax.Array:
    """The output matrix [v, d], gathered over fsdp, muP's output scale included."""
    w_vd = params["embedding"] if config.tie_embeddings else params["unembedding"]
    w_vd = jax.reshard(w_vd, spec(("vocab", "d_model"), gathered=True))
    if config.tie_embeddings and config.parametrization == "mup":
        w_vd = w_vd * (config.base_d_model / config.d_model)
    return w_vd


def apply(
    config: ModelConfig,
    params: Params,
    tokens_bt: jax.Array,
    positions_bt: jax.Array | None = None,
    segments_bt: jax.Array | None = None,
) -> jax.Array:
    """Float32 logits [b, t, v] of token ids int32 [b, t]; one document per row unless told."""
    b, t = tokens_bt.shape
    if positions_bt is None:
        positions_bt = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
    if segments_bt is None:
        segments_bt = jnp.ones((b, t), jnp.int32)
    return logits(config, params, hidden(config, params, tokens_bt, positions_bt, segments_bt))


def _run(
    config: ModelConfig,
    params: Params,
    tokens_bt: jax.Array,
    positions_bt: jax.Array,
    segments_bt: jax.Array,
    segments_bs: jax.Array,
    offset: jax.Array | int,
    cache: Cache | None,
) -> tuple[jax.Array, Cache | None]:
    rope = None
    if config.positions == "rope":
        rope = rotary_angles(positions_bt, config.head_dim, config.rope_theta)
    context = Context(positions_bt, segments_bt, segments_bs, offset, rope)
    graph, block_graph, _ = _abstract(config)
    decoder = nnx.merge(graph, params)
    x_btd = _embed(config, decoder, tokens_bt, positions_bt)

    def block(x_btd: jax.Array, layer: Any) -> tuple[jax.Array, Cache | None]:
        weights, cache = layer
        return nnx.merge(block_graph, weights)(x_btd, context, cache)

    if config.remat != "none":
        saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        block = jax.checkpoint(block, policy=saved if config.remat == "dots" else None)
    x_btd, cache = _through(config, block, x_btd, params["layers"], cache)
    norm: Norm = decoder.norm
    return norm(x_btd), cache


def _embed(config: ModelConfig, decoder: Decoder, tokens: jax.Array, where: jax.Array) -> jax.Array:
    like = jnp.zeros((), compute_dtype(config))
    out = spec(("batch", "seq", None))
    # The table is gathered whole: a lookup in a vocab-sharded table has no cheap rule.
    x_btd = (
        jax.reshard(use(decoder.embedding, like), P(None, None)).at[tokens].get(out_sharding=out)
    )
    if config.positions == "learned":
        x_btd = x_btd + use(decoder.positions, like).at[where].get(out_sharding=out)
    return x_btd


def _through(
    config: ModelConfig, block: Any, x_btd: jax.Array, layers: Params, cache: Cache | None
) -> tuple[jax.Array, Cache | None]:
    """All blocks in order: one scanned body, or unrolled."""
    if config.scan_layers:
        return jax.lax.scan(block, x_btd, (layers, cache))
    caches = []
    for i, weights in enumerate(unstack(layers, config.n_layers)):
        x_btd, new = block(x_btd, (weights, jax.tree.map(lambda a, i=i: a[i], cache)))
        caches.append(new)
    return x_btd, None if cache is None else jax.tree.map(lambda *a: jnp.stack(a), *caches)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstack(layers: Params, n: int) -> list[Params]:
    """[l, …] leaves → n trees. Its gradient is one stack, not n padded copies added up."""
    return [jax.tree.map(lambda a, i=i: a[i], layers) for i in range(n)]


def _unstack_fwd(layers: Params, n: int) -> tuple[list[Params], None]:
    return unstack(layers, n), None


def _unstack_bwd(n: int, _: None, grads: list[Params]) -> tuple[Params]:
    return (jax.tree.map(lambda *g: jnp.stack(g), *grads),)


unstack.defvjp(_unstack_fwd, _unstack_bwd)
