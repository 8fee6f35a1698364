"""A look at what shards hold, and at what tokenizers make of texts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data import shards, tokenizer
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.schema import UserError

SENTENCE = "今日はいい天気ですね。"


def documents(
    out: str | os.PathLike[str], split: str, first: int, count: int
) -> Iterator[dict[str, Any]]:
    """`count` documents of a split from number `first` on: text, tokens and where it is from.

    Raises UserError where there are none.
    """
    folder = Path(out)
    manifest = shards.read_manifest(folder)
    words, left = tokenizer.load(folder / "tokenizer"), count
    at = first
    for piece in getattr(manifest, split).shards:
        if at >= piece.documents:
            at -= piece.documents
            continue
        tokens, offsets, about = (
            shards.open_array(folder, manifest, piece, kind)
            for kind in ("tokens", "offsets", "documents")
        )
        for i in range(at, min(piece.documents, at + left)):
            ids = np.array(tokens[offsets[i] : offsets[i + 1] - 1])
            origin = manifest.origins[int(about[i]["origin"])]
            yield {
                "sha256": about[i]["sha256"].tobytes().hex(),
                "source": origin.source,
                "language": origin.language,
                "text_licence": origin.text_licence,
                "package_licence": origin.package_licence,
                "attribution": origin.attribution,
                "tokens": len(ids),
                "text": words.decode(ids),
            }
            left -= 1
        at = 0
    if left == count:
        raise UserError(f"--first: {split} has fewer than {first + 1:,} documents")


def lengths(out: Path, split: str = "train") -> np.ndarray:
    """Tokens of each document, its end included: int64 [documents]."""
    manifest = shards.read_manifest(out)
    pieces = getattr(manifest, split).shards
    arrays = [np.diff(shards.open_array(out, manifest, p, "offsets")) for p in pieces]
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)


def compare(made: dict[str, Tokenizer], texts: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """What each tokenizer makes of the texts of each language.

    Rows: tokenizer, language, ids, bytes_per_token, tokens_per_character, unknown (share of
    tokens), exact (share of texts that come back), pieces (of `SENTENCE`).
    """
    rows = []
    for name, words in made.items():
        unknown = _unknown(words)
        pieces = [words.decode([i]) for i in words.encode(SENTENCE)]
        for language, some in texts.items():
            encoded = words.encode_batch(some)
            n = max(1, sum(map(len, encoded)))
            exact = [words.decode(ids) == text for ids, text in zip(encoded, some, strict=True)]
            rows.append(
                {
                    "tokenizer": name,
                    "language": language,
                    "ids": words.vocab_size,
                    "bytes_per_token": sum(len(t.encode()) for t in some) / n,
                    "tokens_per_character": n / max(1, sum(map(len, some))),
                    "unknown": sum(int((ids == unknown).sum()) for ids in encoded) / n,
                    "exact": sum(exact) / max(1, len(exact)),
                    "pieces": pieces,
                }
            )
    return rows


def _unknown(words: Tokenizer) -> int:
    """The id that stands for what a tokenizer does not know; -1 where it knows all."""
    inner = getattr(words, "inner", None)
    if words.lossless or inner is None:
        return -1
    if hasattr(inner, "unk_id"):  # SentencePiece
        return int(inner.unk_id())
    named = getattr(inner.model, "unk_token", None)
    found = inner.token_to_id(named) if named else None
    return -1 if found is None else int(found)
