"""A model with its tokenizer, as people use one: logits, text, scores, embeddings."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.data.chat import ChatTemplate
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.evaluate import likelihood, reading
from jaxlm.evaluate.reading import Pooling
from jaxlm.generate import constrained, decode, layout, watch, written
from jaxlm.generate.sampling import Sampling
from jaxlm.generate.speculative import Draft
from jaxlm.generate.written import Continuation
from jaxlm.model.transformer import Params
from jaxlm.schema import UserError, from_dict

MOST_INSPECTED = 128  # tokens


@dataclass(frozen=True)
class Score:
    """How likely a text is: log p(text), over so many tokens and UTF-8 bytes."""

    log_probability: float  # nats
    tokens: int
    bytes: int
    greedy: bool = False  # whether each of the tokens was the likeliest

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(-self.log_probability / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return -self.log_probability / math.log(2) / self.bytes


@dataclass(frozen=True)
class LanguageModel:
    """Tokenizer, config and params; what `jaxlm.from_pretrained` returns.

    `params` lie on `mesh`. Rows of a batch do not depend on each other.
    """

    tokenizer: Tokenizer
    config: ModelConfig
    params: Params = field(repr=False)
    mesh: jax.sharding.Mesh = field(repr=False)
    pooling: Pooling = field(default_factory=Pooling)
    bos_id: int | None = None  # put before each text; our own runs saw none
    labels: tuple[str, ...] = ()  # what a classifier's outputs are called
    chat: ChatTemplate | None = None  # how it was taught to read conversations
    infill: tuple[int, int, int] | None = None  # what a run put before prefix, suffix and middle

    def logits(self, token_ids: Any) -> jax.Array:
        """Float32 [b, t, vocab] of token ids [b, t]: what may follow each of them."""
        ids = np.asarray(token_ids)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"token_ids: expected integers [b, t], got {ids.dtype} {ids.shape}")
        self._check(list(ids), "token_ids")
        b, t = ids.shape
        with jax.set_mesh(self.mesh):
            run = reading.logits(self.config, self.mesh)
            out = run(self.params, *reading.placed(list(ids), self.mesh))
        return out[:b, :t]

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        num_return_sequences: int = 1,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        return_full_text: bool = True,
        draft: LanguageModel | None = None,
        regex: str | None = None,
        json_schema: Any = None,
        **sampling: Any,
    ) -> list[list[str]]:
        """`num_return_sequences` texts for each prompt, each beginning with the prompt unless
        `return_full_text` is false; of an encoder–decoder, what its decoder writes.

        A text ends at the end-of-text token, before the first of the strings `stop`, or when it has
        `max_length` tokens, the prompt's counted, or `max_new_tokens` without them (64 where
        neither is given). `sampling` are fields of `Sampling`: temperature (0: the most likely
        token each time), top_k, top_p, min_p, the penalties, logit_bias, seed; the same seed gives
        the same texts, whatever else is in the batch. With `num_beams` the texts are the best that
        beam search finds (`generate.beams`), and nothing is drawn. `draft` is a smaller model with
        the same tokenizer, on the same device, whose proposals save passes of this one and change
        nothing about what may be said (`generate.speculative`). With `regex` or `json_schema` (a
        dict, or its text) answers match it, unless a limit comes first (`generate.constrained`).

        Raises UserError for both lengths at once, for a prompt that is `max_length` long already,
        for sampling with beams, and for an encoder.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        full = return_full_text and self.config.architecture != "encoder_decoder"
        lengths = {"max_new_tokens": max_new_tokens, "max_length": max_length}
        held = regex is not None or json_schema is not None
        if (num_beams > 1) + (draft is not None) + held > 1:
            raise UserError("num_beams, draft, regex or json_schema: expected one of them")
        if draft is not None or held:
            led = self._checked(draft) if draft else constrained.grammar(regex, json_schema)
            how = from_dict(Sampling, sampling, "sampling")
            texts = self._led(prompts, lengths, num_return_sequences, stop, how, led)
        elif num_beams == 1:
            found = self.continuations(
                prompts, **lengths, num_return_sequences=num_return_sequences, stop=stop, **sampling
            )
            texts = [[said.text for said in of] for of in found]
        else:
            if sampling or not 1 <= num_return_sequences <= num_beams:
                raise UserError("num_beams: expected no sampling and no more texts than beams")
            texts = [[] for _ in prompts]
            for limit, rows, ids in self._by_limit(prompts, **lengths):
                given = ids, limit, num_beams, length_penalty, stop
                with jax.set_mesh(self.mesh):
                    best = written.best(self.config, self.params, self.tokenizer, *given)
                for i, of in zip(rows, best, strict=True):
                    texts[i] = of[:num_return_sequences]
        before = prompts if full else [""] * len(prompts)
        return [[p + text for text in of] for p, of in zip(before, texts, strict=True)]

    def continuations(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        num_return_sequences: int = 1,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> list[list[Continuation]]:
        """As `generate`, without beams: what follows each prompt, with its tokens, their
        log-probabilities and why it ends. Where there is a `stop`, rows end soon after it was said,
        not only their texts."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        how, n = from_dict(Sampling, sampling, "sampling"), num_return_sequences
        if n < 1:
            raise UserError(f"num_return_sequences: expected at least 1, got {n}")
        out: list[list[Continuation]] = [[] for _ in prompts]
        for limit, rows, ids in self._by_limit(prompts, max_new_tokens, max_length):
            given = [prompt for prompt in ids for _ in range(n)], limit, how, stop
            with jax.set_mesh(self.mesh):
                params = self._alone if len(given[0]) == 1 else self.params
                found = written.continuations(self.config, params, self.tokenizer, *given)
            for k, i in enumerate(rows):
                out[i] = found[k * n : (k + 1) * n]
        return out

    def _led(
        self, prompts: Sequence[str], lengths: Any, n: int, stop: Any, how: Sampling, led: Any
    ) -> list[list[str]]:
        texts: list[list[str]] = [[] for _ in prompts]
        for limit, rows, ids in self._by_limit(prompts, **lengths):
            given = [prompt for prompt in ids for _ in range(n)], limit, how, led, stop
            with jax.set_mesh(self.mesh):
                found = written.led(self.config, self._alone, self.tokenizer, *given)
            for k, i in enumerate(rows):
                texts[i] = found[k * n : (k + 1) * n]
        return texts

    @functools.cached_property
    def _alone(self) -> Params:
        """`params` as steps of one row read them: made, and then kept beside them, when one prompt
        is first continued alone."""
        with jax.set_mesh(self.mesh):
            return layout.laid_out(self.config, self.params)

    def in_bits(self, bits: int) -> LanguageModel:
        """With the matrices of its layers as whole numbers of 8 or 4 bits (`model.turned`);
        embeddings, norms and experts stay as they are. To be used, not trained or exported."""
        with jax.set_mesh(self.mesh):
            return replace(self, params=layout.laid_out(self.config, self.params, bits=bits))

    def _checked(self, draft: LanguageModel) -> Draft:
        if draft.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise UserError("draft: expected a model with the same tokenizer")
        return Draft(draft.config, draft._alone)

    def _by_limit(
        self, prompts: Sequence[str], max_new_tokens: int | None, max_length: int | None
    ) -> list[tuple[int, list[int], list[np.ndarray]]]:
        """Prompts that may go on by as many tokens: how many, which prompts, their ids."""
        self._need("generate text", "decoder", "encoder_decoder")
        both = self.config.architecture == "encoder_decoder"
        encode = self.tokenizer.encode_with_special
        ids = [encode(p) if both else self._begun(self.tokenizer.encode(p)) for p in prompts]
        counted = [1 if both else len(i) for i in ids]  # a decoder's start is one token
        limits = written.limits(counted, max_new_tokens, max_length)
        groups = [(m, [i for i, n in enumerate(limits) if n == m]) for m in sorted(set(limits))]
        return [(limit, rows, [ids[i] for i in rows]) for limit, rows in groups]

    def score(
        self, texts: str | Sequence[str], given: str | Sequence[str] | None = None
    ) -> list[Score]:
        """log p of each text after the text in `given`; where there is none, after a beginning: its
        BOS, or else the end of a text before it.

        Both are encoded as one text, with the blanks that `given` ends in as part of what follows.
        Raises UserError for an empty text, and for one longer than learned positions.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        given = [given] if isinstance(given, str) else list(given or [""] * len(texts))
        self._need("score texts", "decoder")
        before = self.tokenizer.encode_batch([g.rstrip() for g in given])
        whole = self.tokenizer.encode_batch([g + t for g, t in zip(given, texts, strict=True)])
        ids, starts = [], []
        for i, (b, w) in enumerate(zip(before, whole, strict=True)):
            if not texts[i] or not len(w[len(b) :]):
                raise UserError(f"texts[{i}]: expected at least one token, got none")
            ids.append(self._begun(w, None if len(b) else self.begins))
            starts.append(len(ids[-1]) - len(w) + len(b))
        self._check([row[:-1] for row in ids], "texts")  # the last one is never fed
        found = self.score_ids(ids, starts)
        return [
            Score(nats, len(w) - len(b), len(text.encode()), greedy)
            for (nats, greedy), b, w, text in zip(found, before, whole, texts, strict=True)
        ]

    @property
    def begins(self) -> int:
        """The token that a text begins after: its BOS, or else the end of a text before it."""
        return self.tokenizer.eos_id if self.bos_id is None else self.bos_id

    def pieces(self, ids: np.ndarray) -> list[np.ndarray]:
        """A text's tokens in rows of `seq_len` targets at most, each after one token: the text's
        beginning, or the last of the row before."""
        whole, t = np.concatenate([[self.begins], ids]).astype(np.int32), self.config.seq_len
        return [whole[i : i + t + 1] for i in range(0, len(whole) - 1, t)]

    def score_ids(
        self, ids: Sequence[np.ndarray], starts: Sequence[int]
    ) -> list[tuple[float, bool]]:
        """Of each row of token ids, from its place `starts` (at least 1) on: log p in nats, and
        whether each of these tokens was the likeliest."""
        out: list[tuple[float, bool]] = [(0.0, True)] * len(ids)
        for rows, whole in reading.buckets([len(i) - 1 for i in ids], self.config.vocab_size):
            batch = reading.scored([ids[i] for i in rows], [starts[i] for i in rows], whole)
            with jax.set_mesh(self.mesh):
                nats, greedy = likelihood.continuations(self.config, self.params, batch)
            for i, n, g in zip(rows, nats.tolist(), greedy.tolist(), strict=True):
                out[i] = (-n, g)
        return out

    def embed(self, texts: str | Sequence[str]) -> np.ndarray:
        """Float32 [b, d]: one vector for each text, from the last layer's states (`pooling`)."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        self._need("embed texts", "decoder", "encoder")
        ids = self.read(texts, self.pooling.max_tokens)
        self._check(ids, "texts")
        out = np.zeros((len(texts), self.config.d_model), np.float32)
        for rows, _ in reading.buckets([len(i) for i in ids]):
            with jax.set_mesh(self.mesh):
                run = reading.embedded(self.config, self.pooling, self.mesh)
                vectors = run(self.params, *reading.placed([ids[i] for i in rows], self.mesh))
            out[rows] = np.asarray(vectors)[: len(rows)]
        return out

    def classify(self, texts: str | Sequence[str]) -> np.ndarray:
        """Float32 [b, classes]: a classifier's logits for each text, which is cut to the context;
        of one that reads each token, [b, t, classes], padded on the right."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not self.config.n_classes:
            raise UserError("a model without classes (model.n_classes) cannot classify texts")
        ids = self.read(texts, self.config.seq_len)
        self._check(ids, "texts")
        each = self.config.pooling == "each"
        shape = (len(texts), max(map(len, ids)), self.config.n_classes)
        out = np.zeros(shape if each else (shape[0], shape[2]), np.float32)
        for rows, _ in reading.buckets([len(i) for i in ids]):
            with jax.set_mesh(self.mesh):
                run = reading.classified(self.config, self.mesh)
                given = reading.placed([ids[i] for i in rows], self.mesh)
                found = np.asarray(run(self.params, *given))
            for i, logits in zip(rows, found, strict=False):  # rows may have been filled up
                if each:
                    out[i, : len(ids[i])] = logits[: len(ids[i])]
                else:
                    out[i] = logits
        return out

    def read(self, texts: Sequence[str], most: int | None) -> list[np.ndarray]:
        """Each text's token ids as a whole: of an encoder within its special tokens, of a decoder
        after its BOS; at most `most`."""
        if self.config.architecture == "encoder":
            return [self.tokenizer.encode_with_special(text, most) for text in texts]
        return [self._begun(self.tokenizer.encode(text))[:most] for text in texts]

    def inspect(self, prompt: str, top: int = 5) -> dict[str, Any]:
        """What a decoder or encoder makes of a prompt: {"tokens": [{id, text}], "maps": float32
        [layers, heads, t, t], "next": for each token the `top` most likely tokens after it (an
        encoder's: in its place) as [text, probability]}, [] for an encoder without that head."""
        self._need("be inspected", "decoder", "encoder")
        encoder = self.config.architecture == "encoder"
        encode = self.tokenizer.encode_with_special
        ids = encode(prompt) if encoder else self._begun(self.tokenizer.encode(prompt))
        self._check([ids], "prompt")
        if len(ids) > MOST_INSPECTED:
            raise UserError(f"prompt: {len(ids)} tokens; at most {MOST_INSPECTED} fit on a page")
        with jax.set_mesh(self.mesh):
            run = reading.inspected(self.config, self.mesh)
            maps, logits = run(self.params, *reading.placed([ids], self.mesh))
        t, none = len(ids), np.zeros((0, 0))
        spelled = functools.partial(watch.token_text, self.tokenizer)
        share_tv = none if logits is None else np.asarray(jax.nn.softmax(logits[0, :t]))
        best = [np.argsort(-row)[:top] for row in share_tv]
        return {
            "tokens": [{"id": int(i), "text": spelled(int(i))} for i in ids],
            "maps": np.asarray(maps)[:, 0, :, :t, :t],
            "next": [
                [[spelled(int(i)), float(row[i])] for i in order]
                for row, order in zip(share_tv, best, strict=True)
            ],
        }

    def _begun(self, ids: np.ndarray, otherwise: int | None = None) -> np.ndarray:
        first = otherwise if self.bos_id is None else self.bos_id
        return ids if first is None else np.concatenate([np.array([first], np.int32), ids])

    def _need(self, what: str, *architectures: str) -> None:
        if self.config.architecture not in architectures:
            raise UserError(f"a model of architecture {self.config.architecture!r} cannot {what}")

    def _check(self, ids: Sequence[np.ndarray], where: str) -> None:
        # asked are ids and positions only, and those of an encoder are a decoder's
        decode.check(replace(self.config, architecture="decoder"), ids, 1, where)
