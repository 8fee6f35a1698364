"""The tokenizer of someone else's checkpoint: a Hugging Face folder's, or a GGUF file's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxlm.data.tokenizer import Subword, Tokenizer, from_file
from jaxlm.files import first_line
from jaxlm.schema import UserError


def from_folder(folder: Path) -> Tokenizer:
    """tokenizer.json, else GPT-2's vocab.json and merges.txt, else BERT's vocab.txt.

    Raises UserError where none is there, or what is there cannot be read.
    """
    if (folder / "tokenizer.json").exists():
        return from_file(folder / "tokenizer.json")
    made: tuple[tuple[tuple[str, ...], Callable[[Path], Any], str], ...] = (
        (("vocab.json", "merges.txt"), _gpt2, "<|endoftext|>"),
        (("vocab.txt",), _bert, "[SEP]"),
    )
    for names, make, eos in made:
        if all((folder / name).exists() for name in names):
            try:
                return Subword(make(folder), eos)
            except (OSError, ValueError) as e:
                raise UserError(f"{folder / names[0]}: cannot be read: {first_line(e)}") from e
    known = "tokenizer.json, vocab.json with merges.txt, vocab.txt"
    raise UserError(f"{folder}: no tokenizer in it; looked for {known}")


def _gpt2(folder: Path) -> Any:
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    lines = (folder / "merges.txt").read_text("utf-8").splitlines()
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    return _byte_level(vocab, pairs, "gpt-2", {"<|endoftext|>": vocab.get("<|endoftext|>")})


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


def as_files(tokenizer: Tokenizer, seq_len: int) -> dict[str, str]:
    """Name → text of the files from which `transformers` makes the same tokenizer."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tokenizer, Subword):
        inner = tokenizer.inner
        known = {
            k: next((n for n in names if n in special(inner)), None) for k, names in _NAMES.items()
        }
        config |= {"eos_token": tokenizer.eos, **{k: v for k, v in known.items() if v}}
    else:
        inner = _bytes()
    return {
        "tokenizer.json": inner.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }


def special(inner: Any) -> set[str]:
    """The special tokens of a `tokenizers.Tokenizer`."""
    return {t.content for t in inner.get_added_tokens_decoder().values() if t.special}


def _bytes() -> Any:
    """Bytes as a byte-level BPE without merges: byte b has the id b."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers

    # GPT-2's letters for bytes: printable Latin-1 as itself, the others from U+0100 on, in order.
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    vocab = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
    inner = Inner(models.BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return inner
