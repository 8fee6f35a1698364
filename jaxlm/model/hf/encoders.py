"""BERT (with its heads) and T5: a row says where a parameter of ours lies in theirs."""

from __future__ import annotations

import dataclasses

from jaxlm.config import ModelConfig
from jaxlm.model.hf.family import Family, Json, Key, Part
from jaxlm.model.hf.layout import Row

# -------------------------------------------------------------------------------------------- BERT

_B = "bert.encoder.layer.{l}"

_BERT_ROWS = (
    Row("embedding", "bert.embeddings.word_embeddings.weight", "v d"),
    Row("positions", "bert.embeddings.position_embeddings.weight", "p d"),
    Row("token_types", "bert.embeddings.token_type_embeddings.weight", "t d"),
    Row("embedding_norm.gain", "bert.embeddings.LayerNorm.weight", "d"),
    Row("embedding_norm.bias", "bert.embeddings.LayerNorm.bias", "d"),
    Row("layers.attention.query", f"{_B}.attention.self.query.weight", "(h k) d"),
    Row("layers.attention.query_bias", f"{_B}.attention.self.query.bias", "(h k)"),
    Row("layers.attention.key", f"{_B}.attention.self.key.weight", "(g k) d"),
    Row("layers.attention.key_bias", f"{_B}.attention.self.key.bias", "(g k)"),
    Row("layers.attention.value", f"{_B}.attention.self.value.weight", "(g k) d"),
    Row("layers.attention.value_bias", f"{_B}.attention.self.value.bias", "(g k)"),
    Row("layers.attention.out", f"{_B}.attention.output.dense.weight", "d (h k)"),
    Row("layers.attention.out_bias", f"{_B}.attention.output.dense.bias", "d"),
    Row("layers.attention_out_norm.gain", f"{_B}.attention.output.LayerNorm.weight", "d"),
    Row("layers.attention_out_norm.bias", f"{_B}.attention.output.LayerNorm.bias", "d"),
    Row("layers.feed_forward.up", f"{_B}.intermediate.dense.weight", "f d"),
    Row("layers.feed_forward.up_bias", f"{_B}.intermediate.dense.bias", "f"),
    Row("layers.feed_forward.down", f"{_B}.output.dense.weight", "d f"),
    Row("layers.feed_forward.down_bias", f"{_B}.output.dense.bias", "d"),
    Row("layers.feed_forward_out_norm.gain", f"{_B}.output.LayerNorm.weight", "d"),
    Row("layers.feed_forward_out_norm.bias", f"{_B}.output.LayerNorm.bias", "d"),
    Row("pooler.weight", "bert.pooler.dense.weight", "o d"),
    Row("pooler.bias", "bert.pooler.dense.bias", "o"),
)
_MASKED_ROWS = (
    Row("masked.dense", "cls.predictions.transform.dense.weight", "o d"),
    Row("masked.bias", "cls.predictions.transform.dense.bias", "o"),
    Row("masked.norm.gain", "cls.predictions.transform.LayerNorm.weight", "d"),
    Row("masked.norm.bias", "cls.predictions.transform.LayerNorm.bias", "d"),
    Row("masked.output_bias", "cls.predictions.bias", "v"),
)
_CLASSIFIER_ROWS = (
    Row("classifier.weight", "classifier.weight", "c d"),
    Row("classifier.bias", "classifier.bias", "c"),
)
_IDS = r".*embeddings\.position_ids"


def _read_classes(theirs: Json, where: str) -> Json:
    labels = theirs.get("id2label")
    return {"n_classes": theirs.get("num_labels", 2) if labels is None else len(labels)}


def _write_classes(config: ModelConfig) -> Json:
    names = {str(i): f"LABEL_{i}" for i in range(config.n_classes)}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}


BERT_MASKED = Family(
    model_type="bert",
    architecture="BertForMaskedLM",
    keys=(
        Key("vocab_size", "vocab_size", 30522),
        Key("max_position_embeddings", "seq_len", 512),
        Key("hidden_size", "d_model", 768),
        Key("intermediate_size", "d_ff", 3072),
        Key("num_hidden_layers", "n_layers", 12),
        Key("num_attention_heads", "n_heads", 12),
        Key("layer_norm_eps", "norm_eps", 1e-12),
        Key("type_vocab_size", "n_token_types", 2),
        Key(
            "hidden_act",
            "activation",
            "gelu",
            values=(("gelu", "gelu_exact"), ("gelu_new", "gelu"), ("relu", "relu")),
        ),
    ),
    fixed={
        "tie_word_embeddings": (True,),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    },
    ours={
        "architecture": "encoder",
        "norm": "layernorm",
        "norm_placement": "post",
        "positions": "learned",
        "embedding_norm": True,
        "bias": True,
        "mlm_head": True,
    },
    rows=(*_BERT_ROWS, *_MASKED_ROWS),
    prefix="bert.",
    ties=("cls.predictions.decoder.weight",),
    # published checkpoints hold the next-sentence head, which the masked one does without
    buffers=(_IDS, r"bert\.pooler\..*", r"cls\.seq_relationship\..*", r".*decoder\.bias"),
    older=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
)

BERT_CLASSIFIER = dataclasses.replace(
    BERT_MASKED,
    architecture="BertForSequenceClassification",
    ours={**BERT_MASKED.ours, "mlm_head": False, "pooler": True},
    parts=(Part(_read_classes, _write_classes),),
    rows=(*_BERT_ROWS, *_CLASSIFIER_ROWS),
    ties=(),
    buffers=(_IDS,),
)

BERT = dataclasses.replace(
    BERT_MASKED,
    architecture="BertModel",
    ours={**BERT_MASKED.ours, "mlm_head": False, "pooler": True},
    rows=tuple(
        dataclasses.replace(row, theirs=row.theirs.removeprefix("bert.")) for row in _BERT_ROWS
    ),
    prefix="",
    ties=(),
    buffers=(_IDS,),
)

# ---------------------------------------------------------------------------------------------- T5


def _t5_stack(ours: str, theirs: str, feed_forward: int) -> tuple[Row, ...]:
    """One stack; its feed-forward layer is the `feed_forward`-th of a block's parts. The matrix
    that is alone without a gate and the one beside it have different names."""
    block, self_attention = f"{theirs}.block.{{l}}.layer", "SelfAttention"
    wide = f"{block}.{feed_forward}"
    relative = f"{theirs}.block.0.layer.0.{self_attention}.relative_attention_bias.weight"
    return (
        *_t5_attention(f"{ours}layers.attention", f"{block}.0", self_attention),
        Row(f"{ours}layers.feed_forward_norm.gain", f"{wide}.layer_norm.weight", "d"),
        Row(f"{ours}layers.feed_forward.down", f"{wide}.DenseReluDense.wo.weight", "d f"),
        Row(f"{ours}relative", relative, "b h"),
        Row(f"{ours}norm.gain", f"{theirs}.final_layer_norm.weight", "d"),
    )


def _t5_attention(ours: str, theirs: str, name: str) -> tuple[Row, ...]:
    return (
        Row(f"{ours}_norm.gain", f"{theirs}.layer_norm.weight", "d"),
        Row(f"{ours}.query", f"{theirs}.{name}.q.weight", "(h k) d"),
        Row(f"{ours}.key", f"{theirs}.{name}.k.weight", "(g k) d"),
        Row(f"{ours}.value", f"{theirs}.{name}.v.weight", "(g k) d"),
        Row(f"{ours}.out", f"{theirs}.{name}.o.weight", "d (h k)"),
    )


_T5_ROWS = (
    Row("embedding", "shared.weight", "v d"),
    *_t5_stack("encoder.", "encoder", 1),
    *_t5_stack("", "decoder", 2),
    *_t5_attention("layers.cross_attention", "decoder.block.{l}.layer.1", "EncDecAttention"),
    Row("unembedding", "lm_head.weight", "v d"),
)
_WIDE = (
    ("encoder.", "encoder.block.{l}.layer.1.DenseReluDense"),
    ("", "decoder.block.{l}.layer.2.DenseReluDense"),
)
_ALONE = tuple(Row(f"{o}layers.feed_forward.up", f"{t}.wi.weight", "f d") for o, t in _WIDE)
_GATED = tuple(
    Row(f"{o}layers.feed_forward.{name}", f"{t}.{their}.weight", "f d")
    for o, t in _WIDE
    for name, their in (("gate", "wi_0"), ("up", "wi_1"))
)


def _read_t5(theirs: Json, where: str) -> Json:
    n, tied = theirs.get("num_layers", 6), theirs.get("tie_word_embeddings", True)
    decoder = theirs.get("num_decoder_layers")
    # T5 ties its output to the embedding and scales it, T5 1.1 does neither.
    return {
        "n_encoder_layers": n,
        "n_layers": n if decoder is None else decoder,
        "tie_embeddings": tied,
        "scale_output": tied,
    }


def _write_t5(config: ModelConfig) -> Json:
    return {
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.n_layers,
        "tie_word_embeddings": config.tie_embeddings,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    }


_PROJECTIONS = (("relu", "relu"), ("gelu_new", "gelu"), ("gelu", "gelu_exact"))
_GATED_PROJECTIONS = (("gated-gelu", "geglu"), ("gated-silu", "swiglu"))

T5 = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    keys=(
        Key("vocab_size", "vocab_size", 32128),
        Key("n_positions", "seq_len", 512),
        Key("d_model", "d_model", 512),
        Key("d_ff", "d_ff", 2048),
        Key("d_kv", "d_head", 64),
        Key("num_heads", "n_heads", 8),
        Key("relative_attention_num_buckets", "relative_buckets", 32),
        Key("relative_attention_max_distance", "relative_distance", 128),
        Key("layer_norm_epsilon", "norm_eps", 1e-6),
        Key("feed_forward_proj", "activation", "relu", values=_PROJECTIONS),
    ),
    fixed={"is_decoder": (False,)},
    ours={
        "architecture": "encoder_decoder",
        "positions": "relative",
        "attention_scale": 1.0,
        "bias": False,
    },
    rows=(*_T5_ROWS, *_ALONE),
    prefix="",
    parts=(Part(_read_t5, _write_t5),),
    ties=("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    # an early export held a table that no cross-attention reads
    buffers=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    chosen=("feed_forward_proj", tuple(theirs for theirs, _ in _PROJECTIONS)),
)

T5_GATED = dataclasses.replace(
    T5,
    keys=(
        *T5.keys[:-1],
        Key("feed_forward_proj", "activation", "gated-gelu", values=_GATED_PROJECTIONS),
    ),
    rows=(*_T5_ROWS, *_GATED),
    chosen=("feed_forward_proj", tuple(theirs for theirs, _ in _GATED_PROJECTIONS)),
)
