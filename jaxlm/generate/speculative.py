"""Speculative decoding: a small draft proposes tokens, the model reads them all in one pass.

Each round the draft proposes tokens x, each drawn from its probabilities q; one pass of the model
gives its own p at each of them. x is kept with probability min(1, p(x) / q(x)); in place of the
first that is not, one is drawn from max(p - q, 0), scaled to sum to 1, and where all are kept one
more from p (Leviathan et al. 2023, algorithm 1). So what is said has the model's own distribution,
and greedy answers are its own: the draft only decides how many passes it takes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from jaxlm import mesh
from jaxlm.config import ModelConfig
from jaxlm.generate import decode, layout
from jaxlm.generate import sampling as draws
from jaxlm.generate.decode import Begun, Prompts
from jaxlm.generate.sampling import Knobs, Method, Sampling
from jaxlm.model import transformer
from jaxlm.model.transformer import Params
from jaxlm.schema import UserError

WIDTH = 4  # proposals a round
_NONE = -1  # in place of a token


class Draft(NamedTuple):
    """A model with the same vocabulary."""

    config: ModelConfig
    params: Params


class Drafted(NamedTuple):
    """What follows a prompt, int32 [tokens] without the end of text, and how many passes it took
    besides that over the prompt."""

    ids: np.ndarray
    passes: int


def generate(
    config: ModelConfig,
    params: Params,
    draft: Draft,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    eos_id: int | None,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    width: int = WIDTH,
) -> list[Drafted]:
    """As `decode.generate`, prompt by prompt. The j-th copy of a prompt is continued in the
    same way under the same seed, draft and `width`.

    Raises UserError as that does, for a model that is no decoder, another vocabulary, penalties and
    bias, and a mesh that cuts batches up.
    """
    for one in (config, draft.config):
        if one.architecture != "decoder" or one.prefix_attention:
            raise UserError("draft: expected two decoders that only look back")
        decode.check(one, prompts, max_new_tokens)
    if draft.config.vocab_size != config.vocab_size:
        raise UserError(
            f"draft: expected the model's {config.vocab_size:,} tokens,"
            f" got {draft.config.vocab_size:,}"
        )
    sampling = draws.validate(sampling, config.vocab_size)
    method = draws.method([sampling])
    if method.alters:
        raise UserError("draft: expected no penalties and no logit_bias, which it would not see")
    if mesh.parts("batch") > 1:
        raise UserError("draft: expected a mesh that does not cut batches up (data, fsdp: 1)")
    shape = decode.slots(max_new_tokens), width, method
    run = _speculator(config, draft.config, *shape, jax.sharding.get_mesh())
    knobs = jax.tree.map(lambda a: a[0], draws.knobs([sampling], config.vocab_size))
    end, out = np.int32(_NONE if eos_id is None else eos_id), []
    for prompt, stream in zip(prompts, draws.streams(prompts, sampling.seed), strict=True):
        given = decode.place([prompt]), stream, knobs, np.int32(max_new_tokens), end
        ids, passes = map(np.asarray, run(params, draft.params, *given))
        ids = ids[:max_new_tokens]
        ended = (ids == end) | (ids == _NONE)
        out.append(Drafted(ids[: np.argmax(ended)] if ended.any() else ids, int(passes)))
    return out


@functools.lru_cache(maxsize=16)
def _speculator(
    config: ModelConfig, small: ModelConfig, new: int, width: int, method: Method, devices: Any
) -> Any:
    """Jitted (params, draft params, one prompt, stream [2], knobs, limit, eos_id) → int32
    [new + width + 1], -1 behind the last token, and the passes."""
    del devices  # part of the key: traced for the mesh that is set

    def run(
        params: Params, draft_params: Params, prompts: Prompts, stream_2: Any, knobs: Knobs,
        limit: Any, eos_id: Any,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        room = new + width + 1
        laid = layout.laid_out(config, params)
        small_laid = layout.laid_out(small, draft_params)
        model = decode.begin(config, laid, prompts, room)
        draft = decode.begin(small, small_laid, prompts, room)
        shares = jax.vmap(lambda logits_v: draws.shares(method, logits_v, knobs))

        def unfinished(carry: Any) -> jax.Array:
            n, ended = carry[:2]
            return (n < limit) & ~ended

        def propose(carry: Any, key: jax.Array) -> Any:
            at, token, cache = carry
            logits_tv, cache = _read(small, small_laid, draft, at, token[None], cache)
            [q_v] = shares(logits_tv)
            token = draws.drawn(key, q_v)
            return (at + 1, token, cache), (token, q_v)

        def step(carry: Any) -> Any:
            n, _, passes, last, ids_n, cache, draft_cache = carry
            keys = _keys(stream_2, _first(draft.lengths_b) + n, width + 1)
            begin: Any = n, last, draft_cache
            (*_, draft_cache), (x_t, q_tv) = jax.lax.scan(propose, begin, keys[:, 0])
            fed_t = jnp.concatenate([last[None], x_t[:width]])
            logits_tv, cache = _read(config, laid, model, n, fed_t, cache)
            said_t, k = verified(shares(logits_tv), q_tv[:width], x_t[:width], keys[:, 1:])
            said = jnp.arange(width + 1) <= k
            ids_n = jax.lax.dynamic_update_slice(ids_n, jnp.where(said, said_t, _NONE), (n,))
            ended = jnp.any(said & (said_t == eos_id))
            return n + k + 1, ended, passes + 1, said_t[k], ids_n, cache, draft_cache

        nothing = jnp.full(room, _NONE, jnp.int32)
        begin = jnp.int32(0), jnp.bool(False), jnp.int32(0), _first(model.last_b), nothing
        found = jax.lax.while_loop(unfinished, step, (*begin, model.cache, draft.cache))
        return found[4], found[2]

    return jax.jit(run)


def verified(
    p_tv: jax.Array, q_wv: jax.Array, x_w: jax.Array, keys_t2: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Which of the proposals `x` (drawn from q) are kept: the tokens [w + 1] that are said, one of
    them not the draft's, and its place k, behind which they mean nothing."""
    width = len(x_w)
    at_w = jnp.arange(width)
    u_w = jax.vmap(jax.random.uniform)(keys_t2[:width, 0])
    kept_w = u_w * q_wv[at_w, x_w] < p_tv[at_w, x_w]
    k = jnp.argmin(jnp.append(kept_w, False))
    p_v, q_v = p_tv[k], jnp.append(q_wv, jnp.zeros_like(p_tv[:1]), axis=0)[k]
    rest_v = jnp.maximum(p_v - q_v, 0.0)
    rest_v = jnp.where(rest_v.sum() > 0, rest_v, p_v)  # p = q but for rounding
    own = draws.drawn(keys_t2[k, 1], rest_v)
    return jnp.where(jnp.arange(width + 1) < k, jnp.append(x_w, own), own), k


def _keys(stream_2: jax.Array, position: jax.Array, t: int) -> jax.Array:
    """Of what is drawn after each of t positions three: the proposal, whether it is kept, another.
    A position that comes again in the next round was behind the last token then, and nothing that
    was drawn for it has been looked at."""
    key = jax.random.wrap_key_data(stream_2, impl="threefry2x32")
    each_t = jax.vmap(lambda at: jax.random.fold_in(key, at))(position + jnp.arange(t))
    return jax.vmap(lambda key: jax.random.split(key, 3))(each_t)


def _read(
    config: ModelConfig, laid: Params, begun: Begun, n: jax.Array, tokens_t: jax.Array, cache: Any
) -> tuple[jax.Array, Any]:
    """What follows each of t tokens, the first of which is fed in step n: float32 [t, v]."""
    at_bt = (begun.lengths_b - 1 + n)[:, None] + jnp.arange(len(tokens_t))
    if config.positions == "learned":  # behind the last one is nothing that is kept
        at_bt = jnp.minimum(at_bt, config.seq_len - 1)
    x_btd, cache = transformer.hidden_cached(
        config, laid, tokens_t[None], at_bt, jnp.ones_like(at_bt), begun.segments_bs,
        begun.first + n, cache,
    )  # fmt: skip
    return jax.reshard(transformer.logits(config, laid, x_btd), P())[0], cache


def _first(x_b: jax.Array) -> jax.Array:
    return jax.reshard(x_b, P())[0]
