"""Published shapes as plain `ModelConfig`s; their counts are tested against the papers."""

from __future__ import annotations

import dataclasses

from jaxlm.config import ModelConfig

# d_model, n_layers, n_heads (Radford et al. 2019, table 2; head width 64)
_GPT2 = {
    "124m": (768, 12, 12),
    "355m": (1024, 24, 16),
    "774m": (1280, 36, 20),
    "1558m": (1600, 48, 25),
}

# d_model, n_layers, n_heads, d_head (Brown et al. 2020, table 2.1; two of its rows do not multiply
# out: 1.3B says 24 heads of 128 for 2048, taken as 16; 13B says 5140 for 40 heads of 128, as 5120)
_GPT3 = {
    "125m": (768, 12, 12, 64),
    "350m": (1024, 24, 16, 64),
    "760m": (1536, 24, 16, 96),
    "1.3b": (2048, 24, 16, 128),
    "2.7b": (2560, 32, 32, 80),
    "6.7b": (4096, 32, 32, 128),
    "13b": (5120, 40, 40, 128),
    "175b": (12288, 96, 96, 128),
}

_GPT = ModelConfig(
    vocab_size=50257,
    norm="layernorm",
    positions="learned",
    activation="gelu",
    bias=True,
    tie_embeddings=True,
    scan_layers=True,
)


def gpt2(size: str) -> ModelConfig:
    """GPT-2 '124m', '355m', '774m' or '1558m', context 1024."""
    d, layers, heads = _GPT2[size]
    return dataclasses.replace(_GPT, d_model=d, n_layers=layers, n_heads=heads, seq_len=1024)


def gpt3(size: str) -> ModelConfig:
    """GPT-3 '125m' … '175b', context 2048. Its alternating sparse attention is dense here."""
    d, layers, heads, k = _GPT3[size]
    return dataclasses.replace(
        _GPT, d_model=d, n_layers=layers, n_heads=heads, d_head=k, seq_len=2048
    )
