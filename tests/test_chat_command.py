"""`jaxlm chat` in a terminal of its own and through a pipe: it says what `jaxlm generate` says."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small

from jaxlm import loading
from jaxlm.data import chat
from jaxlm.generate.sampling import Sampling
from jaxlm.language_model import LanguageModel
from jaxlm.schema import UserError

for module in ("uvicorn", "starlette", "prometheus_client", "jinja2"):
    pytest.importorskip(module)

import serving  # noqa: E402

from jaxlm.serve import terminal  # noqa: E402
from jaxlm.serve.talk import Talk, Turn  # noqa: E402

LONG = 2000  # tokens: longer than an answer is waited for
FEW = 12
CONTEXT = "--context=2100"  # the same, so that the second process finds what the first compiled
ENVIRONMENT = {**os.environ, "TERM": "dumb", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
# The terminal of a session of its own, so that Ctrl-C reaches who runs in it.
_OWNED = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def model() -> Iterator[LanguageModel]:
    """One that never says a special token, so that no answer ends by itself."""
    with small.compiled_quickly():
        made = serving.model()
        special = np.array(list(chat.special_tokens(made.tokenizer)))
        w_vd = made.params["unembedding"].at[special].set(0.0)  # others' logits are above 0
        yield dataclasses.replace(made, params={**made.params, "unembedding": w_vd})


@pytest.fixture(scope="module")
def folder(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a folder of others, its chat template in it."""
    out = tmp_path_factory.mktemp("model") / "tiny"
    loading.export(model, out)
    return out


def greedy(model: LanguageModel, messages: list[dict[str, str]]) -> str:
    """`FEW` tokens by the loop that `jaxlm generate` runs."""
    model.tokenizer.inner.encode_special_tokens = False
    try:
        text = model.chat.text(messages, ask=True)
        how: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": FEW}
        return model.generate(text, return_full_text=False, **how)[0][0]
    finally:
        model.tokenizer.inner.encode_special_tokens = True


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


class Terminal:
    """What a person sees and types."""

    def __init__(self, *arguments: str) -> None:
        self.end, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _OWNED, "-m", "jaxlm", "chat", *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=ENVIRONMENT,
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def read(self, until: str, seconds: float = 30) -> str:
        """What comes, up to the first match of a pattern."""
        stop = time.monotonic() + seconds
        while (match := re.search(until, self.seen)) is None:
            left = stop - time.monotonic()
            assert select.select([self.end], [], [], max(0, left))[0], (until, self.seen[-2000:])
            self.seen += os.read(self.end, 65536).decode(errors="replace").replace("\r\n", "\n")
        found, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return found

    def interrupt(self, until: str) -> None:
        """Ctrl-C at a prompt; Python takes no notice of one that comes just before it waits, until
        the next key."""
        while not self.seen:
            self.type("\x03")
            if select.select([self.end], [], [], 1)[0]:
                break
        self.read(until)

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())


def test_a_terminal_streams_stops_edits_and_saves(
    model: LanguageModel, folder: Path, tmp_path: Path
) -> None:
    limits = ["--temperature=0", f"--max_new_tokens={LONG}", CONTEXT]
    at = Terminal(f"--model=tiny={folder}", *limits)
    saved = tmp_path / "talk.json"

    def stopped(begins: str) -> None:
        """Stops an answer that has begun so: it is one, and no more of it comes."""
        at.read(re.escape(begins))
        at.type("\x03")
        told = at.read(r"\(stopped: \d+ tokens\)\n> ")
        assert int(re.search(r"\d+", told.rpartition("(")[2])[0]) < LONG

    at.read("> ")
    at.type("hello\n")
    stopped("hello\n" + greedy(model, [user("hello")]))
    at.type("/undo\n")
    at.read("taken back: hello\n> ")
    at.type("dropped")
    at.read("dropped")
    at.interrupt(r"\n> ")
    at.type("abc\n")
    stopped("abc\n" + greedy(model, [user("abc")]))
    at.type("/system Be brief.\n")
    at.read(r"system prompt: Be brief.\n> ")
    at.type("/edit\n")
    at.read("> abc")
    at.type("xyz\n")
    begins = greedy(model, [{"role": "system", "content": "Be brief."}, user("abcxyz")])
    stopped("xyz\n" + begins)
    at.type("/nothing\n")
    at.read("no such command: '/nothing'.*\n> ")
    at.type(f"/save {saved}\n")
    at.read("saved: .*\n> ")
    kept = json.loads(saved.read_text())
    assert kept["format"] == "jaxlm.conversation/1" and kept["model"] == "tiny"
    system, asked, said = kept["messages"]
    assert (system["content"], asked["content"]) == ("Be brief.", "abcxyz")
    assert said["role"] == "assistant" and said["content"].startswith(begins)
    at.type("/clear\n")
    at.read("a new conversation\n> ")
    at.type("\x04")
    assert at.process.wait(timeout=30) == 0
    os.close(at.end)


def test_a_pipe_gives_an_answer_a_line(model: LanguageModel, folder: Path) -> None:
    limits = ["--temperature=0", f"--max_new_tokens={FEW}", CONTEXT, "--json"]
    lines = "hello\n\n/regenerate\n//hi\n/edit abc\n/nothing\n"
    done = subprocess.run(
        [sys.executable, "-m", "jaxlm", "chat", f"--model={folder}", *limits],
        input=lines, capture_output=True, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 2 and "no such command: '/nothing'" in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    first = greedy(model, [user("hello")])
    so_far = [user("hello"), {"role": "assistant", "content": first}]
    then = [greedy(model, [*so_far, user(text)]) for text in ("/hi", "abc")]
    assert [row["text"] for row in rows] == [first, first, *then]
    assert [row["prompt"] for row in rows] == ["hello", "hello", "/hi", "abc"]
    assert {(row["finish_reason"], row["completion_tokens"]) for row in rows} == {("length", FEW)}


def talk(model: LanguageModel, **how: Any) -> Talk:
    stops = how.pop("stops", ())
    return Talk(model, 200, FEW, Sampling(**{"temperature": 0.0, **how}), stops)


def test_a_model_without_a_template_goes_on_with_the_text(model: LanguageModel) -> None:
    plain = talk(dataclasses.replace(model, chat=None, tokenizer=serving.words()))
    plain.turns = [Turn("abc", "def"), Turn("xyz")]
    assert serving.words().decode(plain._prompt()) == "abcdef\nxyz"
    with pytest.raises(UserError, match="no chat template"):
        plain.instruct("Be brief.")
    plain.ask("never read")  # says nothing, is nothing
    with pytest.raises(UserError, match="the context 200"):
        list(plain.ask("a" * 200))
    assert [turn.asked for turn in plain.turns] == ["abc", "xyz"]


def test_answers_are_drawn_anew_and_end_before_stop_strings(model: LanguageModel) -> None:
    drawn = talk(model, temperature=1.0, seed=3)
    first = "".join(drawn.ask("abc"))
    others = ["".join(drawn.regenerate()) for _ in range(3)]
    again = talk(model, temperature=1.0, seed=3)
    assert ["".join(again.ask("abc")), "".join(again.regenerate())] == [first, others[0]]
    assert len({first, *others}) == 4 and len(drawn.turns) == 1
    whole = "".join(talk(model).ask("abc"))
    halted = talk(model, stops=[whole[3:5]])
    assert "".join(halted.ask("abc")) == whole[: whole.index(whole[3:5])]
    assert halted.turns[0].finish == "stop" and halted.slots.free == 1
    halted.undo()
    with pytest.raises(UserError, match="nothing has been said"):
        halted.undo()


def test_what_others_wrote_is_not_overwritten(model: LanguageModel, tmp_path: Path) -> None:
    kept = talk(model)
    list(kept.ask("abc"))
    for _ in range(2):
        kept.save(tmp_path / "talk.json", "tiny")
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(UserError, match=r"mine\.json: expected format"):
        kept.save(tmp_path / "mine.json", "tiny")
    assert (tmp_path / "mine.json").read_text() == "{}"


def test_an_edit_that_cannot_be_answered_leaves_the_old_message(model: LanguageModel) -> None:
    kept = talk(model)
    kept.turns = [Turn("abc", "def")]
    with pytest.raises(UserError, match="the context 200"):
        terminal.Terminal(kept, "tiny")._command("/edit", "a" * 400)
    assert kept.turns == [Turn("abc", "def")]
