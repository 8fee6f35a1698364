"""Continuous batching: requests join and leave a running batch between two of its steps.

A batch has `n` rows. Each request has one of them, and the keys and values of its tokens lie in
slots 0, 1, … of that row's cache: a slot is a position, and each row is as long as it is. A prompt
is read in chunks, one between two steps, so that those who are being answered hardly wait. What a
row held stays after its request has left: a later prompt that begins alike goes on from it.

Rows do not depend on each other. Where a row's logits are no numbers, the row is wiped and read
once more (its cache may have been damaged); if that does not help, its request ends alone.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import mesh
from jaxlm.config import ModelConfig
from jaxlm.generate import constrained, decode, layout
from jaxlm.generate import sampling as draws
from jaxlm.generate import slot_programs as programs
from jaxlm.generate.sampling import Method, Said, Sampling
from jaxlm.generate.slot_programs import CHUNKS
from jaxlm.mesh import spec
from jaxlm.model import transformer
from jaxlm.model.transformer import Params
from jaxlm.schema import UserError

ROWS = 4  # a step computes 1 row, 4, 16, … or all
VISIBLE = 128  # slots that a step looks at: so many, or a power of two above
SHARED = 16  # tokens: the shortest beginning that is worth a copy
TOP = 20  # most alternatives to a token that a request may ask for

Finish = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Request:
    """A prompt to continue."""

    prompt: np.ndarray  # int32 [tokens]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    ends: frozenset[int] = frozenset()  # ids that end the answer
    copy: int = 0  # tells the draws of one prompt and seed apart: the j-th copy, from 0
    top: int = 0  # alternatives to each token that are wanted
    matcher: Any = None  # of `constrained.matcher`, at its beginning: what may be said


class Token(NamedTuple):
    """One token of one row's answer."""

    row: int
    id: int
    log_prob: float  # of the model: before penalties, bias, temperature and filters
    top: list[tuple[int, float]]  # the most likely ids and their log-probabilities
    finish: Finish | None  # "stop": one of `ends`, or nothing may follow; any of them frees the row


@dataclass
class _Row:
    request: Request | None = None
    ids: list[int] = field(default_factory=list)  # the prompt and what was said
    held: int = 0  # of them, so many have their keys and values in slots 0, 1, …
    joined: int = 0  # the how many-th request it is
    stream: Any = (0, 0)  # see `sampling.streams`
    again: bool = False  # it has been wiped and read once more
    matcher: Any = None  # the request's, as far as it has been answered

    @property
    def unread(self) -> int:
        """Tokens to read before the last one, which the next step feeds."""
        return 0 if self.request is None else len(self.ids) - 1 - self.held


class Slots:
    """`n` rows of at most `context` tokens each, prompt and answer; of a decoder.

    The mesh that `params` lie on must be set. They are copied to the devices along its `tensor`
    axis, which hold all rows. Only one thread at a time may call a `Slots`.
    """

    def __init__(self, config: ModelConfig, params: Params, n: int, context: int) -> None:
        if config.architecture != "decoder" or config.prefix_attention:
            raise UserError("continuous batching: expected a decoder that only looks back")
        if config.positions == "relative":
            raise UserError("continuous batching: expected other than relative positions")
        if n < 1 or context < 1:
            raise UserError(f"continuous batching: expected rows and context, got {n}, {context}")
        self.config, self.n = config, n
        self.context = min(context, config.seq_len) if config.positions == "learned" else context
        self.mesh = mesh.of_one_copy(jax.sharding.get_mesh())
        with jax.set_mesh(self.mesh):
            here = transformer.relaid(config, params)
            self._laid = layout.laid_out(config, here, rows=self.n)
            self._cache = self._empty()
        self._rows = [_Row() for _ in range(n)]
        self._said = self._unsaid(0)  # until a request has penalties or a bias
        self._joined = 0
        self.read = self.reused = 0  # tokens of prompts: computed, found in the cache

    def _empty(self) -> Any:
        """Each layer's cache of n + 1 rows, the last one for what fills steps up."""
        s = self.context + CHUNKS[-1]  # room for the padding of the last chunk
        rows, g, k = self.n + 1, self.config.kv_heads, self.config.head_dim
        dtype, where = transformer.compute_dtype(self.config), _on((None, "kv_heads", None, None))
        zeros = functools.partial(jnp.zeros, dtype=dtype, device=where)
        each = range(self.config.n_layers)
        return tuple((zeros((rows, g, k, s)), zeros((rows, g, s, k))) for _ in each)

    # ---------------------------------------------------------------------------- joining, leaving

    @property
    def free(self) -> int:
        """Rows that nobody has."""
        return sum(row.request is None for row in self._rows)

    def check(self, request: Request) -> None:
        """Raises UserError, one line, for what cannot be continued here."""
        decode.check(self.config, [request.prompt], request.max_new_tokens, "prompt")
        draws.validate(request.sampling, self.config.vocab_size)
        n, new = len(request.prompt), request.max_new_tokens
        if n + new - 1 > self.context:
            raise UserError(
                f"prompt: {n} tokens and {new} new ones need a context of {n + new - 1};"
                f" this one is {self.context}"
            )
        if not 0 <= request.top <= TOP:
            raise UserError(f"top: expected 0 … {TOP} alternatives, got {request.top}")

    def join(self, request: Request) -> int:
        """Gives the request a row, of which one must be free; the row's number. Raises UserError as
        `check`."""
        self.check(request)
        ids = np.asarray(request.prompt).tolist()
        shared = [_common(row.ids[: row.held], ids[:-1]) for row in self._rows]
        source = int(np.argmax(shared))
        free = [i for i, row in enumerate(self._rows) if row.request is None]
        i = min(free, key=lambda j: (self._rows[j].held > 0, self._rows[j].joined))
        if shared[source] < SHARED:
            source = i
        elif source in free and self._rows[source].held - shared[source] < SHARED:
            i = source  # one conversation goes on: nobody else needs what it held
        if i != source:
            with jax.set_mesh(self.mesh):
                copy = programs.copier(self._visible(shared[source]), self.mesh)
                self._cache = copy(self._cache, np.int32(source), np.int32(i))
        self._joined += 1
        self.reused += shared[source]
        stream = draws.streams([request.prompt] * (request.copy + 1), request.sampling.seed)[-1]
        held = request.matcher and request.matcher.deep_copy()
        self._rows[i] = _Row(request, ids, shared[source], self._joined, stream, matcher=held)
        self._note(i)
        return i

    def _note(self, i: int) -> None:
        """What penalties and bias of row `i` look at."""
        request, n = self._request(i), len(self._request(i).prompt)
        v, empty = self.config.vocab_size, not self._said.bias.shape[1]
        if empty and not draws.method([request.sampling]).alters:
            return
        if empty:
            self._said = self._unsaid(v)
        alters = Method(True, True, True, alters=True)
        new = draws.said(alters, [request.prompt], [request.sampling], v)
        np.add.at(new.generated[0], self._rows[i].ids[n:], 1)
        with jax.set_mesh(self.mesh):
            self._said = programs.noter(self.mesh)(self._said, np.int32(i), new)

    def _unsaid(self, v: int) -> Said:
        shape, kinds = (self.n + 1, v), Said(jnp.bool, jnp.int32, jnp.float32)
        with jax.set_mesh(self.mesh):
            return Said(*(jnp.zeros(shape, kind, device=_on((None, None))) for kind in kinds))

    def leave(self, i: int) -> None:
        """The request in row `i` is not wanted any longer."""
        self._rows[i].request = None

    # --------------------------------------------------------------------------------------- steps

    def step(self) -> list[Token]:
        """Reads one chunk of the prompt that came first, then says one token in each row whose
        prompt has been read. Rows whose answer ends with it are free afterwards."""
        with jax.set_mesh(self.mesh):
            try:
                self._read()
                return self._say()
            except jax.errors.JaxRuntimeError:
                # Out of memory, say; and the cache was given to what failed: all begin anew.
                logging.getLogger("jaxlm.generate").exception("a step failed: rows begin anew")
                self._cache, self._said = self._empty(), self._unsaid(0)
                taken = [i for i, row in enumerate(self._rows) if row.request is not None]
                for row in self._rows:
                    row.held = 0
                ended = [token for i in taken for token in self._again(i)]
                for i in taken:
                    if self._rows[i].request is not None:
                        self._note(i)
                return ended

    def _read(self) -> None:
        waiting = [(row.joined, i) for i, row in enumerate(self._rows) if row.unread]
        if not waiting:
            return
        i = min(waiting)[1]
        row = self._rows[i]
        size = _chunk(row.unread)
        ids = row.ids[row.held : row.held + min(size, row.unread)]
        padded = np.pad(np.array(ids, np.int32), (0, size - len(ids)), "edge")
        read = programs.reader(self.config, self._visible(row.held + size), self.mesh)
        self._cache = read(self._laid, self._cache, np.int32(i), padded, np.int32(row.held))
        row.held += len(ids)
        self.read += len(ids)

    def _say(self) -> list[Token]:
        active = [i for i, r in enumerate(self._rows) if r.request is not None and not r.unread]
        if not active:
            return []
        rows, requests = [self._rows[i] for i in active], [self._request(i) for i in active]
        b, k = self._many(len(active)), len(active)
        rows_b, last_b, at_b = np.full(b, self.n), np.zeros(b, np.int32), np.zeros(b, np.int32)
        rows_b[:k], last_b[:k] = active, [row.ids[-1] for row in rows]
        at_b[:k] = [row.held for row in rows]
        streams_b2 = np.zeros((b, 2), np.uint32)
        streams_b2[:k] = [row.stream for row in rows]
        samplings = [r.sampling for r in requests] + [Sampling(0.0)] * (b - k)
        top = min(TOP, self.config.vocab_size) if any(r.top for r in requests) else 0
        run = programs.forward(self.config, self._visible(int(at_b.max()) + 1), self.mesh)
        logits_bv, self._cache = run(self._laid, self._cache, rows_b, last_b, at_b)
        knobs = draws.knobs(samplings, self.config.vocab_size)
        choose = programs.chooser(draws.method(samplings), top, self.mesh)
        held = {j: row.matcher for j, row in enumerate(rows) if row.matcher is not None}
        allowed_bv = constrained.allowed(held, b, self.config.vocab_size) if held else None
        how = streams_b2, at_b, knobs, self._said, allowed_bv
        found, self._said = choose(logits_bv, rows_b, *how)
        out = []
        told = (np.asarray(a).tolist() for a in found)
        for i, request, token, log_prob, ids, best in zip(active, requests, *told, strict=False):
            alternatives = list(zip(ids, best, strict=True))[: request.top]
            out += self._said_by(i, token, log_prob, alternatives)
        return out

    def _said_by(
        self, i: int, token: int, log_prob: float, top: list[tuple[int, float]]
    ) -> list[Token]:
        row, request = self._rows[i], self._request(i)
        if not np.isfinite(log_prob):
            row.held = 0
            self._cache = programs.wiper(self.mesh)(self._cache, np.int32(i))
            return self._again(i)
        row.held += 1
        row.ids.append(token)
        finish: Finish | None = None
        if row.matcher is not None and not row.matcher.consume_token(token):
            finish = "error"  # no token goes on towards what matches
        elif token in request.ends or (row.matcher is not None and row.matcher.is_stopped()):
            finish = "stop"
        elif len(row.ids) == len(request.prompt) + request.max_new_tokens:
            finish = "length"
        if finish is not None:
            row.request = None
        return [Token(i, token, log_prob, top, finish)]

    def _again(self, i: int) -> list[Token]:
        """Row `i`, whose cache is empty now, once more from its beginning; or the request's end."""
        row = self._rows[i]
        if not row.again:
            row.again = True
            return []
        row.request = None
        return [Token(i, 0, float("nan"), [], "error")]

    def _request(self, i: int) -> Request:
        request = self._rows[i].request
        assert request is not None
        return request

    def _visible(self, slots: int) -> int:
        return min(max(VISIBLE, decode.slots(slots)), self.context + CHUNKS[-1])

    def _many(self, rows: int) -> int:
        """`rows` rounded up to a number that is compiled for."""
        many = 1
        while many < rows:
            many *= ROWS
        return min(many, self.n)


def _on(axes: Sequence[str | None]) -> jax.NamedSharding:
    return jax.NamedSharding(jax.sharding.get_mesh(), spec(axes))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _chunk(n: int) -> int:
    """How many tokens to read where `n` are left: all, if that is less than half padding."""
    above = [c for c in CHUNKS if n <= c < 2 * n]
    below = [c for c in CHUNKS if c <= n]
    return above[0] if above else below[-1] if below else CHUNKS[0]
