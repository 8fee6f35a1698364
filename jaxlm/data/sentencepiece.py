"""A SentencePiece model, run by its own library (extra `sp`)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.extras import library
from jaxlm.data.spelling import PROBES, known, save_facts, spelled_bytes
from jaxlm.schema import UserError


class SentencePiece:
    """A SentencePiece model, run by its own library."""

    kind = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        self.model = model
        self.inner = library("sentencepiece", "sp").SentencePieceProcessor(model_proto=model)
        self.vocab_size = int(self.inner.get_piece_size())
        self.eos_id = int(self.inner.eos_id())
        if self.eos_id < 0:
            raise UserError("data.tokenizer: the SentencePiece model has no end of text")
        self.lossless = all(self.decode(self.encode(text)) == text for text in PROBES)
        self.fingerprint = hashlib.sha256(b"sentencepiece " + model).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.inner.encode(text), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self.inner.encode(list(texts))]

    @property
    def bos_id(self) -> int | None:
        return i if (i := int(self.inner.bos_id())) >= 0 else None

    def encode_with_special(self, text: str, most: int | None = None) -> np.ndarray:
        first = [] if self.bos_id is None else [self.bos_id]
        return np.array([*first, *self.inner.encode(text)][:most], np.int32)

    def decode(self, ids: Any) -> str:
        return self.inner.decode(known(ids, self.vocab_size).tolist())

    def token_bytes(self) -> np.ndarray:
        counts = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if not (self.inner.is_control(i) or self.inner.is_unknown(i)):
                counts[i] = spelled_bytes(self.inner.id_to_piece(i), "")
        return counts

    def save(self, directory: str | os.PathLike[str]) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "tokenizer.model").write_bytes(self.model)
        save_facts(directory, {"kind": self.kind, "fingerprint": self.fingerprint})
