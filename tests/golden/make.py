"""Random tiny models of each family, made by transformers, and the logits that they give.

    pip install -e '.[parity]' && python tests/golden/make.py

writes tests/golden/FAMILY/: config.json, model.safetensors, logits.npz (tokens, logits) and, in
versions.json, what made them. `make test` compares with these files; `make test-parity` makes the
same models anew (with other seeds) and compares live.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

HERE = Path(__file__).parent

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 12}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LOCAL = ["sliding_attention", "full_attention"]


def _scaled(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 1000.0, "factor": 4.0, **values}


LLAMA3 = _scaled(
    "llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8
)
TWO = {
    "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}

# name → (model class, config class, its arguments)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
    ),
    "pythia": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**SMALL, "partial": 0.5}),
    "llama3": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**GROUPED, "rms_norm_eps": 1e-5, "rope_parameters": LLAMA3},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 4}),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**GROUPED, "head_dim": 8, "tie_word_embeddings": True},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 8, "norm_topk_prob": True},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GEMMA, "layer_types": LOCAL}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**GEMMA, "layer_types": LOCAL, "rope_parameters": TWO},
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    "arcee": ("ArceeForCausalLM", "ArceeConfig", {**GROUPED, "hidden_act": "gelu_pytorch_tanh"}),
}  # fmt: skip


def build(name: str, seed: int = 0) -> Any:
    """The family's model in float32 with random weights, all of them so large that they count."""
    model_class, config_class, values = MODELS[name]
    values = {**SPECIAL, **values}
    if "partial" in values:
        share = values.pop("partial")
        values["rope_parameters"] = {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share,
        }  # fmt: skip
    config = getattr(hf, config_class)(**values)
    config._attn_implementation = "eager"
    model = getattr(hf, model_class)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(parameter + 0.3 * noise)  # gains about 1 (or 0), biases about 0
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
    model.tie_weights()
    return model


def tokens(seed: int, rows: int = 2, length: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 64, (rows, length), dtype=np.int32)


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.int64)).logits.numpy()


def main() -> None:
    for name in MODELS:
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model, ids = build(name), tokens(0)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(folder / "logits.npz", tokens=ids, logits=logits(model, ids))
    made_by = {"torch": torch.__version__, "transformers": hf.__version__}
    (HERE / "versions.json").write_text(json.dumps(made_by, indent=2) + "\n")


if __name__ == "__main__":
    main()
