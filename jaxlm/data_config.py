"""Which text a run reads, and what is done to it before it is seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxlm.schema import doc, part


@dataclass(frozen=True)
class CleanConfig:
    """What happens to documents before they become tokens; without any of it they stay as read."""

    licences: tuple[str, ...] = doc((), "patterns of text licences that are allowed; (): all")
    refused_licences: tuple[str, ...] = doc((), "patterns of text licences that are not")
    repair: bool = doc(False, "mend broken Unicode (ftfy)")
    language_id: bool = doc(False, "find each text's language (lingua, offline)")
    languages: tuple[str, ...] = doc((), "languages that stay ('en', 'ja', 'python' …); (): all")
    quality: bool = doc(False, "Gopher, C4 and FineWeb rules, by characters where no spaces are")
    evaluation_sets: tuple[str, ...] = doc((), "sources whose texts must not be trained on")
    mask: bool = doc(False, "replace mail addresses, telephone numbers, keys … by what they are")
    near_duplicates: bool = doc(False, "keep one of texts that are nearly alike (MinHash)")

    def has(self, step: str) -> bool:
        """Whether a step of `data.clean.STEPS` does anything."""
        return {
            "licence": bool(self.licences or self.refused_licences),
            "language": self.language_id or bool(self.languages),
            "decontaminate": bool(self.evaluation_sets),
        }.get(step, bool(getattr(self, step, False)))


@dataclass(frozen=True)
class DataConfig:
    """What is read, how it becomes tokens, and in which order it is seen."""

    sources: tuple[str, ...] = doc(
        ("stdlib",),
        "'stdlib', folders, files, globs or URLs (text, code, .jsonl .csv .parquet .html .warc …;"
        " packages: 'x.deb!pattern'), or 'file.py:function'",
    )
    licence: str = doc("", "SPDX id of the text in `sources`; '' records LicenseRef-unstated")
    text_field: str = doc("text", "which field of a record, or column of a table, is the text")
    file_urls: bool = doc(False, "whether a source may be a file:// URL")
    tokenizer: str = doc(
        "bytes",
        "'bytes'; trained here: 'bpe', 'unigram', 'chars', 'wordpiece', 'bpe+sudachi',"
        " 'unigram+sudachi'; or a tokenizer.json, .model, vocab.txt, or a folder of one",
    )
    tokenizer_bytes: int = doc(64 << 20, "bytes of text that a tokenizer is trained on, at most")
    eval_fraction: float = doc(0.05, "share of documents held out for evaluation, by hash of text")
    eval_sequences: int = doc(256, "sequences in one evaluation")
    max_epochs: float = doc(1.0, "how often a token may be seen before the run is refused")
    unique_tokens: int | None = doc(
        None, "train on so many tokens of the train split only, the same for every run; None: all"
    )
    seed: int | None = doc(None, "seed of the sample order; None: the run's seed")
    packing: Literal["split", "best_fit"] = doc(
        "split", "split: documents in a row, cut at windows; best_fit: whole ones where they fit"
    )
    weights: tuple[float, ...] = doc((), "share of each source in a batch; (): as large as it is")
    curriculum: tuple[tuple[float, tuple[float, ...]], ...] = doc(
        (), "((0.8, (1, 3)), …): weights that hold from this share of the steps on"
    )
    clean: CleanConfig = part(CleanConfig)
    engine: Literal["local", "ray"] = doc("local", "where cleaning runs: processes, or Ray")
    workers: int = doc(0, "processes that clean and make shards; 0: one per core")
    dir: str = doc("", "folder of the token shards; '': data/ in the run's (or sweep's) folder")
