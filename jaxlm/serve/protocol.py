"""What may be asked: OpenAI's fields of a completion and a chat completion, checked by name."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxlm.generate.sampling import Sampling
from jaxlm.generate.slots import TOP
from jaxlm.schema import UserError, check, doc, from_dict

MOST_COPIES, MOST_PROMPTS, MOST_STOPS = 16, 64, 16
UNSUPPORTED = (
    "audio", "best_of", "function_call", "functions", "modalities", "parallel_tool_calls",
    "prediction", "reasoning_effort", "service_tier", "store", "tool_choice",
    "tools", "verbosity", "web_search_options",
)  # fmt: skip
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # who asks is not kept


@dataclass(frozen=True)
class Options:
    """What both have. Beyond OpenAI's: top_k, min_p, typical_p, repetition_penalty, regex."""

    model: str
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Any = doc(None, "{token id: bias}")
    regex: str = doc("", "what the answer must match")
    seed: int | None = None
    n: int = 1
    stop: Any = doc(None, "a text or a list of texts")
    stream: bool = False
    stream_options: Any = None
    max_tokens: int | None = None

    @property
    def sampling(self) -> Sampling:
        """Raises UserError; ranges are checked where it is used."""
        bias = self.logit_bias or {}
        if not isinstance(bias, dict):
            raise UserError(f"logit_bias: expected an object of token ids, got {bias!r:.60}")
        pairs = []
        for name, value in bias.items():
            if not (name.isdecimal() and len(name) < 9) or type(value) not in (int, float):
                raise UserError(f"logit_bias: expected numbers by token id, got {name!r:.20}")
            pairs.append((int(name), float(value)))
        seed = secrets.randbits(31) if self.seed is None else self.seed
        return Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            typical_p=self.typical_p, repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty, presence_penalty=self.presence_penalty,
            logit_bias=tuple(pairs), seed=seed,
        )  # fmt: skip

    @property
    def form(self) -> dict[str, Any]:
        """What `constrained.grammar` takes; {} where any text will do."""
        return {"regex": self.regex} if self.regex else {}

    @property
    def stops(self) -> list[str]:
        found = texts(self.stop if self.stop is not None else [], "stop")
        if len(found) > MOST_STOPS or "" in found:
            raise UserError(f"stop: expected at most {MOST_STOPS} texts, none of them empty")
        return found

    @property
    def counted(self) -> bool:
        """Whether a stream ends with its usage."""
        options = self.stream_options or {}
        if not isinstance(options, dict) or options.keys() - {"include_usage"}:
            raise UserError(f"stream_options: expected include_usage alone, got {options!r:.60}")
        if options and not self.stream:
            raise UserError("stream_options: only with stream")
        return check(options.get("include_usage", False), bool, "stream_options.include_usage")


@dataclass(frozen=True)
class Completion(Options):
    prompt: Any = doc("", "a text, token ids, or a list of either")
    suffix: str = doc("", "what stands after the answer (fill in the middle)")
    echo: bool = False
    logprobs: int | None = None

    @property
    def top(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Raises UserError."""
        given = self.prompt
        one = isinstance(given, str) or (bool(given) and _are_ids(given))
        many = [given] if one else given
        if not isinstance(many, list) or not 1 <= len(many) <= MOST_PROMPTS:
            raise UserError(f"prompt: expected 1 to {MOST_PROMPTS} texts or lists of token ids")
        return many if all(map(_are_ids, many)) else texts(many, "prompt")


def _are_ids(given: Any) -> bool:
    return isinstance(given, list) and all(type(i) is int and 0 <= i < 1 << 31 for i in given)


@dataclass(frozen=True)
class Chat(Options):
    messages: Any = doc((), "[{role, content}]")
    response_format: Any = doc(None, "{type: text, json_object or json_schema}")
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None

    @property
    def top(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise UserError("top_logprobs: only with logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def form(self) -> dict[str, Any]:
        """Raises UserError."""
        given = {"type": "text"} if self.response_format is None else self.response_format
        kind = given.get("type") if isinstance(given, dict) else None
        if kind == "text":
            return super().form
        if self.regex:
            raise UserError("regex: not beside response_format")
        if kind == "json_object":
            return {"json_schema": {"type": "object"}}
        if kind != "json_schema":
            raise UserError(
                f"response_format.type: expected text, json_object or json_schema, got {kind!r:.60}"
            )
        named = given.get("json_schema")
        schema = named.get("schema") if isinstance(named, dict) else None
        if not isinstance(schema, dict):
            raise UserError("response_format.json_schema.schema: expected a JSON schema")
        return {"json_schema": schema}

    @property
    def turns(self) -> list[dict[str, str]]:
        """Messages of a role and a text each. Raises UserError."""
        if not isinstance(self.messages, list) or not self.messages:
            raise UserError("messages: expected a list of at least one message")
        return [_turn(message, f"messages[{i}]") for i, message in enumerate(self.messages)]


def _turn(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise UserError(f"{where}: expected role and content")
    other = sorted(k for k, v in message.items() if k not in ("role", "content") and v)
    if other:
        raise UserError(f"{where}.{other[0]}: not supported here")
    role: Literal["system", "user", "assistant"] = check(
        {"developer": "system"}.get(str(message["role"]), message["role"]),
        Literal["system", "user", "assistant"], f"{where}.role",
    )  # fmt: skip
    content = message["content"]
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            raise UserError(f"{where}.content: only parts of type 'text' are supported here")
        content = "".join(texts([p.get("text") for p in content], f"{where}.content"))
    return {"role": role, "content": texts(content, f"{where}.content")[0]}


def texts(given: Any, where: str) -> list[str]:
    """A text or a list of them as a list. Raises UserError, also for half of a surrogate pair."""
    many = [given] if isinstance(given, str) else given
    if not isinstance(many, list) or not all(isinstance(text, str) for text in many):
        raise UserError(f"{where}: expected a text or a list of texts, got {given!r:.60}")
    for text in many:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: holds half of a surrogate pair") from None
    return many


def read(raw: bytes, kind: type[Completion] | type[Chat]) -> Any:
    """A request from its body. Raises UserError, one line."""
    try:
        given = json.loads(raw, parse_constant=_no_constant)
    except RecursionError:
        raise UserError("the body: nested too deeply") from None
    except ValueError as e:
        raise UserError(f"the body: expected JSON ({e})") from None
    if not isinstance(given, dict):
        raise UserError("the body: expected an object")
    for name in UNSUPPORTED:
        if given.get(name) is not None:
            raise UserError(f"{name}: not supported here")
    stated = {k: v for k, v in given.items() if v is not None and k not in IGNORED}
    asked = _named(kind, stated)
    texts([asked.model], "model")
    if not 1 <= asked.n <= MOST_COPIES:
        raise UserError(f"n: expected 1 … {MOST_COPIES}, got {asked.n}")
    if asked.top is not None and not 0 <= asked.top <= TOP:
        raise UserError(f"logprobs: expected 0 … {TOP} alternatives, got {asked.top}")
    return asked


def _named(kind: Any, stated: dict[str, Any]) -> Any:
    try:
        return from_dict(kind, stated, "")
    except UserError as e:  # `where` has a dot after it
        raise UserError(str(e).removeprefix(".")) from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


# -------------------------------------------------------------------------------------- log-probs


@dataclass(frozen=True)
class Said:
    """A token that was said, and what else was likely."""

    text: str
    log_prob: float
    top: Sequence[tuple[str, float]]


def _number(log_prob: float) -> float:
    return log_prob if math.isfinite(log_prob) else -9999.0  # OpenAI's: "very unlikely"


def _bytes(text: str) -> list[int] | None:
    return None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())


def _row(text: str, log_prob: float) -> dict[str, Any]:
    return {"token": text, "logprob": _number(log_prob), "bytes": _bytes(text)}


def chat_logprobs(said: Sequence[Said]) -> dict[str, Any]:
    rows = [
        {**_row(t.text, t.log_prob), "top_logprobs": [_row(*pair) for pair in t.top]} for t in said
    ]
    return {"content": rows, "refusal": None}


def completion_logprobs(said: Sequence[Said], offset: int) -> dict[str, Any]:
    """`offset`: letters before the first of them."""
    lengths = [len(t.text) for t in said]
    return {
        "tokens": [t.text for t in said],
        "token_logprobs": [_number(t.log_prob) for t in said],
        "top_logprobs": [{text: _number(p) for text, p in t.top} for t in said],
        "text_offset": [offset + sum(lengths[:i]) for i in range(len(said))],
    }
