"""Conversations as a model was taught to read them: its chat template, and which tokens it says.

A template is a program from a stranger's file. It runs in Jinja's immutable sandbox and sees the
messages and names of special tokens, nothing else.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.extras import library
from jaxlm.data.tokenizer import Subword, Tokenizer
from jaxlm.files import first_line
from jaxlm.schema import UserError

Message = dict[str, str]


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template and the special tokens that it may name."""

    source: str
    tokens: dict[str, str] = field(default_factory=dict)  # bos_token, eos_token, …

    @cached_property
    def _compiled(self) -> Any:
        sandbox = library("jinja2.sandbox", "chat")
        jinja = library("jinja2", "chat")
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            return environment.from_string(self.source)
        except jinja.TemplateError as e:
            raise UserError(f"chat template: {first_line(e)}") from e

    def text(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The conversation as one text; with `ask`, up to where the assistant's turn begins.

        Raises UserError for what the template refuses, and for one that reaches out of its sandbox.
        """
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise UserError(f"messages[{i}]: expected role and content, got {message!r:.60}")
        given = {"messages": list(messages), "add_generation_prompt": ask, **self.tokens}
        compiled = self._compiled
        try:
            return compiled.render(**given)
        except UserError:
            raise
        except Exception as e:  # whatever a stranger's program does
            raise UserError(f"chat template: {type(e).__name__}: {first_line(e)}") from e


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise UserError(f"chat template: {message}")


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def of_folder(folder: Path) -> ChatTemplate | None:
    """That of a Hugging Face folder (chat_template.jinja or tokenizer_config.json), if any."""
    path, own = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    stated = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    source = own.read_text("utf-8") if own.is_file() else stated.get("chat_template")
    if isinstance(source, list):  # several by name
        source = next((t["template"] for t in source if t.get("name") == "default"), None)
    if not source:
        return None
    tokens = {k: v for k, v in stated.items() if k.endswith("_token") and v}
    return ChatTemplate(
        source, {k: v["content"] if isinstance(v, dict) else str(v) for k, v in tokens.items()}
    )


def of_gguf(stated: Any) -> ChatTemplate | None:
    """That of GGUF metadata, if any."""
    source = stated.get("tokenizer.chat_template")
    names = stated.get("tokenizer.ggml.tokens", [])
    ids = {k: stated.get(f"tokenizer.ggml.{k}_token_id") for k in ("bos", "eos")}
    tokens = {f"{k}_token": names[i] for k, i in ids.items() if i is not None}
    return ChatTemplate(source, tokens) if source else None


# ------------------------------------------------------------------------------------------- tokens


def encoded(words: Tokenizer, text: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Token ids of a rendered conversation, in which special tokens are such, and the characters
    that each stands for. Raises UserError for a tokenizer that has no special tokens."""
    if not isinstance(words, Subword):
        raise UserError(f"a tokenizer of kind {words.kind!r} has no special tokens for a chat")
    words.inner.encode_special_tokens = False
    try:
        found = words.inner.encode(text, add_special_tokens=False)
    finally:
        words.inner.encode_special_tokens = True
    return np.array(found.ids, np.int32), found.offsets


def conversation(
    words: Tokenizer, template: ChatTemplate, messages: Sequence[Message]
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [t], and bool [t]: which of them the assistant says, the end of its turn included.

    Raises UserError where the template rewrites what came before a turn, so that no part of the
    text is the turn's.
    """
    text = template.text(messages)
    ids, offsets = encoded(words, text)
    says = np.zeros(len(ids), bool)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.text(messages[:i], ask=True)
        after = template.text(messages[: i + 1])
        if not (after.startswith(before) and text.startswith(after.rstrip("\n"))):
            raise UserError(
                f"chat template: the text of messages[{i}] changes with what stands around it"
            )
        low, high = len(before), len(after.rstrip("\n"))
        says |= np.array([low <= a and b <= high and a < b for a, b in offsets])
    return ids, says


def asked(words: Tokenizer, template: ChatTemplate, messages: Sequence[Message]) -> np.ndarray:
    """Token ids [t] of a conversation, up to where the assistant's turn begins.

    Special tokens are those that the template writes. One that a message spells stays text, so that
    nobody ends his own turn and speaks in another's name: it is rendered as a twin, a token that is
    known here alone, and what the twin stands for is read as text.
    """
    told = [{**m, "content": _twinned(words, m["content"])} for m in messages]
    text = template.text(told, ask=True)
    if told == list(messages):
        return encoded(words, text)[0]
    known: Any = words  # hashed by identity
    inner, spelled = _twins(known)
    ids = inner.encode(text, add_special_tokens=False).ids
    return np.concatenate([spelled.get(i, np.array([i], np.int32)) for i in ids])


def _twinned(words: Tokenizer, content: str) -> str:
    """With a twin in place of each special token."""
    ids, offsets = encoded(words, content)
    special = special_tokens(words)
    for i, (low, high) in reversed(list(zip(ids.tolist(), offsets, strict=True))):
        if i in special:
            part = content[low:high]  # with blanks around it that some tokens take in
            left, right = part[: len(part) - len(part.lstrip())], part[len(part.rstrip()) :]
            content = content[:low] + left + _twin(i) + right + content[high:]
    return content


def _twin(i: int) -> str:
    return f"\U0010fff0{i}\U0010fff1"


@functools.lru_cache(maxsize=8)
def _twins(words: Any) -> tuple[Any, dict[int, np.ndarray]]:
    """A tokenizer that knows twins, and what each of them stands for, as text."""
    from tokenizers import AddedToken

    inner = type(words.inner).from_str(words.inner.to_str())
    inner.encode_special_tokens = False
    special = special_tokens(words)
    inner.add_special_tokens([AddedToken(_twin(i), normalized=False) for i in special])
    return inner, {inner.token_to_id(_twin(i)): words.encode(s) for i, s in special.items()}


def special_tokens(words: Tokenizer) -> dict[int, str]:
    """The special tokens that text may spell, by id."""
    if not isinstance(words, Subword):
        return {}
    added = words.inner.get_added_tokens_decoder()
    return {i: token.content for i, token in added.items() if token.special}


def ends_of_turn(words: Tokenizer, template: ChatTemplate | None) -> frozenset[int]:
    """The special token that the template puts after what the assistant says, if any."""
    if template is None or not isinstance(words, Subword):
        return frozenset()
    asks: list[Message] = [{"role": "user", "content": "a"}]
    before = template.text(asks, ask=True)
    after = template.text([*asks, {"role": "assistant", "content": "b"}])
    if not after.startswith(before):
        return frozenset()
    special = special_tokens(words)
    ids, _ = encoded(words, after[len(before) :])
    return frozenset([i for i in ids.tolist() if i in special][:1])
