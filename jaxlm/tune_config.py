"""TuneConfig: what a run begins with, the examples it learns from, and which weights move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxlm.schema import doc, part


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters beside weights that stay as they are (Hu et al. 2022)."""

    rank: int = doc(0, "rank of an adapter; 0: all weights move")
    alpha: float = doc(16.0, "an adapter counts alpha / rank times")
    on: tuple[str, ...] = doc(
        ("query", "value"),
        "weights by name (query, key, value, out, up, gate, down) or role (hidden)",
    )


@dataclass(frozen=True)
class TuneConfig:
    """Fine-tuning: from which weights, on which examples, and how much of the model moves."""

    start: str = doc(
        "", "weights to begin with: a run's folder, a checkpoint or a hub name; '': fresh ones"
    )
    examples: tuple[str, ...] = doc(
        (), "files of records (.jsonl .csv .parquet …), or 'file.py:function' that yields dicts"
    )
    input: str = doc("text", "field of a record that the model reads")
    target: str = doc("label", "field that it is to say")
    pooling: Literal["", "first", "last", "mean", "each"] = doc(
        "", "as model.pooling, in place of what `start` has"
    )
    dropout: float | None = doc(None, "as model.dropout, in place of what `start` has")
    max_tokens: int | None = doc(None, "longer examples are cut; None: the model's seq_len")
    lora: LoraConfig = part(LoraConfig)
    beta: float = doc(0.1, "preference: how dear it is to leave `start` (DPO's beta)")
    teacher: str = doc("", "distill: the model whose next tokens are learnt, of the same tokenizer")
    teacher_tokens: int = doc(32, "distill: of the teacher's next tokens the likeliest so many")
    temperature: float = doc(1.0, "distill: of both models' distributions")
    teacher_share: float = doc(
        1.0, "distill: how much the teacher counts; the rest: the text's own next tokens"
    )
