"""ModelConfig: shape and variant of a Transformer, and what makes one valid. Knows nothing of jax.

docs/models.md says which published family is which fields; `model/presets.py` has them ready.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from jaxlm.schema import doc, part

GATED = ("swiglu", "geglu")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that a model was trained on."""

    kind: Literal["none", "linear", "ntk", "yarn", "llama3"] = doc("none", "which rule stretches")
    factor: float = doc(1.0, "by how much the context grew")
    original_seq_len: int = doc(8192, "yarn, llama3: the length before it grew")
    low_freq_factor: float = doc(1.0, "llama3: rotations in that length below which all stretch")
    high_freq_factor: float = doc(4.0, "llama3: rotations in that length above which none do")
    beta_fast: float = doc(32.0, "yarn: rotations in that length above which none stretch")
    beta_slow: float = doc(1.0, "yarn: rotations in that length below which all stretch")
    attention_factor: float | None = doc(None, "yarn: of cos and sin; None: 0.1 ln(factor) + 1")


@dataclass(frozen=True)
class MoE:
    """Mixture of experts in place of each feed-forward layer."""

    n_experts: int = doc(0, "experts per layer; 0: a dense feed-forward layer")
    experts_per_token: int = doc(2, "experts that a token goes through")
    d_expert: int | None = doc(None, "hidden width of an expert; None: d_ff")
    n_shared_experts: int = doc(0, "experts that every token goes through besides")
    normalize_weights: bool = doc(True, "the chosen experts' probabilities are made to sum to 1")
    balance_loss: float = doc(0.01, "weight of the load-balance loss (1 where load is uniform)")
    router_z_loss: float = doc(0.001, "weight of the router's squared log-sum-exp")


@dataclass(frozen=True)
class ModelConfig:
    """Shape and variant of the Transformer."""

    architecture: Literal["decoder", "encoder", "encoder_decoder"] = doc(
        "decoder", "GPT, BERT or T5: which stacks of blocks there are"
    )
    d_model: int = doc(128, "width of the residual stream")
    n_layers: int = doc(4, "number of blocks (of the decoder, where there are two stacks)")
    n_encoder_layers: int | None = doc(None, "encoder_decoder: blocks of the encoder; None: same")
    n_heads: int = doc(4, "query heads")
    n_kv_heads: int | None = doc(None, "key/value heads (grouped-query attention); None: n_heads")
    d_head: int | None = doc(None, "width of a head; None: d_model // n_heads")
    d_ff: int | None = doc(None, "hidden width of the feed-forward layer; None: 4 * d_model")
    vocab_size: int = doc(256, "number of token ids")
    seq_len: int = doc(128, "tokens per sequence (of the encoder, where there are two stacks)")
    target_len: int | None = doc(None, "encoder_decoder: tokens of the decoder; None: seq_len")
    norm: Literal["rmsnorm", "layernorm"] = doc("rmsnorm", "normalisation")
    norm_eps: float = doc(1e-5, "added to the variance in a norm")
    norm_placement: Literal["pre", "post", "output", "both"] = doc(
        "pre", "x + f(norm(x)), norm(x + f(x)) (BERT), x + norm(f(x)) (OLMo 2), or pre and output"
    )
    parallel_residual: bool = doc(False, "x + attention(…) + feed_forward(…), side by side (NeoX)")
    positions: Literal["rope", "learned", "relative", "none"] = doc("rope", "how positions enter")
    rope_theta: float = doc(10_000.0, "base of the rotary frequencies")
    local_rope_theta: float | None = doc(None, "that of local layers, unscaled; None: the same")
    rope_fraction: float = doc(1.0, "share of a head's width that rotates")
    rope_scaling: RopeScaling = part(RopeScaling)
    relative_buckets: int = doc(32, "relative: distances told apart (T5)")
    relative_distance: int = doc(128, "relative: from here on all distances are one")
    sliding_window: int | None = doc(None, "local layers: tokens seen, oneself included; None: all")
    global_every: int = doc(0, "each n-th layer sees all, the others the window; 0: none does")
    attention_scale: float | None = doc(None, "of the scores; None: 1/sqrt(d_head)")
    attention_soft_cap: float | None = doc(None, "scores s become c·tanh(s/c); None: they do not")
    final_soft_cap: float | None = doc(None, "the same of the logits")
    qk_norm: bool = doc(False, "normalise queries and keys too, as `norm` says")
    qk_norm_over: Literal["head", "projection"] = doc(
        "head", "each head by itself, or all of them together (OLMo 2)"
    )
    activation: Literal["gelu", "gelu_exact", "relu", "relu2", "swiglu", "geglu"] = doc(
        "gelu", "feed-forward non-linearity (gelu, geglu: the tanh form; relu2: squared)"
    )
    bias: bool = doc(False, "biases in linear layers (and in LayerNorm)")
    prefix_attention: bool = doc(False, "tokens of a prompt see each other both ways (prefix LM)")
    moe: MoE = part(MoE)
    dropout: float = doc(0.0, "share dropped of embeddings and of each sub-layer's output")
    tie_embeddings: bool = doc(True, "the unembedding is the embedding's transpose")
    scale_embeddings: bool = doc(False, "embeddings times sqrt(d_model) (Gemma)")
    scale_output: bool = doc(False, "unembedding times 1/sqrt(d_model) (T5, tied)")
    n_token_types: int = doc(0, "kinds of segments with an embedding each (BERT: 2)")
    embedding_norm: bool = doc(False, "a norm after the embeddings (BERT)")
    mlm_head: bool = doc(False, "dense, activation and norm before the unembedding, bias after it")
    pooler: bool = doc(False, "a dense tanh layer on the first token (BERT)")
    n_classes: int = doc(0, "outputs of a classifier; 0: none")
    pooling: Literal["first", "last", "mean", "each"] = doc(
        "first", "the classifier's input: a text's first or last state, their mean, or each token's"
    )
    parametrization: Literal["standard", "mup", "completep"] = doc(
        "standard",
        "mup: hidden learning rates and the output scale as 1/width; completep: and residual"
        " branches as 1/depth",
    )
    base_d_model: int = doc(64, "width at which mup and completep equal standard")
    base_n_layers: int = doc(2, "depth at which completep equals standard")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = doc(
        "auto", "matmul and activation type; auto: float32 on CPU, bfloat16 elsewhere"
    )
    remat: Literal["none", "dots", "full"] = doc("none", "what the backward pass recomputes")
    scan_layers: bool = doc(True, "scan over stacked layers; False unrolls (faster on small CPUs)")
    pipeline_repeats: int = doc(
        1, "mesh.stage: how often the layers go round the stages; 1: GPipe, more: fewer bubbles"
    )
    pipeline_microbatches: int = doc(
        0, "mesh.stage: parts of the rows in the pipeline; 0: four per stage, if the rows divide"
    )
    layer: str = doc("", "own block, 'file.py:Class' (an nnx.Module like model.layers.Block)")

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads if self.n_kv_heads is not None else self.n_heads

    @property
    def head_dim(self) -> int:
        return self.d_head if self.d_head is not None else self.d_model // self.n_heads

    @property
    def ff_dim(self) -> int:
        return self.d_ff if self.d_ff is not None else 4 * self.d_model

    @property
    def expert_dim(self) -> int:
        return self.moe.d_expert if self.moe.d_expert is not None else self.ff_dim

    @property
    def encoder_layers(self) -> int:
        return self.n_encoder_layers if self.n_encoder_layers is not None else self.n_layers

    @property
    def decoder_len(self) -> int:
        return self.target_len if self.target_len is not None else self.seq_len

    @property
    def rotary_dim(self) -> int:
        """How much of a head rotates: its first components."""
        return int(self.head_dim * self.rope_fraction)

    @property
    def local(self) -> tuple[bool, ...]:
        """Of each block, whether it sees only the sliding window."""
        n = self.global_every
        windowed = self.sliding_window is not None
        return tuple(windowed and (n == 0 or (i + 1) % n != 0) for i in range(self.n_layers))

    @property
    def width_shrinks(self) -> float:
        """What muP multiplies the output and hidden learning rates by: 1 at `base_d_model`."""
        return 1.0 if self.parametrization == "standard" else self.base_d_model / self.d_model

    @property
    def branch_shrinks(self) -> float:
        """What CompleteP multiplies a residual branch by (Dey et al. 2025, alpha = 1): 1 at
        `base_n_layers`."""
        return self.base_n_layers / self.n_layers if self.parametrization == "completep" else 1.0

    @property
    def branch_std(self) -> float:
        """Of a branch's last matrix, besides 1/sqrt(inputs): GPT-2's 1/sqrt(2 layers), and under
        CompleteP that of the base depth with the branch's multiplier."""
        fixed = self.parametrization == "completep"
        depth = self.base_n_layers if fixed else self.n_layers
        return self.branch_shrinks / (2 * depth) ** 0.5


# (what is expected, whether a value is that, names of fields)
Ranges = tuple[tuple[str, Callable[[float], bool], str], ...]

RANGES: Ranges = (
    (
        "at least 1",
        lambda x: x >= 1,
        "d_model n_layers n_encoder_layers n_heads n_kv_heads d_head d_ff seq_len target_len"
        " base_d_model base_n_layers relative_distance sliding_window moe.d_expert"
        " moe.experts_per_token rope_scaling.original_seq_len rope_scaling.factor pipeline_repeats",
    ),
    ("at least 2", lambda x: x >= 2, "vocab_size"),
    ("at least 4", lambda x: x >= 4, "relative_buckets"),
    (
        "at least 0",
        lambda x: x >= 0,
        "norm_eps global_every n_token_types n_classes moe.n_experts moe.n_shared_experts"
        " moe.balance_loss moe.router_z_loss pipeline_microbatches",
    ),
    (
        "above 0",
        lambda x: x > 0,
        "rope_theta local_rope_theta attention_scale attention_soft_cap final_soft_cap"
        " rope_scaling.low_freq_factor rope_scaling.high_freq_factor rope_scaling.beta_fast"
        " rope_scaling.beta_slow rope_scaling.attention_factor",
    ),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, "rope_fraction"),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, "dropout"),
)

Need = Callable[[bool, str, Any, str], None]


def check_model(m: ModelConfig, need: Need) -> None:
    """Calls `need(ok, field, value, expected)` for what fields of a model ask of each other."""
    _check_positions(m, need)
    _check_blocks(m, need)


def _check_positions(m: ModelConfig, need: Need) -> None:
    rope, s = m.positions == "rope", m.rope_scaling
    even = m.rotary_dim % 2 == 0 and m.rotary_dim >= 2
    wide = f"an even width for rotary positions (nearest: {m.head_dim + 1})"
    name = "d_head" if m.rope_fraction == 1.0 else "rope_fraction"
    what = wide if name == "d_head" else f"an even part of d_head={m.head_dim}, 2 or more"
    need(not rope or even, name, m.head_dim if name == "d_head" else m.rope_fraction, what)
    need(rope or s.kind == "none", "rope_scaling.kind", s.kind, "'none' unless positions='rope'")
    need(
        s.kind != "llama3" or s.low_freq_factor < s.high_freq_factor,
        "rope_scaling.low_freq_factor",
        s.low_freq_factor,
        f"less than high_freq_factor={s.high_freq_factor:g}",
    )
    need(
        s.kind != "yarn" or s.beta_slow < s.beta_fast,
        "rope_scaling.beta_slow",
        s.beta_slow,
        f"less than beta_fast={s.beta_fast:g}",
    )
    mixed = any(m.local) and not all(m.local)
    need(
        m.local_rope_theta is None or (rope and mixed),
        "local_rope_theta",
        m.local_rope_theta,
        "None unless positions='rope' and some layers are local, some not (global_every)",
    )
    need(
        not m.global_every or m.sliding_window is not None,
        "global_every",
        m.global_every,
        "0 where there is no sliding_window",
    )
    need(
        m.sliding_window is None or m.architecture == "decoder",
        "sliding_window",
        m.sliding_window,
        "None but in a decoder",
    )
    need(
        m.positions != "relative" or m.relative_distance > m.relative_buckets // 2,
        "relative_distance",
        m.relative_distance,
        f"more than relative_buckets / 2 = {m.relative_buckets // 2}",
    )


def _check_blocks(m: ModelConfig, need: Need) -> None:
    encoder, both = m.architecture == "encoder", m.architecture == "encoder_decoder"
    moe = m.moe
    plain = not both and not moe.n_experts and m.norm_placement == "pre" and not m.layer
    need(
        m.parametrization != "completep" or plain,
        "parametrization",
        m.parametrization,
        "standard or mup, for completep is for stacks of pre-norm blocks without experts",
    )
    need(
        not m.parallel_residual or m.norm_placement == "pre",
        "parallel_residual",
        m.parallel_residual,
        "False unless norm_placement='pre'",
    )
    for field in ("n_encoder_layers", "target_len"):
        value = getattr(m, field)
        need(value is None or both, field, value, "None unless architecture='encoder_decoder'")
    need(
        m.positions != "learned" or m.decoder_len <= m.seq_len,
        "target_len",
        m.target_len,
        f"at most seq_len={m.seq_len} with learned positions",
    )
    need(
        not m.prefix_attention or m.architecture == "decoder",
        "prefix_attention",
        m.prefix_attention,
        "False unless architecture='decoder'",
    )
    for field in ("mlm_head", "pooler"):
        value = getattr(m, field)
        need(not value or encoder, field, value, f"{type(value)()} unless architecture='encoder'")
    need(not m.n_classes or not both, "n_classes", m.n_classes, "0 in an encoder_decoder")
    need(
        not moe.n_experts or moe.experts_per_token <= moe.n_experts,
        "moe.experts_per_token",
        moe.experts_per_token,
        f"at most n_experts={moe.n_experts}",
    )
    need(
        not moe.n_experts or not m.bias,
        "bias",
        m.bias,
        "False in a mixture of experts (moe.n_experts)",
    )
    need(
        not m.layer or m.architecture == "decoder",
        "architecture",
        m.architecture,
        "'decoder' with an own layer (model.layer)",
    )
