"""How the next token is chosen from logits, and what makes a choice reproducible.

In this order: logit bias, penalties for what was said already, temperature, top-k, top-p, min-p,
typical-p.
Each row of a batch may be chosen in a way of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.schema import UserError, checked, doc


@dataclass(frozen=True)
class Sampling:
    """What the next token is drawn from."""

    temperature: float = doc(1.0, "divides the logits; 0: always the most likely token")
    top_k: int = doc(0, "only the k most likely tokens; 0: all")
    top_p: float = doc(1.0, "only the most likely tokens that together reach this probability")
    min_p: float = doc(0.0, "only tokens at least this share as likely as the most likely one")
    typical_p: float = doc(
        1.0, "only the tokens about as surprising as usual that together reach this probability"
    )
    repetition_penalty: float = doc(
        1.0, "divides positive logits of tokens seen (prompt too), multiplies negative ones"
    )
    frequency_penalty: float = doc(0.0, "taken off the logit for each time a token was generated")
    presence_penalty: float = doc(0.0, "taken off the logit of a token generated already")
    logit_bias: tuple[tuple[int, float], ...] = doc((), "(token id, what is added to its logit)")
    seed: int = doc(0, "of the draws: the same again for the same prompt")


def validate(sampling: Sampling, vocab_size: int) -> Sampling:
    """`sampling`, its types checked and its numbers in range. Raises UserError, one line."""
    s = checked(sampling, "")
    for ok, name, expected in (
        (0 <= s.temperature < math.inf, "temperature", "a number from 0 up"),
        (s.top_k >= 0, "top_k", "0 (all tokens) or more"),
        (0 < s.top_p <= 1, "top_p", "above 0 and at most 1 (all tokens)"),
        (0 <= s.min_p <= 1, "min_p", "0 (all tokens) to 1"),
        (0 < s.typical_p <= 1, "typical_p", "above 0 and at most 1 (all tokens)"),
        (0 < s.repetition_penalty < math.inf, "repetition_penalty", "a number above 0 (1: none)"),
        (math.isfinite(s.frequency_penalty), "frequency_penalty", "a finite number"),
        (math.isfinite(s.presence_penalty), "presence_penalty", "a finite number"),
        (all(not math.isnan(b) for _, b in s.logit_bias), "logit_bias", "numbers"),
        (
            all(0 <= i < vocab_size for i, _ in s.logit_bias),
            "logit_bias",
            f"token ids in 0 … {vocab_size - 1}",
        ),
    ):
        if not ok:
            raise UserError(f"{name}: expected {expected}, got {getattr(s, name)!r}")
    return s


class Method(NamedTuple):
    """The least computation that does what is asked; each is a program of its own."""

    draws: bool  # else every row takes its most likely token
    filters: bool  # top-k, top-p, min-p, typical-p
    typical: bool  # typical-p among them
    alters: bool  # penalties, bias


def method(samplings: Sequence[Sampling]) -> Method:
    """Of a batch whose rows are chosen as `samplings` say."""
    drawn = [s for s in samplings if s.temperature > 0]
    return Method(
        draws=bool(drawn),
        filters=any(s.top_k or s.top_p < 1 or s.min_p > 0 or s.typical_p < 1 for s in drawn),
        typical=any(s.typical_p < 1 for s in drawn),
        alters=any(
            s.logit_bias
            or (s.repetition_penalty, s.frequency_penalty, s.presence_penalty) != (1, 0, 0)
            for s in samplings
        ),
    )


class Knobs(NamedTuple):
    """`Sampling`s for a compiled program, arrays [b], so that other values do not compile again."""

    temperature: Any  # float32; 0: the most likely token
    top_k: Any  # int32, 1 … v
    top_p: Any  # float32
    min_p: Any  # float32
    typical_p: Any  # float32
    repetition: Any  # float32
    frequency: Any  # float32
    presence: Any  # float32


def knobs(samplings: Sequence[Sampling], vocab_size: int) -> Knobs:
    rows = [
        (
            s.temperature, min(s.top_k or vocab_size, vocab_size), s.top_p, s.min_p, s.typical_p,
            s.repetition_penalty, s.frequency_penalty, s.presence_penalty,
        )
        for s in samplings
    ]  # fmt: skip
    columns = [np.array(column, np.float32) for column in zip(*rows, strict=True)]
    return Knobs(*columns)._replace(top_k=np.array([row[1] for row in rows], np.int32))


class Said(NamedTuple):
    """What penalties and bias look at; [b, v] each, or [b, 0] where nothing is altered."""

    prompt: Any  # bool
    generated: Any  # int32, how often
    bias: Any  # float32


def said(
    method: Method, prompts: Sequence[np.ndarray], samplings: Sequence[Sampling], vocab_size: int
) -> Said:
    """Before anything is generated."""
    shape = (len(prompts), vocab_size if method.alters else 0)
    found = Said(np.zeros(shape, bool), np.zeros(shape, np.int32), np.zeros(shape, np.float32))
    if method.alters:
        for i, (prompt, s) in enumerate(zip(prompts, samplings, strict=True)):
            found.prompt[i, prompt] = True
            for token, more in s.logit_bias:
                found.bias[i, token] += more
    return found


def noted(said: Said, tokens_b: jax.Array) -> Said:
    """With one more generated token in each row."""
    if not said.generated.shape[1]:
        return said
    ids_v = jnp.arange(said.generated.shape[1])
    return said._replace(generated=said.generated + (tokens_b[:, None] == ids_v))


def streams(prompts: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """uint32 [b, 2]: the key of each prompt's own random stream, whatever the others are.

    It comes from the seed, the prompt, and how often that came before in the list: copies differ.
    """
    seen: Counter[bytes] = Counter()
    keys = []
    for prompt in prompts:
        ids = np.asarray(prompt, "<i4").tobytes()
        keys.append(hashlib.sha256(f"{seed} {seen[ids]} ".encode() + ids).digest()[:8])
        seen[ids] += 1
    return np.frombuffer(b"".join(keys), "<u4").reshape(-1, 2)


def choose(
    method: Method,
    logits_bv: jax.Array,
    streams_b2: jax.Array,
    positions_b: jax.Array,
    knobs: Knobs,
    said: Said,
) -> jax.Array:
    """int32 [b]: the next tokens, from float32 logits whose v axis is not sharded.

    The draw of a row depends on its own arguments alone.
    """
    if method.alters:
        logits_bv = jax.vmap(altered)(logits_bv, knobs, said)
    best_b = likeliest(logits_bv)
    if not method.draws:
        return best_b

    def draw(logits_v: jax.Array, stream: jax.Array, position: jax.Array, k: Knobs) -> jax.Array:
        key = jax.random.wrap_key_data(stream, impl="threefry2x32")
        # Gumbel-max: argmax(logits + noise) is a draw from softmax(logits). The noise belongs to
        # token ids, so that a filter only takes candidates away.
        noise_v = jax.random.gumbel(jax.random.fold_in(key, position), logits_v.shape)
        warm = jnp.where(k.temperature > 0, k.temperature, 1.0)
        if not method.filters:
            # As `ranked` has it, to the last bit: other rows' filters change no draw.
            return likeliest((logits_v - jnp.max(logits_v)) / warm + noise_v)
        order_v, kept_v = ranked(logits_v, warm, k.top_k, k.top_p, k.min_p)
        kept_v = typical(kept_v, k.typical_p) if method.typical else kept_v
        return order_v[likeliest(kept_v + noise_v[order_v])]

    drawn_b = jax.vmap(draw)(logits_bv, streams_b2, positions_b, knobs).astype(jnp.int32)
    return jnp.where(knobs.temperature > 0, drawn_b, best_b)


def likeliest(logits: jax.Array) -> jax.Array:
    """int32 [...] of float32 [..., v]: the largest, of equals the first. As argmax, which a CPU
    finds one number at a time (docs/performance.md)."""
    ids_v = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    best = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits == best, ids_v, ids_v[-1]), axis=-1)


def log_probs(logits_bv: jax.Array, tokens_b: jax.Array) -> jax.Array:
    """Float32 [b]: the tokens' log-probabilities, before anything is done to the logits."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits_bv), tokens_b[:, None], axis=1)[:, 0]


def shares(method: Method, logits_v: jax.Array, knobs: Knobs) -> jax.Array:
    """Float32 [v]: with what probability `choose` takes each token of one row, unaltered."""
    if not method.draws:
        return jax.nn.one_hot(likeliest(logits_v), logits_v.size)
    if not method.filters:
        return jax.nn.softmax(logits_v / knobs.temperature)
    order_v, kept_v = ranked(logits_v, *knobs[:4])
    kept_v = typical(kept_v, knobs.typical_p) if method.typical else kept_v
    return jnp.zeros_like(logits_v).at[order_v].set(jax.nn.softmax(kept_v))


def drawn(key: jax.Array, share_v: jax.Array) -> jax.Array:
    """int32: a token, with these probabilities or what is proportional to them."""
    noise_v = jax.random.gumbel(key, share_v.shape)
    return likeliest(jnp.log(share_v) + noise_v)


def altered(logits_v: jax.Array, knobs: Knobs, said: Said) -> jax.Array:
    """Logits with bias and penalties of one row: what was seen in prompt or answer is divided by
    the repetition penalty if positive, else multiplied (Keskar et al. 2019, §4.1); what was
    generated loses frequency · count + presence (OpenAI's API reference)."""
    logits_v = logits_v + said.bias
    seen_v = said.prompt | (said.generated > 0)
    weaker_v = jnp.where(logits_v > 0, logits_v / knobs.repetition, logits_v * knobs.repetition)
    logits_v = jnp.where(seen_v, weaker_v, logits_v)
    less_v = knobs.frequency * said.generated + knobs.presence * (said.generated > 0)
    return logits_v - less_v


def ranked(
    logits_v: jax.Array, temperature: Any, top_k: Any, top_p: Any, min_p: Any
) -> tuple[jax.Array, jax.Array]:
    """Token ids, most likely first (ties: lower id), and their logits / temperature.

    Logits are -inf outside the `top_k` first (Fan et al. 2018), outside the nucleus of these: the
    fewest whose probability reaches `top_p` (Holtzman et al. 2020, eq. 2), and where less than
    `min_p` times as likely as the first (Nguyen et al. 2024, eq. 2).
    """
    order_v = jnp.argsort(-logits_v)
    sorted_v = (logits_v[order_v] - logits_v[order_v[0]]) / temperature
    sorted_v = jnp.where(jnp.arange(logits_v.size) < top_k, sorted_v, -jnp.inf)
    share_v = jax.nn.softmax(sorted_v)
    # Rounded sums can reach 1 before the last token, which top_p = 1 must not lose.
    within_v = (jnp.cumsum(share_v) - share_v < top_p) | (top_p >= 1)
    within_v &= sorted_v >= jnp.log(min_p)
    return order_v, jnp.where(within_v, sorted_v, -jnp.inf)


def typical(logits_v: jax.Array, typical_p: Any) -> jax.Array:
    """Logits, -inf but for the fewest tokens that together reach `typical_p`, those first whose
    information is nearest to its mean, the entropy (Meister et al. 2023, eq. 6 and 7)."""
    log_p_v = jax.nn.log_softmax(logits_v)
    share_v = jnp.exp(log_p_v)
    entropy = -jnp.sum(jnp.where(share_v > 0, share_v * log_p_v, 0.0))
    order_v = jnp.argsort(jnp.abs(log_p_v + entropy))
    reached_v = jnp.cumsum(share_v[order_v]) - share_v[order_v]
    within_v = jnp.zeros_like(share_v, bool).at[order_v].set(reached_v < typical_p)
    return jnp.where(within_v | (typical_p >= 1), logits_v, -jnp.inf)
