"""What is to be predicted from what: rows of text, corrupted on the device.

A corruption is a pure function of one row of a Batch (its leaves are [t]) and a key, with static
shapes; `corrupted` maps it over a batch with a key per row, so that neither the mesh nor the way a
batch is split changes what it draws. The loss of every Example is `losses.cross_entropy`. Special
ids are counted down from `corruption.top_id` (None: the last id of the vocabulary, and then text is
kept from them: `Config.text_ids`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import UL2, UL2_MODES, Config
from jaxlm.mesh import spec
from jaxlm.model.transformer import Source

START = 0  # what a second stack's first token follows, as in T5


class Example(NamedTuple):
    """What `losses.cross_entropy` takes; the first five as in Batch, [b, t] each."""

    tokens: Any
    targets: Any
    weights: Any
    segment_ids: Any
    positions: Any
    source: Source | None = None  # of an encoder–decoder
    prefix: Any = None  # bool: tokens that earlier ones see too


def corrupted(config: Config, batch: Any, key: jax.Array) -> Example:
    """The batch as `train.objective` wants it: what a model reads and has to say."""
    make = CORRUPTIONS[config.train.objective]
    if make is None:
        return Example(*batch[:5])
    keys_b = jax.reshard(jax.random.split(key, batch.tokens.shape[0]), spec(("batch",)))
    by_row = jax.vmap(lambda row, key: make(config, row, key))
    layout = spec(("batch",))
    return jax.shard_map(by_row, in_specs=(layout, layout), out_specs=layout)(batch, keys_b)


def _real(row: Any) -> jax.Array:
    """Bool [t]: what is no padding, which is a last document without any weight."""
    last_t = row.segment_ids == row.segment_ids[-1]
    empty = jnp.sum(jnp.where(last_t, row.weights, 0.0)) == 0
    return (row.segment_ids != 0) & ~(last_t & empty)


def _special(config: Config, number: Any) -> Any:
    """Special id 0, 1, …, downwards."""
    top = config.train.corruption.top_id
    return (config.model.vocab_size - 1 if top is None else top) - number


# ---------------------------------------------------------------------------------------- masked LM


def masked_lm(config: Config, row: Any, key: jax.Array) -> Example:
    """A share of the tokens is to be told from the rest; of these 80 % become the mask, 10 % any
    token, 10 % stay (Devlin et al. 2019, §3.1). `whole_words`: all tokens of a word, or none."""
    c, t = config.train.corruption, row.tokens.shape[0]
    chosen_key, how_key, token_key = jax.random.split(key, 3)
    draw_t = jax.random.uniform(chosen_key, (t,))
    if c.whole_words:
        draw_t = draw_t[jnp.cumsum(row.words) - row.words[0]]
    chosen_t = draw_t < c.rate
    how_t = jax.random.uniform(how_key, (t,))
    any_t = jax.random.randint(token_key, (t,), 0, config.text_ids)
    other_t = jnp.where(how_t < 0.8, _special(config, 0), jnp.where(how_t < 0.9, any_t, row.tokens))
    real_t = _real(row) & (row.weights.sum() > 0)  # rows of weight 0 only fill up
    return Example(
        tokens=jnp.where(chosen_t, other_t, row.tokens),
        targets=row.tokens,
        weights=(chosen_t & real_t).astype(jnp.float32),
        segment_ids=row.segment_ids,
        positions=row.positions,
    )


# ---------------------------------------------------------------------------------- span corruption


def span_corruption(config: Config, row: Any, key: jax.Array) -> Example:
    """Spans of the text are taken out for a sentinel each; the decoder says sentinel and span in
    turn, and a last sentinel (Raffel et al. 2020, §3.1.4). A row is one text, as in T5."""
    noise, spans = config.train.corruption.spans(len(row.tokens))
    return _without_spans(config, row, key, noise, spans)


def _without_spans(
    config: Config, row: Any, key: jax.Array, noise: Any, spans: Any, mode: Any = None
) -> Example:
    t, length = row.tokens.shape[0], config.model.decoder_len
    real_t = _real(row)
    out_t = noise_mask(key, t, noise, spans) & real_t
    begins_t = out_t & ~jnp.concatenate([jnp.zeros(1, bool), out_t[:-1]])
    sentinel_t = _special(config, jnp.cumsum(begins_t) - 1)
    # The source, with a place for a mode token before it.
    first = jnp.zeros(1, jnp.int32) if mode is None else mode[None]
    tokens = jnp.concatenate([first, jnp.where(begins_t, sentinel_t, row.tokens)])
    kept = jnp.concatenate([jnp.array([mode is not None]), (~out_t & real_t) | begins_t])
    source, source_length = _packed(tokens, kept, t)
    # The target: of each span its sentinel and its tokens, so two places per token.
    pairs = jnp.stack([sentinel_t, row.tokens], axis=1).reshape(-1)
    said = jnp.stack([begins_t, out_t], axis=1).reshape(-1)
    last = _special(config, begins_t.sum())[None]
    tokens, said = jnp.concatenate([pairs, last]), jnp.concatenate([said, jnp.ones(1, bool)])
    target, target_length = _packed(tokens, said, length)
    return _to_decoder(row, source, source_length, target, target_length)


def _to_decoder(
    row: Any, source_s: jax.Array, s: jax.Array, target_t: jax.Array, t: jax.Array
) -> Example:
    """An encoder's text of length `s` and what the decoder says, of length `t`; padded arrays."""
    at_s, at_t = jnp.arange(len(source_s)), jnp.arange(len(target_t))
    real = (row.weights.sum() > 0).astype(jnp.float32)
    return Example(
        tokens=jnp.concatenate([jnp.full(1, START, jnp.int32), target_t[:-1]]),
        targets=target_t,
        weights=(at_t < t) * real,
        segment_ids=(at_t < t).astype(jnp.int32),
        positions=at_t.astype(jnp.int32),
        source=Source(source_s, at_s.astype(jnp.int32), (at_s < s).astype(jnp.int32)),
    )


def noise_mask(key: jax.Array, t: int, noise: Any, spans: Any) -> jax.Array:
    """Bool [t]: `noise` tokens in `spans` spans, each after at least one other token (as T5's code
    draws them: both kinds of token are cut into that many pieces, all ways alike)."""
    noise_key, rest_key = jax.random.split(key)
    pieces = [_pieces(rest_key, t, t - noise, spans), _pieces(noise_key, t, noise, spans)]
    ends = jnp.cumsum(jnp.stack(pieces, axis=1).reshape(-1))
    return jnp.searchsorted(ends, jnp.arange(t), side="right") % 2 == 1


def _pieces(key: jax.Array, t: int, n: Any, k: Any) -> jax.Array:
    """Lengths int32 [t] of `k` pieces, 1 or more each, into which `n` ≤ t falls; then zeros."""
    at = jnp.arange(t)
    cuttable = (at >= 1) & (at < n)
    order = jnp.argsort(jnp.where(cuttable, jax.random.uniform(key, (t,)), 2.0))
    cut = jnp.zeros(t, jnp.int32).at[order].set((at < k - 1).astype(jnp.int32))
    return jnp.zeros(t, jnp.int32).at[jnp.cumsum(cut)].add((at < n).astype(jnp.int32))


def _packed(tokens: jax.Array, keep: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """The kept tokens in order, padded with 0 or cut to `length`, and how many there are."""
    order, n = jnp.argsort(~keep, stable=True), jnp.minimum(keep.sum(), length)
    packed = jnp.pad(tokens[order], (0, max(length - len(tokens), 0)))[:length]
    return jnp.where(jnp.arange(length) < n, packed, 0), n


# -------------------------------------------------------------------------------- prefix LM and UL2


def prefix_lm(config: Config, row: Any, key: jax.Array) -> Example:
    """The text after a place drawn anywhere, from the text before it, which is read both ways (Liu
    et al. 2018; Raffel et al. 2020, §3.2.1): by the encoder, or by a decoder without a mask."""
    t = row.tokens.shape[0]
    if config.model.architecture == "encoder_decoder":
        cut = jax.random.randint(key, (), max(1, t - config.model.decoder_len), t)
        return _continued(config, row, cut)
    cut = jax.random.randint(key, (), 1, t)
    at = jnp.arange(t)
    weights = row.weights * (at >= cut - 1)
    kept = row.tokens, row.targets, weights, row.segment_ids, row.positions
    return Example(*kept, prefix=at < cut)


def _continued(config: Config, row: Any, cut: jax.Array, mode: Any = None) -> Example:
    t = row.tokens.shape[0]
    first = jnp.zeros(1, jnp.int32) if mode is None else mode[None]
    real_t, at = _real(row), jnp.arange(t)
    before = jnp.concatenate([jnp.array([mode is not None]), (at < cut) & real_t])
    source, s = _packed(jnp.concatenate([first, row.tokens]), before, t)
    target, n = _packed(row.tokens, (at >= cut) & real_t, config.model.decoder_len)
    return _to_decoder(row, source, s, target, n)


def ul2(config: Config, row: Any, key: jax.Array) -> Example:
    """One of UL2's seven denoisers per row, all alike likely, told by a mode token before it."""
    t, c = row.tokens.shape[0], config.train.corruption
    which_key, key = jax.random.split(key)
    which = jax.random.randint(which_key, (), 0, len(UL2) + 1)
    noise, spans = jnp.array(c.ul2_spans(t), jnp.int32)[jnp.minimum(which, len(UL2) - 1)]
    sentinels = c.special_ids("ul2", t) - UL2_MODES
    mode = _special(config, sentinels + jnp.where(which < 2, 0, jnp.where(which < len(UL2), 1, 2)))
    denoised = _without_spans(config, row, key, noise, spans, mode)
    cut = jax.random.randint(key, (), max(1, t - config.model.decoder_len), t)
    continued = _continued(config, row, cut, mode)
    sequential = which == len(UL2)
    return jax.tree.map(lambda a, b: jnp.where(sequential, a, b), continued, denoised)


# ------------------------------------------------------------------------------- fill in the middle


def fill_in_the_middle(config: Config, row: Any, key: jax.Array) -> Example:
    """Each document, or what of it is in the row, becomes PRE prefix SUF suffix MID middle with
    probability `rate`, cut at two places drawn anywhere (Bavarian et al. 2022, §3: "PSM", at the
    level of the context); its end of text stays last, and the row ends where it is full. The loss
    is the next token's."""
    t, at = row.tokens.shape[0], jnp.arange(row.tokens.shape[0])
    which_key, cut_key = jax.random.split(key)
    padding = ~_real(row)
    doc_t = jnp.where(padding, t - 1, row.segment_ids - row.segment_ids[0])  # 0, 1, …
    length_d = jnp.zeros(t, jnp.int32).at[doc_t].add(1)
    turned_d = jax.random.uniform(which_key, (t,)) < config.train.corruption.rate
    turned_d = turned_d & ~((at == t - 1) & padding[-1])
    ended_d = (at < doc_t[-1]) | (row.weights[-1] == 0)
    body_d = length_d - ended_d
    draws_d2 = jax.random.uniform(cut_key, (t, 2)) * (body_d[:, None] + 1)
    cuts_d2 = jnp.sort(draws_d2.astype(jnp.int32), axis=1)
    first_d = jnp.cumsum(length_d) - length_d
    within_t = at - first_d[doc_t]
    low_t, high_t = cuts_d2[doc_t, 0], cuts_d2[doc_t, 1]
    # Parts in their new order: 0 PRE, 1 prefix, 2 SUF, 3 suffix, 4 MID, 5 middle.
    part_t = jnp.where(within_t < low_t, 1, jnp.where(within_t < high_t, 5, 3))
    part_t = jnp.where(within_t < body_d[doc_t], part_t, 5)
    part_t = jnp.where(turned_d[doc_t], part_t, 1)
    docs = jnp.repeat(at, 3)
    marks = jnp.tile(jnp.array([0, 2, 4]), t)
    there = turned_d[docs] & (length_d[docs] > 0)
    tokens = jnp.concatenate([row.tokens, _special(config, marks // 2)])
    place = jnp.concatenate([doc_t * 6 + part_t, jnp.where(there, docs * 6 + marks, t * 6)])
    order = jnp.argsort(place, stable=True)[: t + 1]
    tokens, doc = tokens[order].astype(jnp.int32), place[order] // 6
    begins = jnp.concatenate([jnp.ones(1, bool), doc[1:t] != doc[: t - 1]])
    start = jax.lax.cummax(jnp.where(begins, at, 0))
    last = jnp.where(padding[-1], t - 1, t)  # what is padding, or past the end
    real = (row.weights.sum() > 0) & (doc[1:] < last)
    return Example(
        tokens=tokens[:t],
        targets=tokens[1:],
        weights=(real & (doc[1:] == doc[:t])).astype(jnp.float32),
        segment_ids=jnp.where(doc[:t] < last, doc[:t] + 1, 0).astype(jnp.int32),
        positions=(at - start).astype(jnp.int32),
    )


# ----------------------------------------------------------------------------------- source, target


def pairs(config: Config, row: Any, key: jax.Array) -> Example:
    """The decoder says the targets of sources (a row of a PairBatch): each begins anew after START,
    and sees its own source."""
    at_t = jnp.arange(row.targets.shape[0], dtype=jnp.int32)
    before_t = jnp.roll(row.said_of, 1).at[0].set(-1)
    begins_t = row.said_of != before_t
    first_t = jax.lax.cummax(jnp.where(begins_t, at_t, 0))
    return Example(
        tokens=jnp.where(begins_t, START, jnp.roll(row.targets, 1)),
        targets=row.targets,
        weights=row.weights,
        segment_ids=row.said_of,
        positions=at_t - first_t,
        source=Source(row.tokens, row.positions, row.segment_ids),
    )


CORRUPTIONS: dict[str, Callable[[Config, Any, jax.Array], Example] | None] = {
    "next_token": None,
    "masked_lm": masked_lm,
    "span_corruption": span_corruption,
    "ul2": ul2,
    "prefix_lm": prefix_lm,
    "fill_in_the_middle": fill_in_the_middle,
    "pairs": pairs,
}
