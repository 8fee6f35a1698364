"""GPT-like families, each a table: a row says where a parameter of ours lies in theirs."""

from __future__ import annotations

from jaxlm.model.hf.family import Family, Key
from jaxlm.model.hf.layout import Row
from jaxlm.model.hf.parts import QUERY_SCALE, TWO_ROPES, WINDOW, local_layers, rope

SWIGLU = (("silu", "swiglu"), ("swish", "swiglu"))
GEGLU = (("gelu_pytorch_tanh", "geglu"), ("gelu_new", "geglu"))
UNGATED = (
    ("relu2", "relu2"),
    ("gelu_pytorch_tanh", "gelu"),
    ("gelu_new", "gelu"),
    ("gelu", "gelu_exact"),
    ("relu", "relu"),
)

# ------------------------------------------------------------------------------------------- GPT-2

_H = "transformer.h.{l}"

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    keys=(
        Key("vocab_size", "vocab_size", 50257),
        Key("n_positions", "seq_len", 1024),
        Key("n_embd", "d_model", 768),
        Key("n_layer", "n_layers", 12),
        Key("n_head", "n_heads", 12),
        Key("n_inner", "d_ff", None),
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        Key(
            "activation_function",
            "activation",
            "gelu_new",
            values=(("gelu_new", "gelu"), ("gelu_pytorch_tanh", "gelu"), ("gelu", "gelu_exact")),
        ),
        Key("tie_word_embeddings", "tie_embeddings", True),
    ),
    fixed={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    ours={"norm": "layernorm", "positions": "learned", "bias": True},
    rows=(
        Row("embedding", "transformer.wte.weight", "v d"),
        Row("positions", "transformer.wpe.weight", "p d"),
        Row("layers.attention_norm.gain", f"{_H}.ln_1.weight", "d"),
        Row("layers.attention_norm.bias", f"{_H}.ln_1.bias", "d"),
        # [in, out], and query, key and value side by side
        Row("layers.attention.query", f"{_H}.attn.c_attn.weight", "d (n h k)", (0, 3)),
        Row("layers.attention.key", f"{_H}.attn.c_attn.weight", "d (n g k)", (1, 3)),
        Row("layers.attention.value", f"{_H}.attn.c_attn.weight", "d (n g k)", (2, 3)),
        Row("layers.attention.query_bias", f"{_H}.attn.c_attn.bias", "(n h k)", (0, 3)),
        Row("layers.attention.key_bias", f"{_H}.attn.c_attn.bias", "(n g k)", (1, 3)),
        Row("layers.attention.value_bias", f"{_H}.attn.c_attn.bias", "(n g k)", (2, 3)),
        Row("layers.attention.out", f"{_H}.attn.c_proj.weight", "(h k) d"),
        Row("layers.attention.out_bias", f"{_H}.attn.c_proj.bias", "d"),
        Row("layers.feed_forward_norm.gain", f"{_H}.ln_2.weight", "d"),
        Row("layers.feed_forward_norm.bias", f"{_H}.ln_2.bias", "d"),
        Row("layers.feed_forward.up", f"{_H}.mlp.c_fc.weight", "d f"),
        Row("layers.feed_forward.up_bias", f"{_H}.mlp.c_fc.bias", "f"),
        Row("layers.feed_forward.down", f"{_H}.mlp.c_proj.weight", "f d"),
        Row("layers.feed_forward.down_bias", f"{_H}.mlp.c_proj.bias", "d"),
        Row("norm.gain", "transformer.ln_f.weight", "d"),
        Row("norm.bias", "transformer.ln_f.bias", "d"),
        Row("unembedding", "lm_head.weight", "v d"),
    ),
    prefix="transformer.",
    ties=("lm_head.weight",),
    buffers=(r".*\.attn\.(bias|masked_bias)",),
)

# -------------------------------------------------------------------------------- GPT-NeoX, Pythia

_N = "gpt_neox.layers.{l}"
_QKV = f"{_N}.attention.query_key_value"

GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    keys=(
        Key("vocab_size", "vocab_size", 50432),
        Key("max_position_embeddings", "seq_len", 2048),
        Key("hidden_size", "d_model", 6144),
        Key("intermediate_size", "d_ff", 24576),
        Key("num_hidden_layers", "n_layers", 44),
        Key("num_attention_heads", "n_heads", 64),
        Key("layer_norm_eps", "norm_eps", 1e-5),
        Key("hidden_act", "activation", "gelu", values=(*UNGATED[3:], *UNGATED[:3])),
        Key("use_parallel_residual", "parallel_residual", True),
        Key("tie_word_embeddings", "tie_embeddings", False),
    ),
    fixed={"attention_bias": (True,)},
    ours={"norm": "layernorm", "positions": "rope", "bias": True},
    rows=(
        Row("embedding", "gpt_neox.embed_in.weight", "v d"),
        Row("layers.attention_norm.gain", f"{_N}.input_layernorm.weight", "d"),
        Row("layers.attention_norm.bias", f"{_N}.input_layernorm.bias", "d"),
        # head by head: its query, its key, its value
        Row("layers.attention.query", f"{_QKV}.weight", "(h n k) d", (0, 3)),
        Row("layers.attention.key", f"{_QKV}.weight", "(g n k) d", (1, 3)),
        Row("layers.attention.value", f"{_QKV}.weight", "(g n k) d", (2, 3)),
        Row("layers.attention.query_bias", f"{_QKV}.bias", "(h n k)", (0, 3)),
        Row("layers.attention.key_bias", f"{_QKV}.bias", "(g n k)", (1, 3)),
        Row("layers.attention.value_bias", f"{_QKV}.bias", "(g n k)", (2, 3)),
        Row("layers.attention.out", f"{_N}.attention.dense.weight", "d (h k)"),
        Row("layers.attention.out_bias", f"{_N}.attention.dense.bias", "d"),
        Row("layers.feed_forward_norm.gain", f"{_N}.post_attention_layernorm.weight", "d"),
        Row("layers.feed_forward_norm.bias", f"{_N}.post_attention_layernorm.bias", "d"),
        Row("layers.feed_forward.up", f"{_N}.mlp.dense_h_to_4h.weight", "f d"),
        Row("layers.feed_forward.up_bias", f"{_N}.mlp.dense_h_to_4h.bias", "f"),
        Row("layers.feed_forward.down", f"{_N}.mlp.dense_4h_to_h.weight", "d f"),
        Row("layers.feed_forward.down_bias", f"{_N}.mlp.dense_4h_to_h.bias", "d"),
        Row("norm.gain", "gpt_neox.final_layer_norm.weight", "d"),
        Row("norm.bias", "gpt_neox.final_layer_norm.bias", "d"),
        Row("unembedding", "embed_out.weight", "v d"),
    ),
    prefix="gpt_neox.",
    parts=(rope(10_000.0, 0.25),),
    ties=("embed_out.weight",),
    buffers=(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)

# ---------------------------------------------------------------------------------- Llama and kin

_L = "model.layers.{l}"

_EDGES = (
    Row("embedding", "model.embed_tokens.weight", "v d"),
    Row("norm.gain", "model.norm.weight", "d"),
    Row("unembedding", "lm_head.weight", "v d"),
)
_ATTENTION = (
    Row("layers.attention.query", f"{_L}.self_attn.q_proj.weight", "(h k) d"),
    Row("layers.attention.key", f"{_L}.self_attn.k_proj.weight", "(g k) d"),
    Row("layers.attention.value", f"{_L}.self_attn.v_proj.weight", "(g k) d"),
    Row("layers.attention.out", f"{_L}.self_attn.o_proj.weight", "d (h k)"),
)
_QK_NORM = (
    Row("layers.attention.query_norm.gain", f"{_L}.self_attn.q_norm.weight", "k"),
    Row("layers.attention.key_norm.gain", f"{_L}.self_attn.k_norm.weight", "k"),
)
_PRE_NORM = (
    Row("layers.attention_norm.gain", f"{_L}.input_layernorm.weight", "d"),
    Row("layers.feed_forward_norm.gain", f"{_L}.post_attention_layernorm.weight", "d"),
)
_MLP = (
    Row("layers.feed_forward.gate", f"{_L}.mlp.gate_proj.weight", "f d"),
    Row("layers.feed_forward.up", f"{_L}.mlp.up_proj.weight", "f d"),
    Row("layers.feed_forward.down", f"{_L}.mlp.down_proj.weight", "d f"),
)


def _keys(
    *sizes: int, eps: float, tied: bool = False, d_head: int | None = None
) -> tuple[Key, ...]:
    """The keys that all of Llama's kin have, with what each means where it is absent."""
    vocab, length, width, hidden, layers, heads = sizes
    return (
        Key("vocab_size", "vocab_size", vocab),
        Key("max_position_embeddings", "seq_len", length),
        Key("hidden_size", "d_model", width),
        Key("intermediate_size", "d_ff", hidden),
        Key("num_hidden_layers", "n_layers", layers),
        Key("num_attention_heads", "n_heads", heads),
        Key("head_dim", "d_head", d_head),
        Key("rms_norm_eps", "norm_eps", eps),
        Key("tie_word_embeddings", "tie_embeddings", tied),
    )


_SILU = Key("hidden_act", "activation", "silu", values=SWIGLU)
_ROTARY = {"norm": "rmsnorm", "positions": "rope", "bias": False}
_NO_BIAS = {"attention_bias": (False,)}
_HEAD = ("lm_head.weight",)
_FREQUENCIES = (r".*rotary_emb\.inv_freq",)


def _kv_heads(default: int | None) -> Key:
    return Key("num_key_value_heads", "n_kv_heads", default)


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=(*_keys(32000, 2048, 4096, 11008, 32, 32, eps=1e-6), _kv_heads(None), _SILU),
    fixed={**_NO_BIAS, "mlp_bias": (False,)},
    ours=_ROTARY,
    rows=(*_EDGES, *_ATTENTION, *_PRE_NORM, *_MLP),
    prefix="model.",
    parts=(rope(10_000.0),),
    ties=_HEAD,
    buffers=_FREQUENCIES,
)

# Llama with two matrices in its feed-forward layer: what our plainest decoder is exported as.
ARCEE = Family(
    model_type="arcee",
    architecture="ArceeForCausalLM",
    keys=(
        *_keys(32000, 4096, 2560, 18432, 32, 32, eps=1e-5),
        _kv_heads(None),
        Key("hidden_act", "activation", "relu2", values=UNGATED),
    ),
    fixed={**_NO_BIAS, "mlp_bias": (False,)},
    ours=_ROTARY,
    rows=(*_EDGES, *_ATTENTION, *_PRE_NORM, *_MLP[1:]),
    prefix="model.",
    parts=(rope(10_000.0),),
    ties=_HEAD,
    buffers=_FREQUENCIES,
)

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=(*_keys(32000, 4096 * 32, 4096, 14336, 32, 32, eps=1e-6), _kv_heads(8), _SILU),
    fixed={},
    ours=_ROTARY,
    rows=(*_EDGES, *_ATTENTION, *_PRE_NORM, *_MLP),
    prefix="model.",
    parts=(rope(10_000.0), WINDOW),
    ties=_HEAD,
    buffers=_FREQUENCIES,
)

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    keys=(
        *_keys(32000, 4096 * 32, 4096, 14336, 32, 32, eps=1e-5),
        _kv_heads(8),
        _SILU,
        Key("num_local_experts", "moe.n_experts", 8),
        Key("num_experts_per_tok", "moe.experts_per_token", 2),
        Key("router_aux_loss_coef", "moe.balance_loss", 0.001),
    ),
    fixed={},
    ours={**_ROTARY, "moe.normalize_weights": True},
    rows=(
        *_EDGES, *_ATTENTION, *_PRE_NORM,
        Row("layers.experts.router", f"{_L}.block_sparse_moe.gate.weight", "e d"),
        Row("layers.experts.gate", f"{_L}.block_sparse_moe.experts.{{e}}.w1.weight", "f d"),
        Row("layers.experts.up", f"{_L}.block_sparse_moe.experts.{{e}}.w3.weight", "f d"),
        Row("layers.experts.down", f"{_L}.block_sparse_moe.experts.{{e}}.w2.weight", "d f"),
    ),
    prefix="model.",
    parts=(rope(1e6), WINDOW),
    ties=_HEAD,
    buffers=_FREQUENCIES,
)  # fmt: skip

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=(*_keys(151936, 32768, 4096, 22016, 32, 32, eps=1e-6, d_head=128), _kv_heads(32), _SILU),
    fixed={**_NO_BIAS, "use_sliding_window": (False,)},
    ours={**_ROTARY, "qk_norm": True},
    rows=(*_EDGES, *_ATTENTION, *_QK_NORM, *_PRE_NORM, *_MLP),
    prefix="model.",
    parts=(rope(10_000.0),),
    ties=_HEAD,
    buffers=_FREQUENCIES,
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys=(
        *_keys(151936, 32768, 2048, 6144, 24, 32, eps=1e-6),
        _kv_heads(4),
        _SILU,
        Key("num_experts", "moe.n_experts", 128, "num_local_experts"),
        Key("num_experts_per_tok", "moe.experts_per_token", 8),
        Key("moe_intermediate_size", "moe.d_expert", 768),
        Key("norm_topk_prob", "moe.normalize_weights", False),
        Key("router_aux_loss_coef", "moe.balance_loss", 0.001),
    ),
    fixed={
        **_NO_BIAS,
        "use_sliding_window": (False,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
    },
    ours={**_ROTARY, "qk_norm": True},
    rows=(
        *_EDGES, *_ATTENTION, *_QK_NORM, *_PRE_NORM,
        Row("layers.experts.router", f"{_L}.mlp.gate.weight", "e d"),
        Row("layers.experts.gate", f"{_L}.mlp.experts.{{e}}.gate_proj.weight", "f d"),
        Row("layers.experts.up", f"{_L}.mlp.experts.{{e}}.up_proj.weight", "f d"),
        Row("layers.experts.down", f"{_L}.mlp.experts.{{e}}.down_proj.weight", "d f"),
    ),
    prefix="model.",
    parts=(rope(10_000.0),),
    ties=_HEAD,
    buffers=_FREQUENCIES,
)  # fmt: skip

OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    keys=(*_keys(50304, 2048, 4096, 11008, 32, 32, eps=1e-5), _kv_heads(None), _SILU),
    fixed=_NO_BIAS,
    ours={**_ROTARY, "qk_norm": True, "qk_norm_over": "projection", "norm_placement": "output"},
    rows=(
        *_EDGES, *_ATTENTION, *_MLP,
        Row("layers.attention.query_norm.gain", f"{_L}.self_attn.q_norm.weight", "h"),
        Row("layers.attention.key_norm.gain", f"{_L}.self_attn.k_norm.weight", "g"),
        Row("layers.attention_out_norm.gain", f"{_L}.post_attention_layernorm.weight", "d"),
        Row("layers.feed_forward_out_norm.gain", f"{_L}.post_feedforward_layernorm.weight", "d"),
    ),
    prefix="model.",
    parts=(rope(10_000.0),),
    ties=_HEAD,
    buffers=_FREQUENCIES,
)  # fmt: skip

# ------------------------------------------------------------------------------------------- Gemma

_GEMMA_ROWS = (
    _EDGES[0],
    Row("norm.gain", "model.norm.weight", "d", add=1.0),  # gains are stored as 1 + w
    _EDGES[2],
    *_ATTENTION,
    *_MLP,
    Row("layers.attention.query_norm.gain", f"{_L}.self_attn.q_norm.weight", "k", add=1.0),
    Row("layers.attention.key_norm.gain", f"{_L}.self_attn.k_norm.weight", "k", add=1.0),
    Row("layers.attention_norm.gain", f"{_L}.input_layernorm.weight", "d", add=1.0),
    Row("layers.attention_out_norm.gain", f"{_L}.post_attention_layernorm.weight", "d", add=1.0),
    Row("layers.feed_forward_norm.gain", f"{_L}.pre_feedforward_layernorm.weight", "d", add=1.0),
    Row(
        "layers.feed_forward_out_norm.gain", f"{_L}.post_feedforward_layernorm.weight", "d", add=1.0
    ),
)
_GEMMA = {**_ROTARY, "norm_placement": "both", "scale_embeddings": True}
_GELU = Key("hidden_activation", "activation", "gelu_pytorch_tanh", values=GEGLU)

GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    keys=(
        *_keys(256000, 8192, 2304, 9216, 26, 8, eps=1e-6, tied=True, d_head=256),
        _kv_heads(4),
        _GELU,
        Key("attn_logit_softcapping", "attention_soft_cap", 50.0),
        Key("final_logit_softcapping", "final_soft_cap", 30.0),
    ),
    fixed={**_NO_BIAS, "use_bidirectional_attention": (None, False)},
    ours=_GEMMA,
    rows=_GEMMA_ROWS,
    prefix="model.",
    parts=(rope(10_000.0), local_layers(2), QUERY_SCALE),
    ties=_HEAD,
    buffers=_FREQUENCIES,
)

GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    keys=(
        *_keys(262208, 131072, 2304, 9216, 26, 8, eps=1e-6, tied=True, d_head=256),
        _kv_heads(4),
        _GELU,
        Key("attn_logit_softcapping", "attention_soft_cap", None),
        Key("final_logit_softcapping", "final_soft_cap", None),
    ),
    fixed={**_NO_BIAS, "use_bidirectional_attention": (False, None)},
    ours={**_GEMMA, "qk_norm": True},
    rows=_GEMMA_ROWS,
    prefix="model.",
    parts=(TWO_ROPES, local_layers(6, "_sliding_window_pattern"), QUERY_SCALE),
    ties=_HEAD,
    buffers=_FREQUENCIES,
)
