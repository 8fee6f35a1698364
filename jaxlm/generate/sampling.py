"""How the next token is chosen from logits, and what makes a choice reproducible."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.schema import UserError, checked, doc

Method = Literal["greedy", "all", "filtered"]


@dataclass(frozen=True)
class Sampling:
    """What is drawn from: temperature, then top-k of that, then top-p of what is left."""

    temperature: float = doc(1.0, "divides the logits; 0: always the most likely token")
    top_k: int = doc(0, "only the k most likely tokens; 0: all")
    top_p: float = doc(1.0, "only the most likely tokens that together reach this probability")
    seed: int = doc(0, "of the draws: the same again for the same prompt")

    @property
    def method(self) -> Method:
        """The least computation that does this (each is a program of its own)."""
        if self.temperature == 0:
            return "greedy"
        return "filtered" if self.top_k or self.top_p < 1 else "all"


def validate(sampling: Sampling) -> Sampling:
    """`sampling`, its types checked and its numbers in range. Raises UserError, one line."""
    s = checked(sampling, "")
    for ok, name, expected in (
        (0 <= s.temperature < float("inf"), "temperature", "a number from 0 up"),
        (s.top_k >= 0, "top_k", "0 (all tokens) or more"),
        (0 < s.top_p <= 1, "top_p", "above 0 and at most 1 (all tokens)"),
    ):
        if not ok:
            raise UserError(f"{name}: expected {expected}, got {getattr(s, name)!r}")
    return s


class Knobs(NamedTuple):
    """A `Sampling` for a compiled program: scalars, so that other values do not compile again."""

    temperature: Any  # float32, above 0
    top_k: Any  # int32, 1 … v
    top_p: Any  # float32


def knobs(sampling: Sampling, vocab_size: int) -> Knobs:
    s = sampling
    return Knobs(
        np.float32(s.temperature or 1.0),
        np.int32(min(s.top_k or vocab_size, vocab_size)),
        np.float32(s.top_p),
    )


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
) -> jax.Array:
    """int32 [b]: the next tokens, from float32 logits whose v axis is not sharded.

    The draw of a row depends on its logits, its stream and its position alone.
    """
    if method == "greedy":
        return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)

    def draw(logits_v: jax.Array, stream: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(stream, impl="threefry2x32")
        # Gumbel-max: argmax(logits + noise) is a draw from softmax(logits). The noise belongs to
        # token ids, so that a filter only takes candidates away.
        noise_v = jax.random.gumbel(jax.random.fold_in(key, position), logits_v.shape)
        if method == "all":
            return jnp.argmax(logits_v / knobs.temperature + noise_v)
        order_v, kept_v = ranked(logits_v, *knobs)
        return order_v[jnp.argmax(kept_v + noise_v[order_v])]

    return jax.vmap(draw)(logits_bv, streams_b2, positions_b).astype(jnp.int32)


def ranked(
    logits_v: jax.Array, temperature: Any, top_k: Any, top_p: Any
) -> tuple[jax.Array, jax.Array]:
    """Token ids, most likely first (ties: lower id), and their logits / temperature.

    Logits are -inf outside the `top_k` first (Fan et al. 2018) and outside the nucleus of these:
    the fewest whose probability reaches `top_p` (Holtzman et al. 2020, eq. 2).
    """
    order_v = jnp.argsort(-logits_v)
    sorted_v = (logits_v[order_v] - logits_v[order_v[0]]) / temperature
    sorted_v = jnp.where(jnp.arange(logits_v.size) < top_k, sorted_v, -jnp.inf)
    share_v = jax.nn.softmax(sorted_v)
    # Rounded sums can reach 1 before the last token, which top_p = 1 must not lose.
    within_v = (jnp.cumsum(share_v) - share_v < top_p) | (top_p >= 1)
    return order_v, jnp.where(within_v, sorted_v, -jnp.inf)
