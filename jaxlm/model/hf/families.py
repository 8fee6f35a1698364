"""All families. A config is exported as the first of them that computes it."""

from __future__ import annotations

from jaxlm.model.hf import decoders as d
from jaxlm.model.hf import encoders as e

FAMILIES = (
    d.GPT2, d.LLAMA, d.ARCEE, d.QWEN3, d.MISTRAL, d.OLMO2, d.GPT_NEOX, d.MIXTRAL, d.QWEN3_MOE,
    d.GEMMA2, d.GEMMA3, e.BERT_MASKED, e.BERT, e.BERT_CLASSIFIER, e.T5, e.T5_GATED,
)  # fmt: skip
