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

from jaxlm.config import ModelConfig
from jaxlm.model.transformer import Declared, table

MATRICES = ("hidden", "unembedding")


def _rows(config: ModelConfig) -> list[Declared]:
    return jax.tree.leaves(table(config), is_leaf=lambda x: isinstance(x, Declared))


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

    FLOPs: 6 per matmul weight (2 forward, 4 backward; Kaplan et al. 2020 §2.1), the unembedding
    also when tied, plus attention's scores and values, 12·n_layers·n_heads·d_head·seq_len, counted
    over the full square (Hoffmann et al. 2022 appendix F; the causal half is not taken off). An own
    layer counts its 'hidden' parameters.
    """
    rows = _rows(config)
    params = sum(math.prod(r.shape) for r in rows)
    embedding = sum(math.prod(r.shape) for r in rows if r.role in ("embedding", "unembedding"))
    hidden = sum(round(math.prod(r.shape) * r.active) for r in rows if r.role == "hidden")
    output = config.vocab_size * config.d_model
    scores = 12 * config.n_layers * config.n_heads * config.head_dim * config.seq_len
    return Size(params, params - embedding, 6 * (hidden + output) + scores)


def learning_rate_multipliers(config: ModelConfig) -> dict[str, Any]:
    """A tree like params. muP for Adam (Yang et al. 2022, table 3): matrices that grow in both
    directions, and the output, go as 1/width; embeddings, gains and biases as 1."""
    shrink = config.base_d_model / config.d_model if config.parametrization == "mup" else 1.0

    def multiplier(row: Declared) -> float:
        return shrink if row.role in MATRICES else 1.0

    return jax.tree.map(multiplier, table(config), is_leaf=lambda x: isinstance(x, Declared))


def by_role(config: ModelConfig, roles: tuple[str, ...]) -> dict[str, Any]:
    """A tree of bools like params: whose role is one of `roles`."""
    return jax.tree.map(
        lambda row: row.role in roles, table(config), is_leaf=lambda x: isinstance(x, Declared)
    )
