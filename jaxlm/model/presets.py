"""Published shapes as plain `ModelConfig`s, by name: `preset("llama3-8b")`.

Numbers are those of the released checkpoints' own config files, GPT-3's those of its paper; the
parameters that they make are tested against the published counts. `docs/models.md` lists them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.config import ModelConfig
from jaxlm.model_config import MoE, RopeScaling
from jaxlm.schema import UserError, hint

_replace = dataclasses.replace
_PRESETS: dict[str, ModelConfig] = {}


def preset(name: str) -> ModelConfig:
    """The model of that name (`names()`). Raises UserError for another."""
    if name not in _PRESETS:
        raise UserError(f"preset: no {name!r}; {hint(name, _PRESETS)}")
    return _PRESETS[name]


def names() -> list[str]:
    return list(_PRESETS)


def _sizes(family: str, base: ModelConfig, fields: str, rows: dict[str, tuple[Any, ...]]) -> None:
    """Adds `family-size` for each row, whose entries are `fields` of `base`."""
    for size, row in rows.items():
        values = dict(zip(fields.split(), row, strict=True))
        _PRESETS[f"{family}-{size}"] = _replace(base, **values)


# ------------------------------------------------------------------------------- GPT-2, 3, Pythia

_GPT = ModelConfig(
    vocab_size=50257,
    seq_len=1024,
    norm="layernorm",
    positions="learned",
    activation="gelu",
    bias=True,
    tie_embeddings=True,
)
_sizes(  # Radford et al. 2019, table 2
    "gpt2", _GPT, "d_model n_layers n_heads",
    {
        "124m": (768, 12, 12), "355m": (1024, 24, 16), "774m": (1280, 36, 20),
        "1558m": (1600, 48, 25),
    },
)  # fmt: skip
# Brown et al. 2020, table 2.1; two of its rows do not multiply out: 1.3B says 24 heads of 128 for
# 2048, taken as 16; 13B says 5140 for 40 heads of 128, as 5120. Its alternating sparse attention is
# dense here.
_sizes(
    "gpt3", _replace(_GPT, seq_len=2048), "d_model n_layers n_heads d_head",
    {
        "125m": (768, 12, 12, 64), "350m": (1024, 24, 16, 64), "760m": (1536, 24, 16, 96),
        "1.3b": (2048, 24, 16, 128), "2.7b": (2560, 32, 32, 80), "6.7b": (4096, 32, 32, 128),
        "13b": (5120, 40, 40, 128), "175b": (12288, 96, 96, 128),
    },
)  # fmt: skip
_PYTHIA = _replace(
    _GPT,
    vocab_size=50304,
    seq_len=2048,
    positions="rope",
    rope_fraction=0.25,
    parallel_residual=True,
    activation="gelu_exact",
    tie_embeddings=False,
)
_sizes(  # Biderman et al. 2023
    "pythia", _PYTHIA, "d_model n_layers n_heads vocab_size",
    {
        "70m": (512, 6, 8, 50304), "160m": (768, 12, 12, 50304), "410m": (1024, 24, 16, 50304),
        "1b": (2048, 16, 8, 50304), "1.4b": (2048, 24, 16, 50304), "2.8b": (2560, 32, 32, 50304),
        "6.9b": (4096, 32, 32, 50432), "12b": (5120, 36, 40, 50688),
    },
)  # fmt: skip

# --------------------------------------------------------------------------------------- BERT, T5

_BERT = ModelConfig(
    architecture="encoder",
    vocab_size=30522,
    seq_len=512,
    norm="layernorm",
    norm_eps=1e-12,
    norm_placement="post",
    positions="learned",
    activation="gelu_exact",
    bias=True,
    dropout=0.1,
    n_token_types=2,
    embedding_norm=True,
    mlm_head=True,
)
_sizes(
    "bert", _BERT, "d_model n_layers n_heads",
    {
        "base": (768, 12, 12), "large": (1024, 24, 16),
    },
)  # fmt: skip
_T5 = ModelConfig(
    architecture="encoder_decoder",
    vocab_size=32128,
    seq_len=512,
    target_len=114,  # of 512 tokens with their spans taken out
    norm_eps=1e-6,
    positions="relative",
    attention_scale=1.0,
    activation="relu",
    dropout=0.1,
    scale_output=True,
)
_sizes(  # Raffel et al. 2020
    "t5", _T5, "d_model n_layers n_heads d_head d_ff",
    {
        "small": (512, 6, 8, 64, 2048), "base": (768, 12, 12, 64, 3072),
        "large": (1024, 24, 16, 64, 4096),
        "3b": (1024, 24, 32, 128, 16384), "11b": (1024, 24, 128, 128, 65536),
    },
)  # fmt: skip
_T5_V1_1 = _replace(_T5, activation="geglu", tie_embeddings=False, scale_output=False, dropout=0.0)
_sizes(
    "t5-v1.1", _T5_V1_1, "d_model n_layers n_heads d_head d_ff",
    {
        "small": (512, 8, 6, 64, 1024), "base": (768, 12, 12, 64, 2048),
        "large": (1024, 24, 16, 64, 2816),
        "xl": (2048, 24, 32, 64, 5120), "xxl": (4096, 24, 64, 64, 10240),
    },
)  # fmt: skip

# ------------------------------------------------------------------- Llama and those who follow it

_LLAMA = ModelConfig(
    vocab_size=32000, seq_len=4096, activation="swiglu", tie_embeddings=False, norm_eps=1e-5
)
_SHAPE = "d_model n_layers n_heads n_kv_heads d_ff"
_sizes(
    "llama2", _LLAMA, _SHAPE,
    {
        "7b": (4096, 32, 32, 32, 11008), "13b": (5120, 40, 40, 40, 13824),
        "70b": (8192, 80, 64, 8, 28672),
    },
)  # fmt: skip
_LLAMA3 = _replace(_LLAMA, vocab_size=128256, seq_len=8192, rope_theta=5e5)
_sizes(
    "llama3", _LLAMA3, _SHAPE,
    {
        "8b": (4096, 32, 32, 8, 14336), "70b": (8192, 80, 64, 8, 28672),
    },
)  # fmt: skip
_LONG = RopeScaling(kind="llama3", factor=8.0, original_seq_len=8192)
_LLAMA3_1 = _replace(_LLAMA3, seq_len=131072, rope_scaling=_LONG)
_sizes(
    "llama3.1", _LLAMA3_1, _SHAPE,
    {
        "8b": (4096, 32, 32, 8, 14336), "70b": (8192, 80, 64, 8, 28672),
        "405b": (16384, 126, 128, 8, 53248),
    },
)  # fmt: skip
_LLAMA3_2 = _replace(_LLAMA3_1, tie_embeddings=True, rope_scaling=_replace(_LONG, factor=32.0))
_sizes(
    "llama3.2", _LLAMA3_2, f"{_SHAPE} d_head",
    {
        "1b": (2048, 16, 32, 8, 8192, 64), "3b": (3072, 28, 24, 8, 8192, 128),
    },
)  # fmt: skip
_SMOLLM2 = _replace(_LLAMA, vocab_size=49152, seq_len=8192, tie_embeddings=True)
_sizes(
    "smollm2", _SMOLLM2, f"{_SHAPE} rope_theta",
    {
        "135m": (576, 30, 9, 3, 1536, 1e5), "360m": (960, 32, 15, 5, 2560, 1e5),
        "1.7b": (2048, 24, 32, 32, 8192, 1.3e5),
    },
)  # fmt: skip
_MISTRAL = _replace(_LLAMA, seq_len=32768)
_sizes(
    "mistral", _MISTRAL, f"{_SHAPE} sliding_window",
    {
        "7b": (4096, 32, 32, 8, 14336, 4096),
    },
)  # fmt: skip
_MIXTRAL = _replace(_MISTRAL, rope_theta=1e6, moe=MoE(n_experts=8, balance_loss=0.02))
_sizes(
    "mixtral", _MIXTRAL, f"{_SHAPE} seq_len",
    {
        "8x7b": (4096, 32, 32, 8, 14336, 32768), "8x22b": (6144, 56, 48, 8, 16384, 65536),
    },
)  # fmt: skip
_QWEN3 = _replace(
    _LLAMA,
    vocab_size=151936,
    seq_len=40960,
    d_head=128,
    norm_eps=1e-6,
    rope_theta=1e6,
    qk_norm=True,
)
_sizes(
    "qwen3", _QWEN3, f"{_SHAPE} tie_embeddings",
    {
        "0.6b": (1024, 28, 16, 8, 3072, True), "1.7b": (2048, 28, 16, 8, 6144, True),
        "4b": (2560, 36, 32, 8, 9728, True), "8b": (4096, 36, 32, 8, 12288, False),
        "14b": (5120, 40, 40, 8, 17408, False), "32b": (5120, 64, 64, 8, 25600, False),
    },
)  # fmt: skip
_QWEN3_EXPERTS = MoE(n_experts=128, experts_per_token=8, balance_loss=0.001, router_z_loss=0.0)
_sizes(
    "qwen3", _QWEN3, f"{_SHAPE} moe",
    {
        "30b-a3b": (2048, 48, 32, 4, 6144, _replace(_QWEN3_EXPERTS, d_expert=768)),
        "235b-a22b": (4096, 94, 64, 4, 12288, _replace(_QWEN3_EXPERTS, d_expert=1536)),
    },
)  # fmt: skip
_OLMO2 = _replace(
    _LLAMA,
    vocab_size=100352,
    norm_eps=1e-6,
    norm_placement="output",
    qk_norm=True,
    qk_norm_over="projection",
    rope_theta=5e5,
)
_sizes(
    "olmo2", _OLMO2, _SHAPE,
    {
        "1b": (2048, 16, 16, 16, 8192), "7b": (4096, 32, 32, 32, 11008),
        "13b": (5120, 40, 40, 40, 13824),
        "32b": (5120, 64, 40, 8, 27648),
    },
)  # fmt: skip

# ------------------------------------------------------------------------------------------ Gemma

_GEMMA2 = ModelConfig(
    vocab_size=256000,
    seq_len=8192,
    norm_eps=1e-6,
    norm_placement="both",
    activation="geglu",
    sliding_window=4096,
    global_every=2,
    attention_soft_cap=50.0,
    final_soft_cap=30.0,
    scale_embeddings=True,
)
_GEMMA = f"{_SHAPE} d_head attention_scale"
_sizes(
    "gemma2", _GEMMA2, _GEMMA,
    {
        "2b": (2304, 26, 8, 4, 9216, 256, 256**-0.5),
        "9b": (3584, 42, 16, 8, 14336, 256, 256**-0.5),
        "27b": (4608, 46, 32, 16, 36864, 128, 144**-0.5),
    },
)  # fmt: skip
_GEMMA3 = _replace(
    _GEMMA2,
    vocab_size=262144,
    seq_len=32768,
    attention_soft_cap=None,
    final_soft_cap=None,
    qk_norm=True,
    rope_theta=1e6,
    local_rope_theta=1e4,
    sliding_window=512,
    global_every=6,
)
_sizes(
    "gemma3", _GEMMA3, _GEMMA,
    {
        "270m": (640, 18, 4, 1, 2048, 256, 256**-0.5), "1b": (1152, 26, 4, 1, 6912, 256, 256**-0.5),
    },
)  # fmt: skip
_GEMMA3_LONG = _replace(  # the text part of the models that also see
    _GEMMA3,
    vocab_size=262208,
    seq_len=131072,
    sliding_window=1024,
    rope_scaling=RopeScaling(kind="linear", factor=8.0),
)
_sizes(
    "gemma3", _GEMMA3_LONG, _GEMMA,
    {
        "4b": (2560, 34, 8, 4, 10240, 256, 256**-0.5),
        "12b": (3840, 48, 16, 8, 15360, 256, 256**-0.5),
        "27b": (5376, 62, 32, 16, 21504, 128, 168**-0.5),
    },
)  # fmt: skip
