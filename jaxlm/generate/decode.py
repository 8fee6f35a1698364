"""Text from a model: prefill and cached steps as one program, probes and samples of a training run.

Prompts stand left-padded in slots 0 … t, so that all end together; padding has segment 0 and sees
nothing that a prompt sees. Shapes grow in powers of two: another length seldom compiles again.
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
from jaxlm.config import Config, ModelConfig
from jaxlm.data.tokenizer import EOS, Subword, Tokenizer, byte_letters
from jaxlm.generate import sampling as draws
from jaxlm.generate.sampling import Knobs, Method, Sampling
from jaxlm.mesh import spec
from jaxlm.model import transformer
from jaxlm.model.layers import Cache, Memory
from jaxlm.model.transformer import Params
from jaxlm.schema import UserError
from jaxlm.train.loop import Observer
from jaxlm.train.objectives import START

SLOTS = 16  # the fewest, of prompts and of new tokens
_NONE = -1  # in place of a token: nothing follows


class Prompts(NamedTuple):
    """Rows of a batch, on the mesh; the batch axis is filled up with rows of length 0."""

    tokens_bt: Any  # int32, left-padded
    lengths_b: Any  # int32
    streams_b2: Any  # uint32, see `sampling.streams`


# ---------------------------------------------------------------------------------------- generate


def generate(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    eos_id: int | None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[np.ndarray]:
    """The tokens that follow each prompt.

    `prompts` are int [tokens], of any lengths; the mesh that `params` lie on must be set. Returns
    int32 arrays: `max_new_tokens` tokens, or fewer where `eos_id` came (it is not among them).
    The other arguments are `Sampling`'s: the j-th copy of a prompt is continued in the same way
    under the same seed, whatever else is in the batch. An encoder–decoder reads the prompt and
    begins anew. Rotary models and those without positions may pass `seq_len`, for whatever they
    say there.

    Raises UserError for a prompt that is empty or holds an id outside the vocabulary, for more
    tokens than learned positions, and for sampling out of range.
    """
    check(config, prompts, max_new_tokens)
    sampling = draws.validate(Sampling(temperature, top_k, top_p, seed))
    if not prompts:
        return []
    run = _decoder(config, slots(max_new_tokens), sampling.method, jax.sharding.get_mesh())
    out_bn = run(
        params,
        _place(prompts, seed),
        np.int32(max_new_tokens),
        np.int32(_NONE if eos_id is None else eos_id),
        draws.knobs(sampling, config.vocab_size),
    )
    rows = np.asarray(out_bn)[: len(prompts), :max_new_tokens]
    return [row[: np.argmax(row == _NONE)] if _NONE in row else row for row in rows]


def continue_text(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """The text that follows each prompt, which itself is not repeated. As `generate`."""
    ids = tokenizer.encode_batch(prompts)
    new = generate(
        config, params, ids, max_new_tokens, tokenizer.eos_id, temperature, top_k, top_p, seed
    )
    return [follows(tokenizer, a, b) for a, b in zip(ids, new, strict=True)]


def follows(tokenizer: Tokenizer, prompt: np.ndarray, new: np.ndarray) -> str:
    """Text of `new` after `prompt`: some tokenizers drop the space before a text's first word."""
    whole, before = tokenizer.decode(np.concatenate([prompt, new])), tokenizer.decode(prompt)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new)


def check(
    config: ModelConfig,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    where: str = "prompts",
) -> None:
    """Raises UserError, one line, for what `generate` cannot continue by `max_new_tokens`."""
    if prompts and config.architecture == "encoder":
        raise UserError(f"{where}: an encoder (model.architecture) continues no text")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    for i, prompt in enumerate(prompts):
        n, name = len(prompt), f"{where}[{i}]"
        if n == 0:
            raise UserError(f"{name}: expected at least one token to continue, got none")
        low, high = int(np.min(prompt)), int(np.max(prompt))
        if low < 0 or high >= config.vocab_size:
            raise UserError(
                f"{name}: token {low if low < 0 else high} is not in the model's vocabulary;"
                f" expected 0 … {config.vocab_size - 1} (model.vocab_size={config.vocab_size})"
            )
        needed = n + max_new_tokens - 1  # the last one is never fed
        if config.architecture == "encoder_decoder":
            needed = max(n, max_new_tokens)
        if config.positions == "learned" and needed > config.seq_len:
            raise UserError(
                f"{name}: {n} tokens and {max_new_tokens} new ones need {needed} positions; this"
                f" model learned {config.seq_len} (model.seq_len): shorten by"
                f" {needed - config.seq_len}"
            )


def check_prompts(config: Config, tokenizer: Tokenizer) -> None:
    """Raises UserError, before training, for `train.probes` or `train.sample_prompts` that could
    not be answered during it."""
    t = config.train
    check(config.model, tokenizer.encode_batch(t.probes), 1, "config.train.probes")
    if t.sample_prompts:
        ids = tokenizer.encode_batch(t.sample_prompts)
        check(config.model, ids, t.sample_tokens, "config.train.sample_prompts")


# ------------------------------------------------------------------------------------- one program


@functools.lru_cache(maxsize=64)
def _decoder(config: ModelConfig, new: int, method: Method, devices: Any) -> Any:
    """Jitted (params, prompts, limit, eos_id, knobs) → int32 [b, new], -1 from a row's end on."""
    del devices  # part of the key: traced for the mesh that is set

    def decode(
        params: Params, prompts: Prompts, limit: jax.Array, eos_id: jax.Array, knobs: Knobs
    ) -> jax.Array:
        prompts, memory = _begun(config, params, prompts)
        b, t = prompts.tokens_bt.shape
        cache, segments_bt = _prefill(config, params, prompts, memory, new)
        out_bn = jnp.full((b, new), _NONE, jnp.int32, out_sharding=spec(("batch", None)))
        ones_bn = jnp.ones_like(out_bn)
        segments_bs = jnp.concatenate([segments_bt, ones_bn], axis=1)

        def unfinished(carry: Any) -> jax.Array:
            i, _, done_b, _, _ = carry
            return (i < limit) & ~jnp.all(done_b)

        def step(carry: Any) -> Any:
            i, last_b, done_b, out_bn, cache = carry
            at_b = prompts.lengths_b - 1 + i
            x_btd, cache = transformer.hidden_cached(
                config, params, last_b[:, None], at_b[:, None], ones_bn[:, :1], segments_bs,
                t - 1 + i, cache, memory,
            )  # fmt: skip
            logits_bv = _last_logits(config, params, x_btd)
            last_b = draws.choose(method, logits_bv, prompts.streams_b2, at_b, knobs)
            done_b = done_b | (last_b == eos_id)
            column_b1 = jnp.where(done_b, _NONE, last_b)[:, None]
            out_bn = jax.lax.dynamic_update_slice(out_bn, column_b1, (0, i))
            return i + 1, last_b, done_b, out_bn, cache

        # Prefill has seen the last token of each prompt. The first step feeds it once more, into
        # the same slot: so every step is alike, and the program holds one of each computation.
        last_b, done_b = prompts.tokens_bt[:, -1], prompts.lengths_b == 0
        start = (jnp.int32(0), last_b, done_b, out_bn, cache)
        out_bn = jax.lax.while_loop(unfinished, step, start)[3]
        return jax.reshard(out_bn, P(None, None))

    return jax.jit(decode)


def _begun(config: ModelConfig, params: Params, prompts: Prompts) -> tuple[Prompts, Memory | None]:
    """What the decoder begins with. In an encoder–decoder a prompt is what the encoder reads, and
    the decoder begins with one token that means nothing, as in training."""
    if config.architecture != "encoder_decoder":
        return prompts, None
    source = transformer.Source(prompts.tokens_bt, *_left_padded(prompts))
    memory, _ = transformer.remember(config, params, source)
    lengths_b = jnp.minimum(prompts.lengths_b, 1)
    start_b1 = jnp.full_like(prompts.tokens_bt[:, :1], START)
    return Prompts(start_b1, lengths_b, prompts.streams_b2), memory


def _prefill(
    config: ModelConfig, params: Params, prompts: Prompts, memory: Memory | None, new: int
) -> tuple[Cache, jax.Array]:
    """Keys and values of the prompts, in [l, b, t + new, g, k], and their segments [b, t]."""
    tokens_bt = prompts.tokens_bt
    positions_bt, segments_bt = _left_padded(prompts)
    shape = (config.n_layers, *tokens_bt.shape, config.kv_heads, config.head_dim)
    layout = spec(("layers", "batch", "seq", "kv_heads", "d_head"))
    empty = jnp.zeros(shape, transformer.compute_dtype(config), out_sharding=layout)
    # As many slots as queries: attention then skips the upper triangle. Room comes afterwards.
    _, cache = transformer.hidden_cached(
        config, params, tokens_bt, positions_bt, segments_bt, segments_bt, 0, (empty, empty),
        memory, _prefix(config, segments_bt),
    )  # fmt: skip
    room = [(0, new if axis == 2 else 0) for axis in range(5)]
    return jax.tree.map(lambda a: jnp.pad(a, room), cache), segments_bt


@functools.lru_cache(maxsize=64)
def _next(config: ModelConfig, k: int, devices: Any) -> Any:
    """Jitted (params, prompts) → the k most likely next tokens: probabilities and ids [b, k]."""
    del devices

    def following(params: Params, prompts: Prompts) -> list[jax.Array]:
        prompts, memory = _begun(config, params, prompts)
        positions_bt, segments_bt = _left_padded(prompts)
        x_btd, _ = transformer.hidden_and_sums(
            config, params, prompts.tokens_bt, positions_bt, segments_bt,
            memory=memory, prefix_bt=_prefix(config, segments_bt),
        )  # fmt: skip
        share_bv = jax.nn.softmax(_last_logits(config, params, x_btd))
        return [jax.reshard(a, P(None, None)) for a in jax.lax.top_k(share_bv, k)]

    return jax.jit(following)


def _prefix(config: ModelConfig, segments_bt: jax.Array) -> jax.Array | None:
    """Of a model that reads its prompt both ways: the whole prompt."""
    return segments_bt != 0 if config.prefix_attention else None


def _last_logits(config: ModelConfig, params: Params, x_btd: jax.Array) -> jax.Array:
    """Float32 logits [b, v] after the last position, v whole on each device."""
    logits_bv = transformer.logits(config, params, x_btd[:, -1:])[:, 0]
    return jax.reshard(logits_bv, spec(("batch", None)))


def _left_padded(prompts: Prompts) -> tuple[jax.Array, jax.Array]:
    """Positions, restarting at each prompt's first token, and segments (0: padding), int32."""
    t = prompts.tokens_bt.shape[1]
    since_bt = jnp.arange(t, dtype=jnp.int32) - (t - prompts.lengths_b)[:, None]
    return jnp.maximum(since_bt, 0), (since_bt >= 0).astype(jnp.int32)


def _place(prompts: Sequence[np.ndarray], seed: int = 0) -> Prompts:
    """The prompts as one batch on the mesh, its two sizes rounded up."""
    devices = jax.sharding.get_mesh()
    parts = mesh.parts("batch")
    rows, t = -(-_power_of_two(len(prompts)) // parts) * parts, slots(max(map(len, prompts)))
    tokens_bt, lengths_b = np.zeros((rows, t), np.int32), np.zeros(rows, np.int32)
    streams_b2 = np.zeros((rows, 2), np.uint32)
    streams_b2[: len(prompts)] = draws.streams(prompts, seed)
    for i, prompt in enumerate(prompts):
        lengths_b[i], tokens_bt[i, t - len(prompt) :] = len(prompt), prompt

    by_row = jax.NamedSharding(devices, spec(("batch",)))  # every host has all rows
    return jax.device_put(Prompts(tokens_bt, lengths_b, streams_b2), by_row)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def slots(n: int) -> int:
    """`n` rounded up to a power of two: the sizes that programs are compiled for."""
    return max(SLOTS, _power_of_two(n))


# --------------------------------------------------------------------------- seen during training


def probes(tokenizer: Tokenizer, prompts: Sequence[str], k: int = 5) -> Observer:
    """An observer that logs what the model expects after each prompt: rows of "probe/prompt" and
    "probe/top", the `k` most likely next tokens as [text, probability], most likely first."""
    ids = tokenizer.encode_batch(prompts)

    def observe(config: Config, params: Any, step: int) -> list[dict[str, Any]]:
        rows = []
        for prompt, top in zip(prompts, expected(config.model, params, ids, k), strict=True):
            pairs = [[token_text(tokenizer, i), share] for i, share in top]
            rows.append({"step": step, "probe/prompt": prompt, "probe/top": pairs})
        return rows

    return observe


def samples(tokenizer: Tokenizer, prompts: Sequence[str], tokens: int, seed: int) -> Observer:
    """An observer that logs a draw of at most `tokens` tokens after each prompt: rows of
    "sample/prompt" and "sample/text". The seed is the same at each step: what changes is the
    model."""

    def observe(config: Config, params: Any, step: int) -> list[dict[str, Any]]:
        texts = continue_text(config.model, params, tokenizer, prompts, tokens, seed=seed)
        return [
            {"step": step, "sample/prompt": prompt, "sample/text": text}
            for prompt, text in zip(prompts, texts, strict=True)
        ]

    return observe


def expected(
    config: ModelConfig, params: Params, prompts: Sequence[np.ndarray], k: int
) -> list[list[tuple[int, float]]]:
    """The `k` most likely next tokens of each prompt, as (id, probability), most likely first.

    Raises UserError as `generate` does.
    """
    check(config, prompts, 1)
    if not prompts:
        return []
    run = _next(config, min(k, config.vocab_size), jax.sharding.get_mesh())
    share_bk, ids_bk = (np.asarray(a).tolist() for a in run(params, _place(prompts)))
    rows = zip(ids_bk, share_bk, strict=True)
    return [list(zip(*row, strict=True)) for row in rows][: len(prompts)]


def token_text(tokenizer: Tokenizer, i: int) -> str:
    """What one token stands for, always readable: a byte that is no text by itself as '\\xe3'."""
    text = tokenizer.decode([i])
    if i == tokenizer.eos_id:
        return EOS
    if tokenizer.kind == "bytes" and i < tokenizer.vocab_size:
        return bytes([i]).decode(errors="backslashreplace")
    if text and "\ufffd" not in text:
        return text
    letters = byte_letters()
    name = tokenizer.inner.id_to_token(i) if isinstance(tokenizer, Subword) else None
    if name and all(c in letters for c in name):
        return bytes(letters[c] for c in name).decode(errors="backslashreplace")
    return f"<{i}>"
