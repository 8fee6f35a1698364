"""The tokenizer of someone else's checkpoint: a Hugging Face folder's, or a GGUF file's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.data.tokenizer import Subword, Tokenizer, byte_letters, from_file
from jaxlm.files import first_line
from jaxlm.schema import UserError


def from_folder(folder: Path) -> Tokenizer:
    """As `tokenizer.from_file`; BERT's vocab.txt with the template that goes with it.

    Raises UserError where none is there, or what is there cannot be read.
    """
    others = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not (folder / "vocab.txt").exists() or any((folder / name).exists() for name in others):
        return from_file(folder)
    try:
        return Subword(_bert(folder), "[SEP]")
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{folder / 'vocab.txt'}: cannot be read: {first_line(e)}") from e


def _bert(folder: Path) -> Any:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    words = (folder / "vocab.txt").read_text("utf-8").splitlines()
    vocab = {word: i for i, word in enumerate(words)}
    path = folder / "tokenizer_config.json"
    stated = json.loads(path.read_text("utf-8")) if path.exists() else {}
    inner = Inner(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=stated.get("tokenize_chinese_chars", True),
        strip_accents=stated.get("strip_accents"),
        lowercase=stated.get("do_lower_case", True),
    )
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(prefix="##")
    inner.add_special_tokens(
        [w for w in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if w in vocab]
    )
    ends = [("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return inner


# -------------------------------------------------------------------------------------------- GGUF

_NORMAL, _CONTROL, _USER = 1, 3, 4  # tokenizer.ggml.token_type

# How text is cut before merging, by `tokenizer.ggml.pre`, as the tokenizers that the models were
# published with have it: (regular expression or None, digits one by one).
_CUTS = {
    "gpt-2": (None, False),
    "smollm": (None, True),
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        False,
    ),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        False,
    ),
}


def from_gguf(stated: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer that GGUF metadata (`tokenizer.ggml.*`) describes. Raises UserError for a kind
    that is not byte-level BPE, and for a way of cutting text that is not known here."""

    def get(name: str, default: Any = None) -> Any:
        return stated.get(f"tokenizer.ggml.{name}", default)

    if get("model") != "gpt2":
        raise UserError(f"{where}: tokenizer.ggml.model is {get('model')!r}; only 'gpt2' is read")
    cut, tokens = get("pre", "gpt-2"), get("tokens", [])
    if cut not in _CUTS:
        raise UserError(f"{where}: tokenizer.ggml.pre is {cut!r}; known: {', '.join(_CUTS)}")
    kinds = get("token_type", [_NORMAL] * len(tokens))
    vocab = {token: i for i, token in enumerate(tokens)}
    special = {t: i for (t, i), kind in zip(vocab.items(), kinds, strict=True) if kind == _CONTROL}
    pairs = [tuple(pair.split(" ")) for pair in get("merges", [])]
    try:
        inner = _byte_level(vocab, pairs, cut, special)
        if get("add_bos_token", False):
            _begins(inner, tokens[get("bos_token_id")], get("bos_token_id"))
        return Subword(inner, tokens[get("eos_token_id")])
    except (TypeError, ValueError, IndexError) as e:
        raise UserError(f"{where}: no readable tokenizer: {first_line(e)}") from e


def _byte_level(vocab: dict[str, int], pairs: Any, cut: str, special: dict[str, Any]) -> Any:
    """Byte-level BPE (Radford et al. 2019 §2.2) over a given vocabulary."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    pattern, digits = _CUTS[cut]
    inner = Inner(models.BPE(vocab, pairs, ignore_merges=cut == "llama-bpe"))
    parts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern:
        parts.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    inner.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([token for token, i in special.items() if i is not None])
    return inner


def _begins(inner: Any, token: str, i: int) -> None:
    from tokenizers import processors

    inner.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, i)]
    )


# ------------------------------------------------------------------------------------------ export

_NAMES = {
    "bos_token": ("<|begin_of_text|>", "<s>", "<bos>"),
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
}


def as_files(
    tokenizer: Tokenizer, seq_len: int, named: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Name → text of the files from which `transformers` makes the same tokenizer; none for kinds
    that are no tokenizer.json. `named` are special tokens by their role (bos_token, …)."""
    if tokenizer.kind not in ("bytes", "subword"):
        return {}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tokenizer, Subword):
        inner = tokenizer.inner
        marked = {t.content for t in inner.get_added_tokens_decoder().values() if t.special}
        known = {key: [n for n in names if n in marked] for key, names in _NAMES.items()}
        config |= {"eos_token": tokenizer.eos, **{k: v[0] for k, v in known.items() if v}}
        config |= named or {}
    else:
        inner = _bytes()
    return {
        "tokenizer.json": inner.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }


def _bytes() -> Any:
    """Bytes as a byte-level BPE without merges: byte b has the id b."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers

    inner = Inner(models.BPE(byte_letters(), []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return inner
