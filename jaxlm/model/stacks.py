"""Stacks of blocks: their parameters, and running an input through them, scanned or unrolled.

A decoder (GPT) is a causal stack, an encoder (BERT) one that looks both ways; an encoder–decoder
(T5) has one of each, the causal one with cross-attention.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm import mesh
from jaxlm.config import ModelConfig
from jaxlm.mesh import spec
from jaxlm.model import pipeline, ring
from jaxlm.model.layers import Block, Context, Memory
from jaxlm.model.moe import Sums, router_sums
from jaxlm.model.parts import Norm, declare, use
from jaxlm.model.positions import Rope, relative_bucket, rotary
from jaxlm.pyfile import resolve

Params = dict[str, Any]


def block_class(config: ModelConfig, cross: bool = False) -> Any:
    if config.layer:
        return resolve(config.layer, "config.model.layer")
    return functools.partial(Block, cross=cross)


def declare_stack(
    module: Any, config: ModelConfig, n_layers: int, cross: bool, rngs: nnx.Rngs
) -> None:
    """Gives `module` its blocks, stacked on a leading layer axis, and what stands around them."""
    block = block_class(config, cross)
    keys = jax.random.split(rngs.params(), n_layers)
    module.layers = jax.vmap(lambda key: block(config, rngs=nnx.Rngs(params=key)))(keys)
    final = config.norm_placement != "post"
    module.norm = Norm(config.d_model, "d_model", config, rngs=rngs) if final else None
    if config.positions == "relative":
        shape = (config.relative_buckets, config.n_heads)
        module.relative = declare(rngs, shape, ("buckets", "heads"), "bias", 0.0)


class Encoder(nnx.Module):
    """The first stack of an encoder–decoder; embeddings are shared with the second."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        declare_stack(self, config, config.encoder_layers, False, rngs)


class MaskedHead(nnx.Module):
    """BERT's: a dense layer, an activation and a norm before the unembedding, a bias after it."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        d, v = config.d_model, config.vocab_size
        self.dense = declare(rngs, (d, d), ("d_model", "d_out"), "hidden", d**-0.5)
        self.bias = declare(rngs, (d,), ("d_out",), "bias", 0.0)
        self.norm = Norm(d, "d_model", config, rngs=rngs)
        self.output_bias = declare(rngs, (v,), ("vocab",), "bias", 0.0)


class Dense(nnx.Module):
    """One matrix and a bias, for a share `active` of the tokens."""

    def __init__(self, n_in: int, n_out: int, axis: str, active: float, *, rngs: nnx.Rngs) -> None:
        axes, std = ("d_model", axis), n_in**-0.5
        self.weight = declare(rngs, (n_in, n_out), axes, "hidden", std, active)
        self.bias = declare(rngs, (n_out,), (axis,), "bias", 0.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ use(self.weight, x) + use(self.bias, x)


class Model(nnx.Module):
    """All parameters of a decoder, an encoder, or an encoder–decoder (then the decoder's are where
    a decoder's alone would be, and the encoder's in `encoder`)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        v, d = config.vocab_size, config.d_model
        untied_mup = config.parametrization != "standard" and not config.tie_embeddings
        # T5's output scale expects embeddings of size 1, as in its own code.
        std = 1.0 if untied_mup or config.scale_output else 0.02
        self.embedding = declare(rngs, (v, d), ("vocab", "d_model"), "embedding", std)
        if config.positions == "learned":
            shape, axes = (config.seq_len, d), ("positions", "d_model")
            self.positions = declare(rngs, shape, axes, "embedding", 0.02)
        if config.n_token_types:
            shape, axes = (config.n_token_types, d), ("types", "d_model")
            self.token_types = declare(rngs, shape, axes, "embedding", 0.02)
        if config.embedding_norm:
            self.embedding_norm = Norm(d, "d_model", config, rngs=rngs)
        both = config.architecture == "encoder_decoder"
        if both:
            self.encoder = Encoder(config, rngs=rngs)
        declare_stack(self, config, config.n_layers, both, rngs)
        if config.mlm_head:
            self.masked = MaskedHead(config, rngs=rngs)
        if config.pooler:
            self.pooler = Dense(d, d, "d_out", 1 / config.seq_len, rngs=rngs)
        if config.n_classes:
            share = 1.0 if config.pooling == "each" else 1 / config.seq_len
            self.classifier = Dense(d, config.n_classes, "classes", share, rngs=rngs)
        if not config.tie_embeddings:
            std = 0.0 if untied_mup else 0.02
            self.unembedding = declare(rngs, (v, d), ("vocab", "d_model"), "unembedding", std)


# ----------------------------------------------------------------------------------------- running


@functools.lru_cache(maxsize=64)
def _block_graph(config: ModelConfig, cross: bool) -> Any:
    block = block_class(config, cross)
    return nnx.split(nnx.eval_shape(lambda: block(config, rngs=nnx.Rngs(params=0))))[0]


def run(
    config: ModelConfig,
    stack: Any,
    layers: Params,
    x_btd: jax.Array,
    context: Context,
    cache: Any = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Any, Sums]:
    """Through all blocks of `stack` (a Model or Encoder; `layers`: their weights as plain dicts)
    and the norm behind them. Caches come back stacked, sums as means over the layers."""
    zigzag = ring.balanced(context.causal, context.prefix_bs)
    if zigzag:
        x_btd = ring.to_zigzag(x_btd)
        context = context._replace(
            positions_bt=ring.to_zigzag(context.positions_bt),
            segments_bt=ring.to_zigzag(context.segments_bt),
            segments_bs=ring.to_zigzag(context.segments_bs),
        )
    if config.positions == "relative":
        s = context.segments_bs.shape[1]
        bias_hts = _relative(config, stack.relative, x_btd.shape[1], s, context)
        context = context._replace(bias_hts=bias_hts)
    n = len(layers) if isinstance(layers, tuple) else len(jax.tree.leaves(layers)[0])
    local = config.local if config.sliding_window is not None else (False,) * n
    if mesh.size(mesh.STAGE) > 1:
        x_btd, sums = _through_stages(config, x_btd, layers, context, local, key)
        cache = None
    else:
        keys = None if key is None else jax.random.split(key, n)
        x_btd, (cache, sums) = _through(config, x_btd, layers, context, local, cache, keys)
    sums = {name: x.mean() for name, x in router_sums(sums).items()}
    x_btd = ring.from_zigzag(x_btd) if zigzag else x_btd
    return x_btd if stack.norm is None else stack.norm(x_btd), cache, sums


def _through_stages(
    config: ModelConfig,
    x_btd: jax.Array,
    layers: Params,
    context: Context,
    local: tuple[bool, ...],
    key: jax.Array | None,
) -> tuple[jax.Array, Sums]:
    """All blocks, each stage with its own (`model.pipeline`)."""
    alike, memory = len(set(local)) == 1, context.memory
    flags = None if alike else jax.reshard(jnp.array(local), spec(("layers",)))
    keys = None if key is None else jax.random.key_data(jax.random.split(key, len(local)))
    keys = None if keys is None else jax.reshard(keys, spec(("layers", None)))
    segments_bm = None if memory is None else memory.segments_bs
    rows = (*context[:3], context.prefix_bs, segments_bm)
    remembered = None if memory is None else memory[:2]

    def through(
        bias_hts: Any, x_btd: Any, rows: Any, layers: Any, remembered: Any, number: Any
    ) -> Any:
        weights, flags, keys = layers
        positions_bt, segments_bt, segments_bs, prefix_bs, segments_bm = rows
        here = Context(
            positions_bt, segments_bt, segments_bs, 0, None, causal=context.causal,
            prefix_bs=prefix_bs, bias_hts=bias_hts,
        )  # fmt: skip
        if remembered is not None:
            keys_bsgk, values_bsgk = remembered
            here = here._replace(memory=Memory(keys_bsgk, values_bsgk, segments_bm))
        n = len(jax.tree.leaves(weights)[0])
        if keys is not None:
            each = jax.random.wrap_key_data(keys)
            keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(each)
        known = local[:n] if flags is None else flags
        x_btd, (_, sums) = _through(config, x_btd, weights, here, known, None, keys)
        return x_btd, sums

    return pipeline.run(
        through, context.bias_hts, x_btd, rows, (layers, flags, keys), remembered,
        config.pipeline_repeats, config.pipeline_microbatches,
    )  # fmt: skip


def remember(
    config: ModelConfig, layers: Params, x_bsd: jax.Array, segments_bs: jax.Array
) -> Memory:
    """Keys and values of every layer's cross-attention to an encoder's output."""
    graph = _block_graph(config, True)

    def of(x_bsd: jax.Array, layer: Params) -> tuple[jax.Array, jax.Array]:
        return nnx.merge(graph, layer).cross_attention.keys_values(x_bsd)

    def of_all(layers: Params, x_bsd: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.map(functools.partial(of, x_bsd), layers)

    if isinstance(layers, tuple):  # each one's apart, and so what it looks at
        own = [of(x_bsd, layer) for layer in layers]
        return Memory(tuple(k for k, _ in own), tuple(v for _, v in own), segments_bs)
    each = pipeline.by_stage if mesh.size(mesh.STAGE) > 1 else lambda f, *args: f(*args)
    keys, values = each(of_all, layers, x_bsd)
    return Memory(keys, values, segments_bs)


def _ropes(config: ModelConfig, positions_bt: jax.Array) -> list[Rope | None]:
    """Of global layers and of local ones."""
    if config.positions != "rope":
        return [None, None]
    rope = rotary(config, positions_bt)
    return [rope, rope if config.local_rope_theta is None else rotary(config, positions_bt, True)]


def _relative(config: ModelConfig, table: nnx.Param, t: int, s: int, context: Context) -> jax.Array:
    """What T5 adds to the scores, float32 [h, t, s]: a number per head and bucket of distances,
    the same in all layers."""
    slots_t, slots_s = jnp.arange(t), jnp.arange(s)
    if ring.balanced(context.causal, context.prefix_bs):
        slots_t = slots_s = jnp.asarray(ring.order(t))
    distance_ts = slots_s[None, :] - (context.offset + slots_t)[:, None]
    both_ways = not context.causal
    buckets = config.relative_buckets, config.relative_distance
    bucket_ts = relative_bucket(distance_ts, *buckets, both_ways=both_ways)
    layout = spec(("seq", None, "heads"))
    bias_tsh = use(table, jnp.zeros((), jnp.float32)).at[bucket_ts].get(out_sharding=layout)
    return bias_tsh.transpose(2, 0, 1)


def _seen(config: ModelConfig, local: Any, ropes: list[Rope | None]) -> tuple[Any, Rope | None]:
    """The window and the rotation of a layer; `local` is a bool, or a scanned array of them."""
    if isinstance(local, bool) or config.sliding_window is None:
        return config.sliding_window if local else None, ropes[local]
    window = jnp.where(local, config.sliding_window, jnp.iinfo(jnp.int32).max)
    if ropes[0] is ropes[1]:
        return window, ropes[0]
    return window, jax.tree.map(lambda far, near: jnp.where(local, near, far), *ropes)


def _through(
    config: ModelConfig,
    x_btd: jax.Array,
    layers: Params,
    context: Context,
    local: tuple[bool, ...] | jax.Array,
    cache: Any,
    keys: jax.Array | None,
) -> tuple[jax.Array, tuple[Any, Sums]]:
    """Blocks in order: one scanned body, or unrolled. Caches and sums come back stacked; caches do
    not where `layers` is a tuple of each one's weights (and `cache` of each one's, too).

    `local`: which of them see only the sliding window."""
    memory, separate = context.memory, isinstance(layers, tuple)
    n = len(layers) if separate else len(jax.tree.leaves(layers)[0])
    graph = _block_graph(config, memory is not None)
    ropes = _ropes(config, context.positions_bt)

    def block(local: bool | None, x_btd: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        weights, cache, key, remembered, scanned = layer
        window, rope = _seen(config, scanned if local is None else local, ropes)
        here = context._replace(window=window, rope=rope, key=key)
        if memory is not None:
            keys_bsgk, values_bsgk = remembered
            here = here._replace(memory=Memory(keys_bsgk, values_bsgk, memory.segments_bs))
        x_btd, cache, *sums = nnx.merge(graph, weights)(x_btd, here, cache)
        return x_btd, (cache, sums[0] if sums else {})

    def of(local: bool | None) -> Any:
        f = functools.partial(block, local)
        if config.remat == "none":
            return f
        saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(f, policy=saved if config.remat == "dots" else None)

    remembered = None if memory is None else memory[:2]
    if (config.scan_layers and not separate) or isinstance(local, jax.Array):
        alike = isinstance(local, tuple) and len(set(local)) == 1
        scanned = None if alike else jnp.asarray(local)
        body = of(bool(local[0]) if alike else None)
        return jax.lax.scan(body, x_btd, (layers, cache, keys, remembered, scanned))
    caches, sums = [], []
    for i, weights in enumerate(layers if separate else unstack(layers, n)):
        own = cache[i] if separate and cache is not None else _at(cache, i)
        seen = None if remembered is None else tuple(a[i] for a in remembered)
        here = weights, own, _at(keys, i), seen, None
        x_btd, (own, more) = of(local[i])(x_btd, here)
        caches.append(own)
        sums.append(more)
    return x_btd, (tuple(caches) if separate else _stacked(caches), _stacked(sums))


def _at(stacked: Any, i: int) -> Any:
    return jax.tree.map(lambda a: a[i], stacked)


def _stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *a: jnp.stack(a), *trees)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstack(layers: Params, n: int) -> list[Params]:
    """[l, …] leaves → n trees. Its gradient is one stack, not n padded copies added up."""
    return [jax.tree.map(lambda a, i=i: a[i], layers) for i in range(n)]


def _unstack_fwd(layers: Params, n: int) -> tuple[list[Params], None]:
    return unstack(layers, n), None


def _unstack_bwd(n: int, _: None, grads: list[Params]) -> tuple[Params]:
    return (jax.tree.map(lambda *g: jnp.stack(g), *grads),)


unstack.defvjp(_unstack_fwd, _unstack_bwd)
