"""Vocabularies trained here: byte-level BPE, Unigram and characters with byte fallback, WordPiece.

All become a Hugging Face tokenizer, so that what is trained here is saved, loaded and run alike.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from jaxlm.data.extras import library
from jaxlm.schema import UserError

EOS = "<|endoftext|>"
_BYTES = [f"<0x{i:02X}>" for i in range(256)]
_FROM_BYTES = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}


def _need(name: str, vocab_size: int, least: int, what: str) -> None:
    if vocab_size < least:
        raise UserError(
            f"model.vocab_size: tokenizer {name!r} needs at least {least} ids ({what}), "
            f"got {vocab_size}; set data.tokenizer='bytes' for a smaller vocabulary"
        )


def bpe(texts: Iterable[str], vocab_size: int) -> tuple[Any, str]:
    """Byte-level BPE (GPT-2's pre-tokenization; Radford et al. 2019, §2.2) of `vocab_size` ids.

    Id 0 ends a text. Fewer ids result where the texts hold fewer repeated pairs.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    _need("bpe", vocab_size, 257, "bytes and end of text")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return inner, EOS


def unigram(texts: Iterable[str], vocab_size: int) -> tuple[Any, str]:
    """Unigram language model (Kudo 2018) with byte fallback, trained by SentencePiece.

    Only its pieces are taken: spaces stay spaces, and a '<' stands alone, so that no text can spell
    a byte's or the end's piece. So every text comes back exactly.
    """
    from tokenizers import Tokenizer

    _need("unigram", vocab_size, 400, "bytes, end of text, ASCII")
    trainer, model = library("sentencepiece", "sp").SentencePieceTrainer, io.BytesIO()
    lines = (line[:8192] for t in texts for line in t.replace("▁", "").splitlines() if line)
    trainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size - 256 + 2,  # its own unk, bos, eos; one end
        hard_vocab_limit=False,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        max_sentence_length=1 << 16,
        num_threads=1,  # so that training is the same in every process
        minloglevel=2,
    )
    pieces = library("sentencepiece", "sp").SentencePieceProcessor(model_proto=model.getvalue())
    scores = {
        pieces.id_to_piece(i).replace("▁", " "): pieces.get_score(i)
        for i in range(pieces.get_piece_size())
        if not (pieces.is_control(i) or pieces.is_unknown(i))
    }
    low = min(scores.values())
    for c in ("\n", "\t", *map(chr, range(32, 127))):
        scores.setdefault(c, low)
    room = vocab_size - 257 - len(scores)
    for piece in sorted((p for p in scores if len(p) > 1), key=lambda p: scores[p])[
        : max(0, -room)
    ]:
        del scores[piece]
    vocab = [[EOS, 0.0], *scores.items(), *([b, low - 20.0] for b in _BYTES)]
    spec = _spec({"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": True})
    spec["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [_split("<"), _split(r" ?[^\s]+|\s+")],
    }
    return Tokenizer.from_str(json.dumps(spec)), EOS


def chars(texts: Iterable[str], vocab_size: int) -> tuple[Any, str]:
    """The most frequent characters; the others are spelled in UTF-8 bytes."""
    from tokenizers import Tokenizer

    _need("chars", vocab_size, 258, "bytes, end of text, a character")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.replace("▁", ""))  # which spells a space elsewhere
    common = sorted(counts, key=lambda c: (-counts[c], c))[: vocab_size - 257]
    vocab = {piece: i for i, piece in enumerate([EOS, *_BYTES, *common])}
    spec = _spec({"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True})
    spec["pre_tokenizer"] = _split(r"\s+|[^\s]{1,64}")
    return Tokenizer.from_str(json.dumps(spec)), EOS


def wordpiece(texts: Iterable[str], vocab_size: int) -> tuple[Any, str]:
    """WordPiece as BERT's (Devlin et al. 2019): words, '##' within them; case and accents stay.

    Spaces do not come back, and what it has not seen becomes [UNK]. The pieces are those of a BPE
    over words that begin with a mark: the library's own trainer gives others in each process.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    _need("wordpiece", vocab_size, 100, "special ids and characters")
    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    begin = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), begin])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, show_progress=False)
    inner.train_from_iterator((t.replace("▁", "") for t in texts), trainer)
    ranked = sorted(inner.get_vocab().items(), key=lambda item: item[1])
    pieces = [p[1:] if p.startswith("▁") else f"##{p}" for p, _ in ranked if p != "▁"]
    names = [*special, *pieces][:vocab_size]
    model = models.WordPiece({p: i for i, p in enumerate(names)}, unk_token="[UNK]")
    made = Tokenizer(model)
    made.normalizer, made.pre_tokenizer = inner.normalizer, pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(special)
    return made, "[SEP]"


def _spec(model: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json around `model`."""
    end = {
        "id": 0, "content": EOS, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip
    none = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {"version": "1.0", "added_tokens": [end], "decoder": _FROM_BYTES, **none, "model": model}


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False
    }  # fmt: skip


TRAINERS = {"bpe": bpe, "unigram": unigram, "chars": chars, "wordpiece": wordpiece}
