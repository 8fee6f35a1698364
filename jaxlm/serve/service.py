"""The models that are served by name, and how a request becomes tokens and tokens become text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxlm.data import chat
from jaxlm.data.tokenizer import Subword
from jaxlm.generate import constrained
from jaxlm.generate.slots import Request
from jaxlm.generate.watch import token_text
from jaxlm.language_model import LanguageModel
from jaxlm.schema import UserError, hint
from jaxlm.serve.documents import NOTHING, Documents, Found, grounded
from jaxlm.serve.engine import Broken, Call, Engine
from jaxlm.serve.guard import Refused
from jaxlm.serve.metrics import Metrics
from jaxlm.serve.protocol import Chat, Completion, Said
from jaxlm.serve.writer import Writer

ANSWER_S = 600.0  # the longest that a request may wait and be answered
FEW = 16  # tokens of a completion that states no max_tokens, as OpenAI's
INFILL = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)  # how Qwen, StarCoder and Code Llama call them


@dataclass(frozen=True)
class Served:
    """A model under a name."""

    engine: Engine
    ends: frozenset[int] = field(default_factory=frozenset)  # of an answer in a conversation
    documents: Documents | None = None  # that answers in a conversation come from

    @property
    def model(self) -> LanguageModel:
        return self.engine.model


def served(engine: Engine, documents: Documents | None = None) -> Served:
    """Raises UserError for documents that a model without a chat template is to read."""
    model = engine.model
    if documents is not None and model.chat is None:
        raise UserError("documents: expected a model with a chat template")
    return Served(engine, chat.ends_of_turn(model.tokenizer, model.chat), documents)


@dataclass
class Piece:
    """What came of one answer: text, the tokens that it is made of, and why it ended."""

    index: int
    text: str
    said: list[Said]
    finish: str | None = None


@dataclass
class Reading:
    """What a model is asked."""

    prompts: list[np.ndarray]
    texts: list[str] = field(default_factory=list)  # of the prompts, where they are to be repeated
    matcher: Any = None  # what holds answers to a form
    sources: list[Found] | None = None  # passages they come from, where there are documents

    @property
    def nothing(self) -> bool:
        """Whether to say that nothing was found, in place of the model."""
        return self.sources == [] and self.matcher is None


@dataclass
class Asking:
    """A request under way: its answers' pieces as they come."""

    name: str
    served: Served
    read: Reading
    copies: int
    call: Call
    stops: list[str]
    top: int | None
    metrics: Metrics
    began: float = field(default_factory=time.monotonic)
    generated: int = 0

    @property
    def answers(self) -> int:
        return self.copies * len(self.read.prompts)

    @property
    def usage(self) -> dict[str, int]:
        asked = 0 if self.read.nothing else sum(map(len, self.read.prompts))
        return {
            "prompt_tokens": asked,
            "completion_tokens": self.generated,
            "total_tokens": asked + self.generated,
        }

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Raises Broken where an answer came to no end."""
        if self.read.nothing:
            for i in range(self.answers):
                yield Piece(i, NOTHING, [], "stop")
            return
        words, ends = self.served.model.tokenizer, self.call.jobs[0].request.ends
        each = [prompt for prompt in self.read.prompts for _ in range(self.copies)]
        writers = [Writer(words, prompt, self.stops) for prompt in each]
        waits: list[list[Said]] = [[] for _ in writers]
        name, seen = self.name, False
        try:
            async with asyncio.timeout(ANSWER_S):
                async for i, token in self.call.tokens():
                    if token.finish == "error":
                        raise Broken("the model could not answer this request")
                    if not seen:
                        self.metrics.first_token.labels(name).observe(self._seconds())
                    seen = True
                    self.generated += 1
                    self.metrics.generated.labels(name).inc()
                    piece, writer = Piece(i, "", waits[i]), writers[i]
                    if token.id not in ends:
                        if self.top is not None:
                            top = [(self._text(j), p) for j, p in token.top]
                            waits[i].append(Said(self._text(token.id), token.log_prob, top))
                        piece.text = writer.add(token.id)
                    if token.finish is not None and not writer.stopped:
                        piece.text += writer.rest()
                    if token.finish is not None or writer.stopped:
                        cut = token.finish == "length" and not writer.stopped
                        piece.finish = "length" if cut else "stop"
                    if writer.stopped and token.finish is None:
                        self.call.leave(i)
                    if piece.text or piece.finish:
                        waits[i] = []
                        yield piece
            self.metrics.whole.labels(name).observe(self._seconds())
        except TimeoutError:
            raise Broken(f"no answer within {ANSWER_S:g} s") from None
        finally:
            self.call.close()

    def _text(self, token: int) -> str:
        return token_text(self.served.model.tokenizer, token)

    def _seconds(self) -> float:
        return time.monotonic() - self.began


class Service:
    """All of it. Texts are encoded by one thread, since a tokenizer's setting differs for chats."""

    def __init__(self, models: Mapping[str, Served]) -> None:
        self.models = dict(models)
        self.metrics = Metrics({name: s.engine for name, s in models.items()})
        self._reader = ThreadPoolExecutor(1, "jaxlm-tokenizer")

    def close(self) -> None:
        for engine in {id(s.engine): s.engine for s in self.models.values()}.values():
            engine.close()

    async def ask(self, asked: Completion | Chat) -> Asking:
        """Puts a request into its model's queue. Raises UserError, Refused, Busy and Broken."""
        found = self.models.get(asked.model)
        if found is None:
            message = f"model: no {asked.model!r:.80} here; {hint(asked.model, self.models)}"
            raise Refused(404, message, "model_not_found")
        talk = isinstance(asked, Chat)
        loop, top = asyncio.get_running_loop(), asked.top
        stops, sampling = asked.stops, asked.sampling
        ends = frozenset({found.model.tokenizer.eos_id}) | (found.ends if talk else frozenset())
        read = await loop.run_in_executor(self._reader, _read, found, asked, ends)
        most = asked.max_tokens
        if isinstance(asked, Chat) and asked.max_completion_tokens is not None:
            most = asked.max_completion_tokens
        context, longest = found.engine.context, max(map(len, read.prompts))
        if most is None:
            most = max(1, context - longest + 1) if talk else FEW
        if longest + most - 1 > context:
            message = f"prompt: {longest} tokens and {most} new ones; the context is {context}"
            raise Refused(400, message, "context_length_exceeded")
        more = top or 0, read.matcher
        requests = [
            Request(prompt, most, sampling, ends, _before(read.prompts, i) * asked.n + j, *more)
            for i, prompt in enumerate(read.prompts)
            for j in range(asked.n)
        ]
        call = found.engine.ask([] if read.nothing else requests)
        asking = Asking(asked.model, found, read, asked.n, call, stops, top, self.metrics)
        self.metrics.prompt.labels(asked.model).inc(asking.usage["prompt_tokens"])
        return asking


def _read(found: Served, asked: Completion | Chat, ends: frozenset[int]) -> Reading:
    """Raises UserError."""
    model = found.model
    if isinstance(asked, Chat):
        read = _conversation(found, asked)
    else:
        read = _completion(model, asked)
    if asked.form:
        grammar = constrained.grammar(**asked.form)
        given = model.tokenizer, model.config.vocab_size, grammar, ends
        read.matcher = constrained.matcher(*given)
    return read


def _before(prompts: Sequence[np.ndarray], i: int) -> int:
    """How many of the same stand before prompt `i`: their draws are to differ."""
    return sum(np.array_equal(prompts[i], other) for other in prompts[:i])


def _conversation(found: Served, asked: Chat) -> Reading:
    """Up to where the assistant's turn begins; with the passages that the last message is near
    to."""
    template, turns, sources = found.model.chat, asked.turns, None
    if template is None:
        raise UserError(f"model: {asked.model!r} has no chat template; use /v1/completions")
    if found.documents is not None and turns[-1]["role"] == "user":
        question = turns[-1]["content"]
        sources = found.documents.nearest(question)
        if sources:
            turns[-1] = {"role": "user", "content": grounded(question, sources)}
    ids = chat.asked(found.model.tokenizer, template, turns)
    return Reading([ids], sources=sources)


def _completion(model: LanguageModel, asked: Completion) -> Reading:
    words = model.tokenizer
    if asked.echo and (asked.logprobs is not None or asked.suffix):
        raise UserError("echo: not supported together with logprobs or suffix")
    prompts: list[np.ndarray] = []
    for prompt in asked.prompts:
        if isinstance(prompt, list):
            prompts.append(np.array(prompt, np.int32))
        elif asked.suffix:
            prompts.append(_infill(model, prompt, asked.suffix))
        else:
            prompts += model.read([prompt], None)
    whole = [p if isinstance(p, str) else words.decode(p) for p in asked.prompts if asked.echo]
    if not all(map(len, prompts)):
        raise UserError("prompt: expected at least one token")
    return Reading(prompts, whole)


def _infill(model: LanguageModel, prefix: str, suffix: str) -> np.ndarray:
    """What makes a model say what stands between (Bavarian et al. 2022, "PSM")."""
    words, marks = model.tokenizer, [model.infill]
    if isinstance(words, Subword):
        marks += [tuple(map(words.inner.token_to_id, names)) for names in INFILL]
    for ids in marks:
        if ids is not None and None not in ids:
            a, b = words.encode(prefix).tolist(), words.encode(suffix).tolist()
            return np.array([ids[0], *a, ids[1], *b, ids[2]], np.int32)
    raise UserError("suffix: this model has no tokens for filling in the middle")
