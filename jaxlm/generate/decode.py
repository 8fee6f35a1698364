"""What a model says after a prompt: one program reads it, one makes all cached steps.

Prompts stand left-padded in slots 0 … t, so that all end together; padding has segment 0 and sees
nothing that a prompt sees. Shapes grow in powers of two: another length seldom compiles again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from jaxlm import mesh, xla
from jaxlm.config import ModelConfig
from jaxlm.generate import layout
from jaxlm.generate import sampling as draws
from jaxlm.generate.sampling import Knobs, Method, Said, Sampling
from jaxlm.mesh import spec
from jaxlm.model import transformer
from jaxlm.model.layers import Cache, Memory
from jaxlm.model.transformer import Params
from jaxlm.schema import UserError
from jaxlm.train.objectives import START

SLOTS = 16  # the fewest, of prompts and of new tokens
PIECE = 16  # new tokens between two questions whether there are enough
_NONE = -1  # in place of a token: nothing follows


class Prompts(NamedTuple):
    """Rows of a batch, on the mesh; the batch axis is filled up with rows of length 0."""

    tokens_bt: Any  # int32, left-padded
    lengths_b: Any  # int32


# ---------------------------------------------------------------------------------------- generate


class Answer(NamedTuple):
    """What follows a prompt."""

    ids: np.ndarray  # int32 [tokens]; the end-of-text token is not among them
    log_probs: np.ndarray  # float32 [tokens], of the model: before bias, penalties and the rest
    ended: bool  # before `max_new_tokens`


def generate(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    eos_id: int | None,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
) -> list[np.ndarray]:
    """The tokens that follow each prompt: `answers` without anything else."""
    found = answers(config, params, prompts, max_new_tokens, eos_id, sampling)
    return [answer.ids for answer in found]


def answers(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    eos_id: int | None,
    sampling: Sampling = Sampling(),  # noqa: B008
    enough: Callable[[int, np.ndarray], bool] | None = None,
) -> list[Answer]:
    """What follows each prompt.

    `prompts` are int [tokens], of any lengths; the mesh that `params` lie on must be set. Answers
    have `max_new_tokens` tokens, or fewer where `eos_id` came or where `enough(i, ids)` said of the
    i-th answer so far that nobody needs more; it is asked every `PIECE` tokens.
    The j-th copy of a prompt is continued in the same way under the same seed, whatever else is in
    the batch. An encoder–decoder reads the prompt and begins anew. Rotary models and those without
    positions may pass `seq_len`, for whatever they say there.

    Raises UserError for a prompt that is empty or holds an id outside the vocabulary, for more
    tokens than learned positions, and for sampling out of range.
    """
    check(config, prompts, max_new_tokens)
    sampling = draws.validate(sampling, config.vocab_size)
    if not prompts:
        return []
    method, devices = draws.method([sampling]), jax.sharding.get_mesh()
    streams_b2, knobs, said = _choice(config, prompts, sampling, method)
    placed, n = place(prompts), len(prompts)
    laid = layout.laid_out(config, params, rows=len(placed.lengths_b))
    begun, running = _starter(config, slots(max_new_tokens), devices)(laid, placed, said)
    go_on = _decoder(config, method, devices)
    end = np.int32(_NONE if eos_id is None else eos_id)
    piece = max_new_tokens if enough is None else PIECE
    for until in range(piece, max_new_tokens + piece, piece):
        limit = min(until, max_new_tokens)
        given = streams_b2, knobs, np.int32(limit), end
        running, found = go_on(laid, begun, running, *given)
        out_bn = np.asarray(found[0])[:, :limit]
        ids = [row[: np.argmax(row == _NONE)] if _NONE in row else row for row in out_bn]
        if enough is None or limit == max_new_tokens:
            break
        done = [i >= n or len(ids[i]) < limit or enough(i, ids[i]) for i in range(len(ids))]
        if all(done):
            break
        running = running._replace(done_b=_by_row(np.array(done)))
    rows = zip(ids[:n], np.asarray(found[1])[:n], strict=True)
    return [Answer(a, log_p[: len(a)], len(a) < max_new_tokens) for a, log_p in rows]


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
    share_bk, ids_bk = (np.asarray(a).tolist() for a in run(params, place(prompts)))
    rows = zip(ids_bk, share_bk, strict=True)
    return [list(zip(*row, strict=True)) for row in rows][: len(prompts)]


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


# --------------------------------------------------------------------------------------- programs


class Running(NamedTuple):
    """A batch between two of its steps."""

    i: jax.Array  # int32, steps made
    last_b: jax.Array  # int32, what the next step feeds
    done_b: jax.Array  # bool
    out_bn: jax.Array  # int32, -1 from a row's end on
    log_probs_bn: jax.Array  # float32
    cache: tuple[Cache, ...]  # of one row: without its axis
    said: Said


@functools.lru_cache(maxsize=64)
def _starter(config: ModelConfig, new: int, devices: Any) -> Any:
    """Jitted (laid, prompts, said) → what stays the same, and the batch before its first step."""
    del devices  # part of the key: traced for the mesh that is set

    def start(laid: Params, prompts: Prompts, said: Said) -> tuple[Begun, Running]:
        begun, shape = begin(config, laid, prompts, new), (prompts.lengths_b.shape[0], new)
        out_bn = jnp.full(shape, _NONE, jnp.int32, out_sharding=spec(("batch", None)))
        log_probs_bn = jnp.zeros(shape, jnp.float32, out_sharding=spec(("batch", None)))
        rows = begun.last_b, begun.lengths_b == 0, out_bn, log_probs_bn
        alone = shape[0] == 1 and not config.layer  # which may see to its cache in a way of its own
        cache = jax.tree.map(lambda a: a[0], begun.cache) if alone else begun.cache
        return begun._replace(cache=()), Running(jnp.int32(0), *rows, cache, said)

    return jax.jit(start)


@functools.lru_cache(maxsize=64)
def _decoder(config: ModelConfig, method: Method, devices: Any) -> Any:
    """Jitted (laid, begun, running, streams_b2, knobs, limit, eos_id) → running after `limit`
    steps, or when all are done; its tokens and their log-probabilities, on every host."""
    del devices

    def decode(
        laid: Params, begun: Begun, running: Running, streams_b2: Any, knobs: Knobs, limit: Any,
        eos_id: Any,
    ) -> tuple[Running, list[jax.Array]]:  # fmt: skip
        def unfinished(running: Running) -> jax.Array:
            return (running.i < limit) & ~jnp.all(running.done_b)

        def step(running: Running) -> Running:
            i, last_b, done_b, out_bn, log_probs_bn, cache, said = running
            logits_bv, cache = begun.logits(config, laid, i, last_b, cache)
            at_b = begun.lengths_b - 1 + i
            last_b = draws.choose(method, logits_bv, streams_b2, at_b, knobs, said)
            done_b = done_b | (last_b == eos_id)
            column_b1 = jnp.where(done_b, _NONE, last_b)[:, None]
            out_bn = jax.lax.dynamic_update_slice(out_bn, column_b1, (0, i))
            log_p_b1 = draws.log_probs(logits_bv, last_b)[:, None]
            log_probs_bn = jax.lax.dynamic_update_slice(log_probs_bn, log_p_b1, (0, i))
            said = draws.noted(said, last_b)
            return Running(i + 1, last_b, done_b, out_bn, log_probs_bn, cache, said)

        running = jax.lax.while_loop(unfinished, step, running)
        found = running.out_bn, running.log_probs_bn
        return running, [jax.reshard(a, P(None, None)) for a in found]

    options = xla.decoding(mesh.device_kind())
    return jax.jit(decode, donate_argnums=(2,), compiler_options=options or None)


class Begun(NamedTuple):
    """A batch whose prompts have been read, ready for its first step.

    Prefill has seen the last token of each prompt. The first step feeds it once more, into the same
    slot: so every step is alike, and the program holds one of each computation.
    """

    memory: Memory | None  # each layer's apart
    cache: tuple[Cache, ...]  # each layer's, with t + new slots
    segments_bs: jax.Array
    lengths_b: jax.Array
    last_b: jax.Array  # int32, what the first step feeds
    first: Any  # slot of that

    def logits(
        self, config: ModelConfig, laid: Params, i: jax.Array, last_b: jax.Array, cache: Any
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """What follows `last_b` in step i, float32 [b, v], and the cache with it."""
        ones_b1 = jnp.ones_like(last_b)[:, None]
        at_b1 = (self.lengths_b - 1 + i)[:, None]
        x_btd, cache = transformer.hidden_cached(
            config, laid, last_b[:, None], at_b1, ones_b1, self.segments_bs, self.first + i,
            cache, self.memory,
        )  # fmt: skip
        return last_logits(config, laid, x_btd), cache


def begin(config: ModelConfig, laid: Params, prompts: Prompts, new: int) -> Begun:
    """Reads the prompts with weights that `layout` has laid out, and makes room for `new` tokens.
    The weights are no part of it: a program that handed them on would copy them."""
    prompts, memory = _start(config, laid, prompts)
    tokens_bt = prompts.tokens_bt
    cache, segments_bt = _prefill(config, laid, prompts, memory, new)
    ones_bn = jnp.ones((tokens_bt.shape[0], new), jnp.int32, out_sharding=spec(("batch", None)))
    return Begun(
        memory,
        cache,
        jnp.concatenate([segments_bt, ones_bn], axis=1),
        prompts.lengths_b,
        tokens_bt[:, -1],
        tokens_bt.shape[1] - 1,
    )


def _start(config: ModelConfig, params: Params, prompts: Prompts) -> tuple[Prompts, Memory | None]:
    """What the decoder begins with. In an encoder–decoder a prompt is what the encoder reads, and
    the decoder begins with one token that means nothing, as in training."""
    if config.architecture != "encoder_decoder":
        return prompts, None
    source = transformer.Source(prompts.tokens_bt, *_left_padded(prompts))
    memory, _ = transformer.remember(config, params, source)
    lengths_b = jnp.minimum(prompts.lengths_b, 1)
    return Prompts(jnp.full_like(prompts.tokens_bt[:, :1], START), lengths_b), memory


def _prefill(
    config: ModelConfig, laid: Params, prompts: Prompts, memory: Memory | None, new: int
) -> tuple[tuple[Cache, ...], jax.Array]:
    """Each layer's cache with the prompts and `new` more slots; their segments [b, t]."""
    tokens_bt = prompts.tokens_bt
    positions_bt, segments_bt = _left_padded(prompts)
    b, t = tokens_bt.shape
    by_head, dtype = spec(("batch", "kv_heads", None, None)), transformer.compute_dtype(config)
    g, k = config.kv_heads, config.head_dim
    empty = [jnp.zeros(n, dtype, out_sharding=by_head) for n in ((b, g, k, t), (b, g, t, k))]
    # As many slots as queries: attention then skips the upper triangle. Room comes afterwards.
    _, cache = transformer.hidden_cached(
        config, laid, tokens_bt, positions_bt, segments_bt, segments_bt, 0,
        [tuple(empty)] * config.n_layers, memory, _prefix(config, segments_bt),
    )  # fmt: skip
    no, room = (0, 0), (0, new)
    wider = [(jnp.pad(k, [no, no, no, room]), jnp.pad(v, [no, no, room, no])) for k, v in cache]
    return tuple(wider), segments_bt


@functools.lru_cache(maxsize=64)
def _next(config: ModelConfig, k: int, devices: Any) -> Any:
    """Jitted (params, prompts) → the k most likely next tokens: probabilities and ids [b, k]."""
    del devices

    def following(params: Params, prompts: Prompts) -> list[jax.Array]:
        prompts, memory = _start(config, params, prompts)
        positions_bt, segments_bt = _left_padded(prompts)
        x_btd, _ = transformer.hidden_and_sums(
            config, params, prompts.tokens_bt, positions_bt, segments_bt,
            memory=memory, prefix_bt=_prefix(config, segments_bt),
        )  # fmt: skip
        share_bv = jax.nn.softmax(last_logits(config, params, x_btd))
        return [jax.reshard(a, P(None, None)) for a in jax.lax.top_k(share_bv, k)]

    return jax.jit(following)


def _prefix(config: ModelConfig, segments_bt: jax.Array) -> jax.Array | None:
    """Of a model that reads its prompt both ways: the whole prompt."""
    return segments_bt != 0 if config.prefix_attention else None


def last_logits(config: ModelConfig, params: Params, x_btd: jax.Array) -> jax.Array:
    """Float32 logits [b, v] after the last position, v whole on each device."""
    logits_bv = transformer.logits(config, params, x_btd[:, -1:])[:, 0]
    return jax.reshard(logits_bv, spec(("batch", None)))


def _left_padded(prompts: Prompts) -> tuple[jax.Array, jax.Array]:
    """Positions, restarting at each prompt's first token, and segments (0: padding), int32."""
    t = prompts.tokens_bt.shape[1]
    since_bt = jnp.arange(t, dtype=jnp.int32) - (t - prompts.lengths_b)[:, None]
    return jnp.maximum(since_bt, 0), (since_bt >= 0).astype(jnp.int32)


def place(prompts: Sequence[np.ndarray]) -> Prompts:
    """The prompts as one batch on the mesh, its two sizes rounded up."""
    rows, t = _rows(len(prompts)), slots(max(map(len, prompts)))
    tokens_bt, lengths_b = np.zeros((rows, t), np.int32), np.zeros(rows, np.int32)
    for i, prompt in enumerate(prompts):
        lengths_b[i], tokens_bt[i, t - len(prompt) :] = len(prompt), prompt
    return _by_row(Prompts(tokens_bt, lengths_b))


def _choice(
    config: ModelConfig, prompts: Sequence[np.ndarray], sampling: Sampling, method: Method
) -> tuple[Any, Knobs, Said]:
    """Streams, knobs and what was said: the same sampling for each row of what `place` makes."""
    rows = _rows(len(prompts))
    streams_b2 = np.zeros((rows, 2), np.uint32)
    streams_b2[: len(prompts)] = draws.streams(prompts, sampling.seed)
    begins = [np.array([START])] * len(prompts)
    seen = begins if config.architecture == "encoder_decoder" else list(prompts)
    seen += [np.zeros(0, np.int32)] * (rows - len(prompts))
    alike = [sampling] * rows
    said = draws.said(method, seen, alike, config.vocab_size)
    return _by_row((streams_b2, draws.knobs(alike, config.vocab_size), said))


def _by_row(tree: Any) -> Any:
    """On the mesh, cut by rows; every process has all of them."""
    return mesh.put_batch(tree, jax.sharding.get_mesh())


def _rows(n: int) -> int:
    """`n` rounded up to a power of two, and to what the mesh divides."""
    parts = mesh.parts("batch")
    return -(-_power_of_two(n) // parts) * parts


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def slots(n: int) -> int:
    """`n` rounded up to a power of two: the sizes that programs are compiled for."""
    return max(SLOTS, _power_of_two(n))
