"""Text to token ids and back: plain bytes, what is trained here, or anybody's tokenizer files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxlm.data import japanese
from jaxlm.data.sentencepiece import SentencePiece
from jaxlm.data.spelling import FORMAT, PROBES, known, save_facts, spelled_bytes, types
from jaxlm.data.vocabularies import EOS, TRAINERS
from jaxlm.schema import JaxlmError, UserError, hint

SEGMENTED = "+sudachi"  # words of Japanese first
TRAINED = (*TRAINERS, *(name + SEGMENTED for name in ("bpe", "unigram")))

# Ends of text by convention, for a tokenizer.json that says nothing about its own.
_EOS_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
    """What the rest of the package knows of a tokenizer."""

    @property
    def kind(self) -> str:
        """'bytes', 'subword', 'segmented' or 'sentencepiece'."""

    @property
    def vocab_size(self) -> int:
        """Every id is below it."""

    @property
    def eos_id(self) -> int:
        """The id appended after each document. No text encodes to it, except NUL in 'bytes'."""

    @property
    def lossless(self) -> bool:
        """Whether every text comes back exactly."""

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) that two tokenizers share when they treat every text alike."""

    def encode(self, text: str) -> np.ndarray:
        """int32 [tokens], without any special token, whatever the text contains."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in parallel where the library can."""

    @property
    def bos_id(self) -> int | None:
        """The id that its template puts before a text, if any."""

    def encode_with_special(self, text: str, most: int | None = None) -> np.ndarray:
        """As `encode`, in the special tokens that its template puts around a text (BOS; [CLS] and
        [SEP]); the text is cut so that there are `most` tokens."""

    def decode(self, ids: Any) -> str:
        """Text of ids [tokens]. Bytes that are not whole UTF-8 become U+FFFD; ids outside the
        vocabulary (which a padded model can produce) say nothing and are left out."""

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes of text that each id stands for; 0 for special ids."""

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write what `load` reads, into an existing or new folder."""


def load(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `save` wrote. Raises JaxlmError if it is missing or was altered."""
    folder = Path(directory)
    try:
        stored = json.loads((folder / "jaxlm.json").read_text())
        if stored["format"] != FORMAT:
            raise JaxlmError(f"{folder}/jaxlm.json: expected {FORMAT}, got {stored['format']!r}")
        tokenizer: Tokenizer = Bytes()
        if stored["kind"] in ("subword", "segmented"):
            text = (folder / "tokenizer.json").read_text("utf-8")
            kind = Segmented if stored["kind"] == "segmented" else Subword
            tokenizer = kind(_parse(text, str(folder / "tokenizer.json")), stored["eos"])
        elif stored["kind"] == "sentencepiece":
            tokenizer = SentencePiece((folder / "tokenizer.model").read_bytes())
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise JaxlmError(f"{folder}: no readable tokenizer: {type(e).__name__}: {e}") from e
    if tokenizer.fingerprint != stored["fingerprint"]:
        raise JaxlmError(f"{folder}: the tokenizer was altered since it was saved")
    return tokenizer


def create(name: str, vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names, with at most `vocab_size` ids.

    `texts` are read only where there is something to train. Raises UserError.
    """
    trained, segmented = name.removesuffix(SEGMENTED), name.endswith(SEGMENTED)
    if name == "bytes":
        tokenizer: Tokenizer = Bytes()
    elif trained in TRAINERS:
        kind, words = Subword, texts
        if segmented:  # each word is a text of its own
            cut = japanese.segmenter()
            kind, words = Segmented, (word for text in texts for word in cut(text))
        tokenizer = kind(*TRAINERS[trained](words, vocab_size))
    elif name.endswith((".json", ".model", ".txt")) or os.path.isdir(name):
        tokenizer = from_file(name)
    else:
        raise UserError(
            f"data.tokenizer: expected one of {', '.join(('bytes', *TRAINED))}, or a path to a "
            f"tokenizer, got {name!r}; {hint(name, ('bytes', *TRAINED))}"
        )
    check_vocab(tokenizer, name, vocab_size)
    return tokenizer


def check_vocab(tokenizer: Tokenizer, name: str, vocab_size: int) -> None:
    """Raises UserError if the model has fewer rows than the tokenizer has ids."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size: tokenizer {name!r} has {tokenizer.vocab_size:,} ids, more than the"
            f" {vocab_size:,} that the model and its objective leave to text; raise it by at least"
            f" {tokenizer.vocab_size - vocab_size:,}"
        )


# ------------------------------------------------------------------------------------------- bytes


class Bytes:
    """UTF-8 bytes as ids. Id 0 (NUL, which text hardly ever contains) also ends a document."""

    kind = "bytes"
    vocab_size = 256
    eos_id = 0
    lossless = True
    bos_id = None
    fingerprint = hashlib.sha256(b"jaxlm.tokenizer/1 bytes eos=0").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_with_special(self, text: str, most: int | None = None) -> np.ndarray:
        return self.encode(text)[:most]

    def decode(self, ids: Any) -> str:
        return known(ids, 256).astype(np.uint8).tobytes().decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        counts = np.ones(256, np.int32)
        counts[self.eos_id] = 0
        return counts

    def save(self, directory: str | os.PathLike[str]) -> None:
        save_facts(directory, {"kind": self.kind, "fingerprint": self.fingerprint})


# ----------------------------------------------------------------------------------------- subword


class Subword:
    """A Hugging Face tokenizer. Text that spells a special token stays text."""

    kind = "subword"

    def __init__(self, inner: Any, eos: str) -> None:
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # read: encode them as ordinary text
        eos_id = inner.token_to_id(eos)
        if eos_id is None:
            raise UserError(f"data.tokenizer: its end of text {eos!r} is not in its vocabulary")
        self.inner, self.eos, self.eos_id = inner, eos, int(eos_id)
        self.vocab_size = 1 + max(inner.get_vocab(with_added_tokens=True).values())
        self.lossless = all(self.decode(self.encode(text)) == text for text in PROBES)
        self.fingerprint = hashlib.sha256(f"{inner.to_str()}\n{eos}".encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.inner.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encoded]

    @property
    def bos_id(self) -> int | None:
        around = self.encode_with_special("")
        return int(around[0]) if len(around) and around[0] != self.eos_id else None

    def encode_with_special(self, text: str, most: int | None = None) -> np.ndarray:
        encoded = self.inner.encode(text, add_special_tokens=False)
        if most is not None:
            encoded.truncate(max(0, most - self.inner.num_special_tokens_to_add(False)))
        return np.array(self.inner.post_process(encoded).ids, np.int32)

    def decode(self, ids: Any) -> str:
        found = known(ids, self.vocab_size).tolist()
        return self.inner.decode(found, skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        spec = json.loads(self.inner.to_str())
        byte_level = "ByteLevel" in types(spec["decoder"])
        continues = "##" if spec["model"]["type"] == "WordPiece" else ""
        counts = np.zeros(self.vocab_size, np.int32)
        for token, i in self.inner.get_vocab(with_added_tokens=False).items():
            counts[i] = len(token) if byte_level else spelled_bytes(token, continues)
        for added in spec["added_tokens"]:
            counts[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        counts[self.eos_id] = 0
        return counts

    def save(self, directory: str | os.PathLike[str]) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "tokenizer.json").write_text(self.inner.to_str(), "utf-8")
        stored = {"kind": self.kind, "eos": self.eos, "fingerprint": self.fingerprint}
        save_facts(directory, stored)


class Segmented(Subword):
    """A subword tokenizer that never joins two words of a Japanese text, as Sudachi tells them."""

    kind = "segmented"

    def __init__(self, inner: Any, eos: str) -> None:
        self.words = japanese.segmenter()
        super().__init__(inner, eos)
        of = f"{self.fingerprint} {japanese.version()}"
        self.fingerprint = hashlib.sha256(of.encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        words = [self.words(text) for text in texts]
        how = {"is_pretokenized": True, "add_special_tokens": False}
        return [np.array(e.ids, np.int32) for e in self.inner.encode_batch_fast(words, **how)]


# ------------------------------------------------------------------------------------ from files


PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
"""GPT-2's two files, under either pair of names."""


def from_file(path: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer.json, a SentencePiece .model, GPT-2's vocabulary and merges, BERT's vocab.txt, or
    a folder that holds one of them, or that `save` wrote.

    Its end of text is read from a tokenizer_config.json beside it, or is the first conventional
    name that it knows. Raises UserError.
    """
    file = Path(path)
    if (file / "jaxlm.json").is_file():
        return load(file)
    try:
        if file.is_dir():
            names = ("tokenizer.json", "tokenizer.model", *(v for v, _ in PAIRS), "vocab.txt")
            found = next((n for n in names if (file / n).is_file()), None)
            if found is None:
                raise UserError(f"data.tokenizer: {file} holds none of {', '.join(names)}")
            file = file / found
        if file.suffix == ".model":
            return SentencePiece(file.read_bytes())
        inner = _inner(file)
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"data.tokenizer: cannot read {file}: {e}") from e
    eos = _stated(file.with_name("tokenizer_config.json"), "eos_token") or ""
    eos = eos.get("content", "") if isinstance(eos, dict) else str(eos)
    if not eos:
        i = _stated(file.with_name("config.json"), "eos_token_id")
        eos = (inner.id_to_token(i) if type(i) is int and i >= 0 else None) or ""
    names = (eos,) if eos else _EOS_NAMES
    end = next((n for n in names if inner.token_to_id(n) is not None), None)
    if end is None:
        raise UserError(f"data.tokenizer: {file} has no end of text (none of {', '.join(names)})")
    return Subword(inner, end)


def _inner(file: Path) -> Any:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    merges = dict(PAIRS).get(file.name)
    if merges and file.with_name(merges).is_file():
        inner = Inner(models.BPE.from_file(str(file), str(file.with_name(merges))))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens([EOS] if inner.token_to_id(EOS) is not None else [])
        return inner
    if file.name == "vocab.txt":
        inner = Inner(models.WordPiece.from_file(str(file), unk_token="[UNK]"))
        cased = any(c.isupper() for t in inner.get_vocab() for c in t if not t.startswith("["))
        inner.normalizer = normalizers.BertNormalizer(lowercase=not cased)
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece()
        inner.add_special_tokens([t for t in ("[CLS]", "[SEP]", "[UNK]") if inner.token_to_id(t)])
        return inner
    return _parse(file.read_text("utf-8"), str(file))


def _stated(config: Path, key: str) -> Any:
    """What a JSON file says of `key`; None where there is no such file."""
    if not config.is_file():
        return None
    try:
        return json.loads(config.read_text("utf-8")).get(key)
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"data.tokenizer: cannot read {config}: {e}") from e


def _parse(text: str, where: str) -> Any:
    from tokenizers import Tokenizer as Inner

    try:
        return Inner.from_str(text)
    except Exception as e:  # the library raises bare Exception
        raise UserError(f"data.tokenizer: {where} is not a tokenizer.json: {e}") from e


def byte_letters() -> dict[str, int]:
    """GPT-2's letter of each byte: printable Latin-1 as itself, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
