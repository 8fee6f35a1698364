"""What all tokenizers share: how pieces spell bytes, what texts tend to lose, what is saved."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "jaxlm.tokenizer/1"

# What tokenizers lose: spaces, line ends, case, width, composition, unknown and control characters.
PROBES = (
    " a  b\t\n\r\n c ",
    "AaÀÉé e\u0301 ﬁ ½ ① Ｆｕｌｌ ｶﾞ",
    "▁ ## Ġ <0x41> <unk> [UNK] ``x'' don 't , .",
    "今日はいい天気ですね。𠮟る 한국어 ไทย العربية 👩‍👩‍👧",
    "\x01\x7f\x85\u200b\u2028\ufeff\U000e0001\uffff",
)


def known(ids: Any, vocab_size: int) -> np.ndarray:
    array = np.asarray(ids, np.int64).reshape(-1)
    return array[(array >= 0) & (array < vocab_size)]


def types(decoder: dict[str, Any] | None) -> set[str]:
    """Types of a decoder and of its parts."""
    if not decoder:
        return set()
    return {decoder["type"]}.union(*map(types, decoder.get("decoders", [])))


def spelled_bytes(token: str, continues: str) -> int:
    """Bytes behind a SentencePiece ('▁the', '<0x0A>') or WordPiece ('##ing') spelling."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return 1
    return len(token.removeprefix(continues).replace("▁", " ").encode())


def save_facts(directory: str | os.PathLike[str], stored: dict[str, Any]) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, **stored}, indent=2) + "\n"
    (Path(directory) / "jaxlm.json").write_text(text)
