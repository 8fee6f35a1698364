"""Counts and FLOPs read off the table of parameters, and learning-rate multipliers by role.

Conventions, stated wherever a number is shown: `params` is everything; `params_non_embedding`
leaves out every embedding and unembedding (Kaplan et al. 2020); `params_effective` is
flops_per_token / 6, so that C = 6·N·D holds exactly, unembedding and attention included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from jaxlm.config import ModelConfig
from jaxlm.model.stacks import block_class
from jaxlm.model.transformer import Declared, table

MATRICES = ("hidden", "unembedding")


@dataclass(frozen=True)
class Size:
    """What a model counts."""

    params: int
    params_non_embedding: int
    flops_per_token: int  # training: forward and backward

    @property
    def params_effective(self) -> float:
        return self.flops_per_token / 6


def size(config: ModelConfig) -> Size:
    """Parameters and training FLOPs per token.

    FLOPs: 6 per matmul weight (2 forward, 4 backward; Kaplan et al. 2020 §2.1), of experts those
    that a token goes through, the unembedding also when tied, plus attention's scores and values,
    12·n_layers·n_heads·d_head·seq_len, counted over the full square (Hoffmann et al. 2022 appendix
    F): neither the causal half nor what a sliding window hides is taken off.

    Of an encoder–decoder it is the work on a row, `seq_len` tokens in the encoder and `target_len`
    in the decoder, divided by `seq_len`. An own layer counts its 'hidden' parameters (`active`
    tells how much of one a token uses) and attention's scores, or instead of these what its
    `other_flops(config)` says: more FLOPs per token of one layer, forward and backward.
    """
    rows = nnx.traversals.flatten_mapping(table(config))
    params = sum(math.prod(r.shape) for r in rows.values())
    embeddings = ("embedding", "unembedding")
    embedding = sum(math.prod(r.shape) for r in rows.values() if r.role in embeddings)
    both = config.architecture == "encoder_decoder"
    s, t = config.seq_len, config.decoder_len
    of_row = 6 * t * config.vocab_size * config.d_model
    for path, row in rows.items():
        reads_source = "encoder" in path or path[-2:] in _OF_SOURCE
        tokens = s if reads_source or not both else t
        if row.role == "hidden":
            of_row += round(6 * tokens * math.prod(row.shape) * row.active)
    of_row += config.n_layers * t * _other_flops(config)
    if both:
        pairs = config.encoder_layers * s * s + config.n_layers * s * t
        of_row += 12 * config.n_heads * config.head_dim * pairs
    return Size(params, params - embedding, of_row // s)


# Cross-attention's matrices that are applied to the encoder's tokens.
_OF_SOURCE = (("cross_attention", "key"), ("cross_attention", "value"))


def _other_flops(config: ModelConfig) -> int:
    """Per token and layer, besides those of matrices."""
    own = getattr(block_class(config), "other_flops", None)
    if own is not None:
        return own(config)
    return 12 * config.n_heads * config.head_dim * config.decoder_len


# What a residual branch ends in: the parameters that carry CompleteP's branch multiplier.
_BRANCH_ENDS = ("out", "down", "out_bias", "down_bias")


def learning_rate_multipliers(
    config: ModelConfig, hidden_power: float = 1.0, rows: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A tree like params, or like another table `rows`. muP for Adam (Yang et al. 2022, table 3):
    matrices that grow in both directions, and the output, go as 1/width (hidden ones to
    `hidden_power`); all else as 1.

    CompleteP (Dey et al. 2025, table 1, alpha = 1) also multiplies residual branches by 1/depth.
    Here their last matrices and biases carry the multiplier, in their scale at the start and, as
    Adam and Muon move by steps of a given size, in their learning rates: the same function.
    """

    def multiplier(path: tuple[Any, ...], row: Declared) -> float:
        width = config.width_shrinks if row.role in MATRICES else 1.0
        width = width**hidden_power if row.role == "hidden" else width
        return width * (config.branch_shrinks if path[-1].key in _BRANCH_ENDS else 1.0)

    rows = table(config) if rows is None else rows
    return jax.tree_util.tree_map_with_path(
        multiplier, rows, is_leaf=lambda x: isinstance(x, Declared)
    )


def by_role(
    config: ModelConfig, roles: tuple[str, ...], rows: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A tree of bools like params, or like another table `rows`: whose role is one of `roles`."""
    rows = table(config) if rows is None else rows
    return jax.tree.map(
        lambda row: row.role in roles, rows, is_leaf=lambda x: isinstance(x, Declared)
    )
