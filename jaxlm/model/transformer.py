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
from jaxlm.model.layers import Block, Cache, Context, Decoder, Norm, Sums
from jaxlm.model.parts import dropout, use
from jaxlm.model.positions import Rope, rotary
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
    active: float  # share of it that one token is multiplied by

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
        axes = (*(("layers",) if "layers" in path else ()), *meta["axes"])
        return Declared(variable.shape, axes, meta["role"], meta["std"], meta["active"])

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
    """Final hidden states [b, t, d] after the last norm; no cache, nothing dropped."""
    return hidden_and_sums(config, params, tokens_bt, positions_bt, segments_bt)[0]


def hidden_and_sums(
    config: ModelConfig,
    params: Params,
    tokens_bt: jax.Array,
    positions_bt: jax.Array,
    segments_bt: jax.Array,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Sums]:
    """As `hidden`, and the mean over layers of what they report (`moe.router_sums`). `key`: of
    dropout, which there is only with one."""
    x_btd, _, sums = _run(
        config, params, tokens_bt, positions_bt, segments_bt, segments_bt, 0, None, key
    )
    return x_btd, sums


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
    x_btd, cache_out, _ = _run(
        config, params, tokens_bt, positions_bt, segments_bt, segments_bs, offset, cache
    )
    if cache_out is None:
        raise UserError(f"config.model.layer: {config.layer} returns no cache, so cannot generate")
    return x_btd, cache_out


def logits(config: ModelConfig, params: Params, x_btd: jax.Array) -> jax.Array:
    """Float32 logits [b, t, v] of final hidden states."""
    w_vd = unembedding(config, params).astype(x_btd.dtype)
    logits_btv = jnp.einsum("btd,vd->btv", x_btd, w_vd, preferred_element_type=jnp.float32)
    cap = config.final_soft_cap
    return logits_btv if cap is None else cap * jnp.tanh(logits_btv / cap)


def unembedding(config: ModelConfig, params: Params) -> jax.Array:
    """The output matrix [v, d], gathered over fsdp, muP's or T5's output scale included."""
    w_vd = params["embedding"] if config.tie_embeddings else params["unembedding"]
    w_vd = jax.reshard(w_vd, spec(("vocab", "d_model"), gathered=True))
    if config.tie_embeddings and config.parametrization == "mup":
        w_vd = w_vd * (config.base_d_model / config.d_model)
    return w_vd * config.d_model**-0.5 if config.scale_output else w_vd


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
    key: jax.Array | None = None,
) -> tuple[jax.Array, Cache | None, Sums]:
    graph, block_graph, _ = _abstract(config)
    decoder = nnx.merge(graph, params)
    ropes = _ropes(config, positions_bt)
    context = Context(positions_bt, segments_bt, segments_bs, offset, ropes[0])
    x_btd = _embed(config, decoder, tokens_bt, positions_bt, key)

    def block(local: bool | None, x_btd: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        weights, cache, key, scanned = layer
        window, rope = _seen(config, scanned if local is None else local, ropes)
        here = context._replace(window=window, rope=rope, key=key)
        x_btd, cache, *sums = nnx.merge(block_graph, weights)(x_btd, here, cache)
        return x_btd, (cache, sums[0] if sums else {})

    x_btd, (cache, sums) = _through(config, block, x_btd, params["layers"], cache, key)
    norm: Norm | None = decoder.norm
    sums = {name: x.mean() for name, x in sums.items()}
    return x_btd if norm is None else norm(x_btd), cache, sums


def _embed(
    config: ModelConfig, decoder: Decoder, tokens: jax.Array, where: jax.Array, key: Any
) -> jax.Array:
    like = jnp.zeros((), compute_dtype(config))
    out = spec(("batch", "seq", None))
    # The table is gathered whole: a lookup in a vocab-sharded table has no cheap rule.
    x_btd = (
        jax.reshard(use(decoder.embedding, like), P(None, None)).at[tokens].get(out_sharding=out)
    )
    if config.scale_embeddings:
        x_btd = x_btd * config.d_model**0.5
    if config.positions == "learned":
        x_btd = x_btd + use(decoder.positions, like).at[where].get(out_sharding=out)
    return dropout(x_btd, config.dropout, key, 0)


def _ropes(config: ModelConfig, positions_bt: jax.Array) -> list[Rope | None]:
    """Of global layers and of local ones."""
    if config.positions != "rope":
        return [None, None]
    rope = rotary(config, positions_bt)
    return [rope, rope if config.local_rope_theta is None else rotary(config, positions_bt, True)]


def _seen(config: ModelConfig, local: Any, ropes: list[Rope | None]) -> tuple[Any, Rope | None]:
    """The window and the rotation of a layer; `local` is a bool, or a scanned array of them."""
    if isinstance(local, bool) or config.sliding_window is None:
        return config.sliding_window if local else None, ropes[local]
    window = jnp.where(local, config.sliding_window, jnp.iinfo(jnp.int32).max)
    if ropes[0] is ropes[1]:
        return window, ropes[0]
    return window, jax.tree.map(lambda far, near: jnp.where(local, near, far), *ropes)


def _through(
    config: ModelConfig, block: Any, x_btd: jax.Array, layers: Params, cache: Any, key: Any
) -> tuple[jax.Array, tuple[Any, Sums]]:
    """All blocks in order: one scanned body, or unrolled. Caches and sums come back stacked."""
    n, local = config.n_layers, config.local

    def of(local: bool | None) -> Any:
        f = functools.partial(block, local)
        if config.remat == "none":
            return f
        saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(f, policy=saved if config.remat == "dots" else None)

    keys = None if key is None else jax.random.split(jax.random.fold_in(key, 1), n)
    if config.scan_layers:
        alike = len(set(local)) == 1
        scanned = None if alike else jnp.array(local)
        body = of(local[0] if alike else None)
        return jax.lax.scan(body, x_btd, (layers, cache, keys, scanned))
    outs = []
    for i, weights in enumerate(unstack(layers, n)):
        here = jax.tree.map(lambda a, i=i: a[i], (cache, keys))
        x_btd, out = of(local[i])(x_btd, (weights, *here, None))
        outs.append(out)
    return x_btd, jax.tree.map(lambda *a: jnp.stack(a), *outs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstack(layers: Params, n: int) -> list[Params]:
    """[l, …] leaves → n trees. Its gradient is one stack, not n padded copies added up."""
    return [jax.tree.map(lambda a, i=i: a[i], layers) for i in range(n)]


def _unstack_fwd(layers: Params, n: int) -> tuple[list[Params], None]:
    return unstack(layers, n), None


def _unstack_bwd(n: int, _: None, grads: list[Params]) -> tuple[Params]:
    return (jax.tree.map(lambda *g: jnp.stack(g), *grads),)


unstack.defvjp(_unstack_fwd, _unstack_bwd)
