"""Answers from a folder of documents: which passage is near, what the model is asked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data import chat
from jaxlm.generate.sampling import Sampling
from jaxlm.language_model import LanguageModel
from jaxlm.schema import UserError
from jaxlm.serve import documents
from jaxlm.serve.documents import LETTERS, NOTHING, Documents

FAQ = {
    "returns.md": "# Shop\n\n## Returns\n\nShoes may come back within 30 days.\n\n"
    "```\n# not a heading\n```\n\n## Postage\n\nParcels travel for two days.",
    "deep/hours.txt": "We open at nine on weekdays.",
    "left.out": "Shoes shoes shoes.",
}


def words(texts: Sequence[str]) -> np.ndarray:
    """A vector of a text's words: a stand-in for an encoder's."""
    vectors = np.zeros((len(texts), 512))
    for vector, text in zip(vectors, texts, strict=True):
        for word in re.findall(r"\w{4,}", text.lower()):
            vector[sum(map(ord, word)) % 512] += 1
    return vectors


@pytest.fixture
def held(tmp_path: Path) -> Documents:
    for name, text in FAQ.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return Documents(tmp_path, words)


def test_the_nearest_passage_is_found_with_its_place(held: Documents, tmp_path: Path) -> None:
    found = held.nearest("when may shoes come back?")
    assert found[0].passage.document == "returns.md"
    assert found[0].passage.heading == "Shop – Returns"
    assert "# not a heading" in found[0].passage.text and "Parcels" not in found[0].passage.text
    assert held.nearest("nine weekdays open")[0].passage.document == "deep/hours.txt"
    assert held.nearest("zebras") == [] and len(held.passages) == 3
    (tmp_path / "empty").mkdir()
    for folder, told in ((tmp_path / "empty", "holds no text"), (tmp_path / "no", "is no folder")):
        with pytest.raises(UserError, match=told):
            Documents(folder, words)


@given(st.text(alphabet="ab #`\n日", max_size=3000))
@settings(max_examples=60, deadline=None)
def test_passages_are_short_and_lose_nothing(text: str) -> None:
    found = list(documents.passages("a.md", text))
    assert all(0 < len(p.text) <= LETTERS for p in found)
    kept = "".join(p.text for p in found) + "".join(p.heading for p in found)
    for letter in "ab日":  # headings without a text below them are left out
        lines = [x for x in text.splitlines() if not re.match("#{1,6} ", x)]
        assert kept.count(letter) >= "".join(lines).count(letter)


pytest.importorskip("jinja2")
openai = pytest.importorskip("openai")
for module in ("uvicorn", "starlette", "prometheus_client"):
    pytest.importorskip(module)

import serving  # noqa: E402

from jaxlm.serve.engine import Engine  # noqa: E402
from jaxlm.serve.service import served  # noqa: E402
from jaxlm.serve.talk import Talk, Turn  # noqa: E402


@pytest.fixture(scope="module")
def model() -> Iterator[LanguageModel]:
    with small.compiled_quickly():
        yield serving.model()


def test_a_conversation_is_answered_from_what_is_near(
    model: LanguageModel, held: Documents
) -> None:
    asked = "when may shoes come back?"
    found = held.nearest(asked)
    put = documents.grounded(asked, found)
    assert FAQ["returns.md"].split("\n\n")[2] in put and put.endswith(asked)
    how: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "temperature": 0}
    user = {"role": "user", "content": asked}
    plain = served(Engine(model, 2, 600, 4))
    shop = served(plain.engine, held)
    with (
        serving.serving({"tiny": shop, "plain": plain}) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", timeout=60) as client,
    ):
        ask = client.chat.completions.create
        told = ask(messages=[user], **how)
        want = ask(messages=[{**user, "content": put}], **{**how, "model": "plain"})
        assert told.choices[0].message.content == want.choices[0].message.content
        assert told.sources == [one.row for one in found] and not hasattr(want, "sources")
        assert told.usage.prompt_tokens == want.usage.prompt_tokens
        [first, *_] = ask(messages=[user], stream=True, **how)
        assert first.sources == told.sources
        none = ask(messages=[{**user, "content": "zebras"}], n=2, **how)
        assert [c.message.content for c in none.choices] == [NOTHING] * 2 and none.sources == []
        assert {c.finish_reason for c in none.choices} == {"stop"} and not none.usage.total_tokens
        stream = ask(messages=[{**user, "content": "zebras"}], stream=True, **how)
        assert "".join(c.choices[0].delta.content or "" for c in stream) == NOTHING
    talk = Talk(model, 600, 5, Sampling(0.0), documents=held)
    assert "".join(talk.ask("zebras")) == NOTHING and talk.turns[0].sources == []
    talk.turns = [Turn(asked, "so", sources=found), Turn("and boots?", sources=[])]
    alike = [user, {"role": "assistant", "content": "so"}, {**user, "content": "and boots?"}]
    assert talk.messages()[:-1] == alike  # what follows sees the question alone
    talk.undo()
    want = chat.asked(model.tokenizer, model.chat, [{**user, "content": put}])
    assert talk._prompt().tolist() == want.tolist()
