"""Random tiny models of each family, made by transformers, and the logits that they give.

    pip install -e '.[parity]' && python tests/golden/make.py

writes tests/golden/FAMILY/: config.json, model.safetensors, output.npz (tokens, and the logits or
hidden states) and, in versions.json, what made them. `make test` compares with these files;
`make test-parity` makes the same models anew (with another seed) and compares live.
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
T5 = {
    "vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 1,
    "num_decoder_layers": 2, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12, "decoder_start_token_id": 0,
}  # fmt: skip
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
    "bert": ("BertForMaskedLM", "BertConfig", SMALL),
    "bert_classifier": ("BertForSequenceClassification", "BertConfig", {**SMALL, "num_labels": 3}),
    "bert_base": ("BertModel", "BertConfig", SMALL),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "relu"}),
    "t5_v1_1": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
}  # fmt: skip


MAPS = ("gpt2", "mistral", "gemma2", "bert_base")  # whose attention weights are kept too


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
    if name == "t5_v1_1":  # its output is one of its own; transformers ties it until it is read
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(parameter + 0.3 * noise)  # gains about 1 (or 0), biases about 0
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[-1] ** -0.5)
    if name != "t5_v1_1":
        model.tie_weights()
    return model


def tokens(seed: int, rows: int = 2, length: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 64, (rows, length), dtype=np.int32)


def output(model: Any, ids: np.ndarray) -> torch.Tensor:
    """Logits (BertModel: hidden states). An encoder–decoder reads the ids backwards as source."""
    given = torch.tensor(ids, dtype=torch.int64)
    if model.config.is_encoder_decoder:
        return model(input_ids=given.flip(1), decoder_input_ids=given).logits
    out = model(given)
    return out.logits if "logits" in out else out.last_hidden_state


def save(name: str, model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name == "t5_v1_1":  # as published; transformers 5 writes that it is tied
        config = json.loads((folder / "config.json").read_text())
        del config["scale_decoder_outputs"]
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


def main() -> None:
    for name in MODELS:
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model, ids = build(name), tokens(0)
        save(name, model, folder)
        with torch.no_grad():
            arrays = {"tokens": ids, "output": output(model, ids).numpy()}
            if name in MAPS:
                given = torch.tensor(ids, dtype=torch.int64)
                maps = model(given, output_attentions=True).attentions
                arrays["maps"] = torch.stack(maps).numpy()  # [l, b, h, t, s]
        np.savez_compressed(folder / "output.npz", **arrays)
    made_by = {"torch": torch.__version__, "transformers": hf.__version__}
    (HERE / "versions.json").write_text(json.dumps(made_by, indent=2) + "\n")


if __name__ == "__main__":
    main()
