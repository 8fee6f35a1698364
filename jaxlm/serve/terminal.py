"""A conversation in a terminal, or through a pipe: one line is one turn."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from jaxlm.schema import UserError, hint
from jaxlm.serve.talk import Talk

COMMANDS = {
    "/system": "[TEXT]  the system prompt from now on; without TEXT none",
    "/regenerate": "the last answer anew",
    "/edit": "[TEXT]  the last message anew, as TEXT or as you edit it",
    "/undo": "takes the last message and its answer back",
    "/save": "FILE  the conversation as JSON",
    "/clear": "begins a new conversation; the system prompt stays",
    "/help": "this; a message that begins with / is written with //",
    "/quit": "leaves, as Ctrl-D; Ctrl-C stops an answer",
}
# A model's text must not steer the terminal (escape sequences); line ends and tabs may come.
_CONTROL = dict.fromkeys((*range(32), *range(127, 160)), "�")
del _CONTROL[ord("\n")], _CONTROL[ord("\t")]


class Terminal:
    """Reads stdin and writes answers to stdout, as they come or, with `rows`, as JSON; what else
    there is to say goes to stderr."""

    def __init__(self, talk: Talk, name: str, rows: bool = False) -> None:
        self.talk, self.name, self.rows = talk, name, rows
        self.live = sys.stdin.isatty() and sys.stdout.isatty()  # somebody types
        self._draft = ""  # on the next line, to be edited
        self._reading = self._stopped = False

    def run(self) -> None:
        """Until the end of the input or /quit. Raises UserError where nobody is there to read it:
        for a turn that cannot be answered."""
        if self.live:
            signal.signal(signal.SIGINT, self._interrupted)
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # bytes that are no text do not end it
        if self.talk.model.chat is None:
            self._tell(f"{self.name} has no chat template: it continues what you write")
        for line in self._typed() if self.live else map(_ended, sys.stdin):
            try:
                if line.strip() and not self._taken(line):
                    return
            except UserError as e:
                if not self.live:
                    raise
                self._tell(str(e))

    def _typed(self) -> Iterator[str]:
        with contextlib.suppress(ImportError):  # not everywhere; lines can be edited with it
            import readline

            readline.set_startup_hook(lambda: readline.insert_text(self._draft))
        while True:
            try:
                self._reading = True
                line = input("> ")
                while line.endswith("\\"):
                    self._draft = ""
                    line = line[:-1] + "\n" + input("… ")
            except KeyboardInterrupt:
                print()
                continue
            except EOFError:
                print()
                return
            finally:
                self._reading, self._draft = False, ""
            yield line

    def _interrupted(self, *_: Any) -> None:
        """Ctrl-C: drops a line, stops an answer between two of its steps."""
        if self._reading:
            raise KeyboardInterrupt
        self._stopped = True

    def _taken(self, line: str) -> bool:
        """Answers a line; whether more are wanted."""
        if not line.startswith("/"):
            self._answer(self.talk.ask(line))
        elif line.startswith("//"):
            self._answer(self.talk.ask(line[1:]))
        else:
            name, _, text = line.partition(" ")
            if name == "/quit":
                return False
            self._command(name, text.strip())
        return True

    def _command(self, name: str, text: str) -> None:
        talk = self.talk
        match name:
            case "/system":
                talk.instruct(text)
                self._tell(f"system prompt: {text or 'none'}")
            case "/regenerate":
                self._answer(talk.regenerate())
            case "/edit" if text:
                self._edit(text)
            case "/edit" if self.live and "readline" in sys.modules:
                self._draft = talk.undo().asked
            case "/edit":
                raise UserError("/edit: expected the message's new text")
            case "/undo":
                self._tell(f"taken back: {talk.undo().asked}")
            case "/save" if text:
                talk.save(Path(text).expanduser(), self.name)
                self._tell(f"saved: {text}")
            case "/save":
                raise UserError("/save: expected a file, as in /save talk.json")
            case "/clear":
                talk.turns.clear()
                self._tell("a new conversation")
            case "/help":
                self._tell("\n".join(f"{name:<12} {about}" for name, about in COMMANDS.items()))
            case _:
                raise UserError(f"no such command: {name!r}; {hint(name, COMMANDS)}")

    def _edit(self, text: str) -> None:
        """Where the new text cannot be answered, the old one stays."""
        before = self.talk.undo()
        try:
            self._answer(self.talk.ask(text))
        except UserError:
            self.talk.turns.append(before)
            raise

    def _answer(self, pieces: Generator[str]) -> None:
        self._stopped = False
        with contextlib.closing(pieces):
            for piece in pieces:
                if not self.rows:
                    print(piece.translate(_CONTROL) if self.live else piece, end="", flush=True)
                if self._stopped:
                    break
        turn = self.talk.turns[-1]
        if self.rows:
            row: dict[str, Any] = {
                "prompt": turn.asked, "text": turn.said, "finish_reason": turn.finish,
                "prompt_tokens": turn.prompt_tokens, "completion_tokens": turn.tokens,
            }  # fmt: skip
            if self.talk.documents is not None:
                row["sources"] = [found.row for found in turn.sources]
            print(json.dumps(row, ensure_ascii=False), flush=True)
            return
        print(flush=True)
        if turn.sources:
            names = dict.fromkeys(found.passage.document for found in turn.sources)
            self._tell(f"(from {', '.join(names)})")
        if self.live and turn.finish != "stop":
            self._tell(f"({turn.finish}: {turn.tokens} tokens)")

    def _tell(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def _ended(line: str) -> str:
    return line.rstrip("\r\n")
