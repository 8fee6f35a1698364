"""Beam search: the most likely whole answers, not the most likely next token each time.

The `n` best unfinished answers of each prompt go on together. Each step looks at the 2·n best
continuations of all of them: those among the first n that end are kept as finished, and the n best
that do not end go on. A finished answer of t tokens, its end counted, is worth log p / tᵃ with a
the length penalty (Wu et al. 2016, eq. 14, in the simpler form that `transformers` has). A prompt
is done when its best unfinished answer, ended now, would be worth less than its worst finished one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from jaxlm.config import ModelConfig
from jaxlm.generate import decode, layout
from jaxlm.generate.decode import Prompts
from jaxlm.mesh import spec
from jaxlm.model.transformer import Params
from jaxlm.schema import UserError

_NOTHING = -1e9  # the worth of an answer that is not there
_NONE = -1  # in place of a token


def search(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    eos_id: int | None,
    n_beams: int,
    length_penalty: float = 1.0,
) -> list[list[np.ndarray]]:
    """The `n_beams` best answers to each prompt, best first, int32 [tokens] without `eos_id`.

    An answer that is `max_new_tokens` long counts as finished. Raises UserError as
    `decode.generate`, and for fewer than two beams or less than one for each two tokens.
    """
    decode.check(config, prompts, max_new_tokens)
    if not 2 <= 2 * n_beams <= config.vocab_size:
        raise UserError(f"num_beams: expected 1 … {config.vocab_size // 2}, got {n_beams}")
    if not prompts:
        return []
    devices = jax.sharding.get_mesh()
    run = _searcher(config, decode.slots(max_new_tokens), n_beams, devices)
    end = np.int32(_NONE if eos_id is None else eos_id)
    given = decode.place(prompts), np.int32(max_new_tokens), end, np.float32(length_penalty)
    found = np.asarray(run(params, *given))[: len(prompts), :, :max_new_tokens]
    return [[beam[beam != _NONE] for beam in beams] for beams in found]


class Beams(NamedTuple):
    """Of each of b prompts: n unfinished answers, and the n best finished ones."""

    tokens_bnt: jax.Array  # int32, -1 where nothing is yet
    scores_bn: jax.Array  # float32, log p, best first
    done_bnt: jax.Array  # int32, -1 from the end on
    worth_bn: jax.Array  # float32, best first
    open_b: jax.Array  # bool: may still find better ones


@functools.lru_cache(maxsize=16)
def _searcher(config: ModelConfig, new: int, n: int, devices: Any) -> Any:
    """Jitted (params, prompts, limit, eos_id, penalty) → int32 [b, n, new]."""
    del devices  # part of the key: traced for the mesh that is set

    def run(params: Params, prompts: Prompts, limit: Any, eos_id: Any, penalty: Any) -> jax.Array:
        laid = layout.laid_out(config, params, rows=n * len(prompts.lengths_b))
        begun = decode.begin(config, laid, prompts, new)
        first = jax.tree.map(lambda a: _repeated(a, n), (begun.lengths_b, begun.last_b))
        again = [jax.tree.map(lambda a: _repeated(a, n), x) for x in (begun.cache, begun.memory)]
        begun = begun._replace(
            lengths_b=first[0], last_b=first[1], memory=again[1],
            segments_bs=_repeated(begun.segments_bs, n),
        )  # fmt: skip
        here = prompts.lengths_b > 0

        def unfinished(carry: Any) -> jax.Array:
            i, _, _, beams = carry
            return (i < limit) & jnp.any(beams.open_b)

        def step(carry: Any) -> Any:
            i, last_b, cache, beams = carry
            logits_bv, cache = begun.logits(config, laid, i, last_b, cache)
            beams, parents_bn = advanced(beams, logits_bv, i, limit, eos_id, penalty)
            last_b = beams.tokens_bnt[:, :, i].reshape(-1, out_sharding=spec(("batch",)))
            return i + 1, last_b, _taken(cache, parents_bn), beams

        start = jnp.int32(0), begun.last_b, again[0], _empty(here, n, new)
        return jax.reshard(jax.lax.while_loop(unfinished, step, start)[3].done_bnt, P())

    return jax.jit(run)


def advanced(
    beams: Beams, logits_bv: jax.Array, i: Any, limit: Any, eos_id: Any, penalty: Any
) -> tuple[Beams, jax.Array]:
    """After step i with logits [b · n, v]; and of which beam each one is a continuation, [b, n]."""
    b, n, _ = beams.tokens_bnt.shape
    v = logits_bv.shape[-1]
    wide = spec(("batch", None, None))
    log_p_bnv = jax.nn.log_softmax(logits_bv).reshape(b, n, v, out_sharding=wide)
    total_bm = (log_p_bnv + beams.scores_bn[..., None]).reshape(
        b, n * v, out_sharding=spec(("batch", None))
    )
    scores_bk, at_bk = jax.lax.top_k(total_bm, 2 * n)
    from_bk, token_bk = at_bk // v, (at_bk % v).astype(jnp.int32)
    tokens_bkt = _picked(beams.tokens_bnt, from_bk)
    whole = i + 1 == limit
    ends_bk = (token_bk == eos_id) | whole
    written_bkt = tokens_bkt.at[:, :, i].set(token_bk)

    _, goes_bn = jax.lax.top_k(jnp.where(ends_bk, scores_bk + _NOTHING, scores_bk), n)
    # Only the first n may end: the others are there so that n can go on.
    ended_bk = ends_bk & (jnp.arange(2 * n) < n) & beams.open_b[:, None]
    length = (i + 1).astype(jnp.float32) ** penalty
    worth_bm = jnp.concatenate(
        [beams.worth_bn, jnp.where(ended_bk, scores_bk / length, _NOTHING)], axis=1
    )
    bare_bkt = jnp.where((token_bk == eos_id)[..., None], tokens_bkt, written_bkt)
    worth_bn, best_bn = jax.lax.top_k(worth_bm, n)
    done_bnt = _picked(jnp.concatenate([beams.done_bnt, bare_bkt], axis=1), best_bn)

    scores_bn = _picked(scores_bk, goes_bn)
    full_b = worth_bn[:, -1] > _NOTHING / 2
    better_b = scores_bn[:, 0] / length > worth_bn[:, -1]
    open_b = beams.open_b & (~full_b | better_b) & ~whole
    running = _picked(written_bkt, goes_bn), scores_bn
    return Beams(*running, done_bnt, worth_bn, open_b), _picked(from_bk, goes_bn)


def _empty(here_b: jax.Array, n: int, new: int) -> Beams:
    """Before the first step, when only one beam of each prompt is there."""
    b = here_b.shape[0]
    rows = functools.partial(jnp.full, out_sharding=spec(("batch", None)))
    nothing = jnp.full((b, n, new), _NONE, jnp.int32, out_sharding=spec(("batch", None, None)))
    worth_bn = rows((b, n), jnp.float32(_NOTHING))
    scores_bn = jnp.where(jnp.arange(n) == 0, 0.0, worth_bn)
    return Beams(nothing, scores_bn, nothing, worth_bn, here_b)


def _repeated(rows: jax.Array, n: int) -> jax.Array:
    """Each row n times, one after another."""
    sharding = jax.typeof(rows).sharding.spec
    return jnp.repeat(rows, n, axis=0, out_sharding=sharding)


def _picked(x_bn: jax.Array, which_bk: jax.Array) -> jax.Array:
    """[b, k, …]: of each row of [b, n, …] the entries `which`."""
    shape = which_bk.shape + (1,) * (x_bn.ndim - 2)
    return jnp.take_along_axis(x_bn, which_bk.reshape(shape), axis=1)


def _taken(cache: Any, parents_bn: jax.Array) -> Any:
    """The cache of each beam's parent, rows [b · n]."""
    b, n = parents_bn.shape

    def of(a: jax.Array) -> jax.Array:
        split = a.reshape(b, n, *a.shape[1:])
        return _picked(split, parents_bn).reshape(a.shape)

    return jax.tree.map(of, cache)
