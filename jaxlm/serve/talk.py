"""One conversation with one model, in this process."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from jaxlm.data import chat
from jaxlm.data.chat import Message
from jaxlm.files import read_json, write_json
from jaxlm.generate.sampling import Sampling
from jaxlm.generate.slots import Request, Slots, Token
from jaxlm.language_model import LanguageModel
from jaxlm.schema import JaxlmError, UserError
from jaxlm.serve.documents import NOTHING, Documents, Found, grounded
from jaxlm.serve.writer import Writer


@dataclass
class Turn:
    """What was asked, and what came of it."""

    asked: str
    said: str = ""
    finish: str = "stopped"  # "stop", "length"; or "stopped" by whoever read it
    prompt_tokens: int = 0
    tokens: int = 0
    again: int = 0  # answers drawn before this one
    sources: list[Found] = field(default_factory=list)  # passages that it is answered from


class Talk:
    """Turns with a model that has a chat template; of one without, a text that goes on: what is
    asked is put at its end, on a line of its own. With `documents` each answer comes from their
    passages that are nearest to what is asked, and where none is near enough it says so.

    Tokens that both an earlier prompt and the next one begin with are read once (`Slots`).
    """

    def __init__(
        self,
        model: LanguageModel,
        context: int,
        max_new_tokens: int,
        sampling: Sampling,
        stops: Sequence[str] = (),
        system: str = "",
        documents: Documents | None = None,
    ) -> None:
        if documents is not None and model.chat is None:
            raise UserError("documents: expected a model with a chat template")
        self.documents = documents
        self.model, self.most, self.sampling, self.stops = model, max_new_tokens, sampling, stops
        with jax.set_mesh(model.mesh):
            self.slots = Slots(model.config, model.params, 1, context)
        words = model.tokenizer
        self.ends = frozenset({words.eos_id}) | chat.ends_of_turn(words, model.chat)
        self.turns: list[Turn] = []
        self.system = ""
        self.instruct(system)

    def instruct(self, system: str) -> None:
        """From the next answer on. Raises UserError where the model has no chat template."""
        if system and self.model.chat is None:
            raise UserError("system: this model has no chat template; it continues what you write")
        self.system = system

    def ask(self, text: str) -> Generator[str]:
        """Pieces of the answer as they come, "" where a step said none; who stops reading stops it.
        Raises UserError for what cannot be answered, and forgets it."""
        self.turns.append(Turn(text))
        try:
            yield from self._answer()
        except UserError:
            self.turns.pop()
            raise

    def regenerate(self) -> Generator[str]:
        """As `ask`, the last turn's answer anew: another draw. Raises UserError where none is."""
        turn = self._last()
        turn.again += 1
        yield from self._answer()

    def undo(self) -> Turn:
        """Takes the last turn back. Raises UserError where none is."""
        self._last()
        return self.turns.pop()

    def messages(self) -> list[Message]:
        found = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            found.append({"role": "user", "content": turn.asked})
            found.append({"role": "assistant", "content": turn.said})
        return found

    def save(self, path: Path, model: str) -> None:
        """Raises UserError for a file that is none of these, which stays."""
        if path.exists():
            read_json(path, "conversation")
        kept = {"format": "jaxlm.conversation/1", "model": model, "messages": self.messages()}
        write_json(path, kept)

    def _last(self) -> Turn:
        if not self.turns:
            raise UserError("nothing has been said yet")
        return self.turns[-1]

    def _prompt(self) -> np.ndarray:
        if self.model.chat is None:
            texts = [t.asked + t.said for t in self.turns[:-1]] + [self.turns[-1].asked]
            return self.model.read(["\n".join(texts)], None)[0]
        *before, last = self.messages()[:-1]
        if self.turns[-1].sources:
            last = {**last, "content": grounded(last["content"], self.turns[-1].sources)}
        return chat.asked(self.model.tokenizer, self.model.chat, [*before, last])

    def _answer(self) -> Generator[str]:
        turn = self.turns[-1]
        if self.documents is not None:
            turn.sources = self.documents.nearest(turn.asked)
            if not turn.sources:
                turn.said, turn.finish, turn.prompt_tokens, turn.tokens = NOTHING, "stop", 0, 0
                yield NOTHING
                return
        prompt = self._prompt()
        room = self.slots.context - len(prompt) + 1
        if room < 1:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, the context {self.slots.context}"
            )
        most = min(self.most, room)
        row = self.slots.join(Request(prompt, most, self.sampling, self.ends, turn.again))
        turn.said, turn.finish, turn.prompt_tokens, turn.tokens = "", "stopped", len(prompt), 0
        writer = Writer(self.model.tokenizer, prompt, self.stops)
        try:
            while turn.finish == "stopped":
                piece = "".join(self._heard(turn, writer, token) for token in self.slots.step())
                turn.said += piece
                yield piece
        finally:
            self.slots.leave(row)

    def _heard(self, turn: Turn, writer: Writer, token: Token) -> str:
        if token.finish == "error":
            raise JaxlmError("the model could not answer: its logits are no numbers")
        turn.tokens += 1
        text = "" if token.id in self.ends else writer.add(token.id)
        if writer.stopped:
            turn.finish = "stop"
        elif token.finish is not None:
            turn.finish = token.finish
            text += writer.rest()
            turn.finish = "stop" if writer.stopped else turn.finish
        return text
