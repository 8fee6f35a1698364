"""Which tokens begin a word, for masking whole words."""

from __future__ import annotations

import json

import numpy as np

from jaxlm.data.sentencepiece import SentencePiece
from jaxlm.data.spelling import types
from jaxlm.data.tokenizer import Subword, Tokenizer

_CJK = 0x2E80  # from here on scripts are written without spaces between words

# Of a byte: letters, digits and a character's later bytes go on with a word.
_BYTE_STARTS = [not ((i < 128 and chr(i).isalnum()) or 128 <= i < 192) for i in range(256)]

# GPT-2 spells the bytes that are no printable sign as the characters from 256 on.
_SPELLED = [*range(33), *range(127, 161), 173]


def word_starts(tokenizer: Tokenizer) -> np.ndarray:
    """int32 [vocab_size]: 1 for each id that begins a word, 0 for one that goes on with it.

    A token goes on if it begins with a letter or digit: a space belongs to the word after it, a
    sign and a character of a script without spaces stand alone. A WordPiece goes on with ##.
    """
    if isinstance(tokenizer, SentencePiece):
        pieces = [tokenizer.inner.id_to_piece(i) for i in range(tokenizer.vocab_size)]
        return np.array([_starts(piece) for piece in pieces], np.int32)
    if not isinstance(tokenizer, Subword):
        return np.array(_BYTE_STARTS, np.int32)
    spec = json.loads(tokenizer.inner.to_str())
    word_piece = spec["model"]["type"] == "WordPiece"
    byte_level = "ByteLevel" in types(spec["decoder"])
    starts = np.ones(tokenizer.vocab_size, np.int32)
    for token, i in tokenizer.inner.get_vocab(with_added_tokens=False).items():
        if word_piece:
            starts[i] = not token.startswith("##")
        elif byte_level:
            first = ord(token[0])
            starts[i] = _BYTE_STARTS[first if first < 256 else _SPELLED[first - 256]]
        else:
            starts[i] = _starts(token)
    return starts


def _starts(piece: str) -> bool:
    return not (piece[0].isalnum() and ord(piece[0]) < _CJK)
