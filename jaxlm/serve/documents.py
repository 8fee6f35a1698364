"""A folder of texts that answers are to come from: what in it is near to a question.

The vectors are those of a sentence encoder (Reimers & Gurevych 2019); what is near is put before
the question (Lewis et al. 2020, without training).
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.schema import UserError

SUFFIXES = (".md", ".txt")
LETTERS = 700  # of a passage: what MiniLM was taught to read, 128 words or so
MOST = 3  # passages that a question is answered from
NEAR = 0.28  # cosine: what is less near does not answer (benchmarks/retrieval.py)
NOTHING = "I found nothing about that in the documents."


@dataclass(frozen=True)
class Passage:
    """A part of a document, below one heading."""

    document: str  # its path in the folder
    heading: str  # with those above it
    text: str

    @property
    def whole(self) -> str:
        return f"{self.heading}\n{self.text}" if self.heading else self.text


@dataclass(frozen=True)
class Found:
    passage: Passage
    nearness: float  # cosine of the question's and the passage's vectors

    @property
    def row(self) -> dict[str, Any]:
        p = self.passage
        return {
            "document": p.document, "heading": p.heading, "text": p.text,
            "nearness": round(self.nearness, 3),
        }  # fmt: skip


class Documents:
    """The passages of all .md and .txt files below `folder`, and their vectors by `embed`, which
    makes float [n, d] of n texts. Raises UserError where there are none."""

    def __init__(self, folder: Path, embed: Callable[[Sequence[str]], np.ndarray]) -> None:
        if not folder.is_dir():
            raise UserError(f"documents: {folder} is no folder")
        files = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        self.passages = [
            passage
            for file in files
            for passage in passages(
                file.relative_to(folder).as_posix(), file.read_text("utf-8", errors="replace")
            )
        ]
        if not self.passages:
            raise UserError(f"documents: {folder} holds no text in files {' or '.join(SUFFIXES)}")
        self.embed = embed
        self._vectors_nd = _unit(embed([p.whole for p in self.passages]))

    def nearest(self, question: str, most: int = MOST, near: float = NEAR) -> list[Found]:
        """At most so many passages, the nearest first, and none that is less near than `near`."""
        [cosine_n] = _unit(self.embed([question])) @ self._vectors_nd.T
        best = np.argsort(-cosine_n, kind="stable")[:most]
        found = [Found(self.passages[i], float(cosine_n[i])) for i in best]
        return [one for one in found if one.nearness >= near]


def _unit(vectors_nd: np.ndarray) -> np.ndarray:
    norms_n1 = np.linalg.norm(vectors_nd, axis=1, keepdims=True)
    return vectors_nd / np.maximum(norms_n1, 1e-12)


def grounded(question: str, found: Sequence[Found]) -> str:
    """What a model is asked instead of the question."""
    told = "\n\n".join(f"[{one.passage.document}] {one.passage.whole}" for one in found)
    return f"{told}\n\nAnswer from the passages above, in a sentence or two: {question}"


def passages(document: str, text: str) -> Iterator[Passage]:
    """Parts of at most `LETTERS` letters, cut at headings, between paragraphs, or between lines."""
    for heading, paragraphs in _sections(text):
        part = ""
        for unit in (u for p in paragraphs for u in _units(p)):
            if part and len(part) + len(unit) + 2 > LETTERS:
                yield Passage(document, heading, part)
                part = ""
            part = f"{part}\n\n{unit}" if part else unit
        if part:
            yield Passage(document, heading, part)


def _units(paragraph: str) -> list[str]:
    if len(paragraph) <= LETTERS:
        return [paragraph]
    return [part for line in paragraph.splitlines() for part in textwrap.wrap(line, LETTERS)]


def _sections(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each heading, those above it before it, and the paragraphs below it; a # in a fenced block of
    code is none."""
    trail: list[str] = []
    paragraphs, fenced = [""], False
    for line in text.splitlines():
        fenced ^= line.lstrip().startswith(("```", "~~~"))
        match = None if fenced else re.match(r"(#{1,6}) (.*)", line)
        if match is not None:
            yield " – ".join(filter(None, trail)), _stripped(paragraphs)
            depth = len(match[1])
            trail = [*trail, *[""] * depth][: depth - 1]
            trail.append(match[2].strip())
            paragraphs = [""]
        elif line.strip() or fenced:
            paragraphs[-1] += line + "\n"
        else:
            paragraphs.append("")
    yield " – ".join(filter(None, trail)), _stripped(paragraphs)


def _stripped(paragraphs: Sequence[str]) -> list[str]:
    return [p.strip() for p in paragraphs if p.strip()]
