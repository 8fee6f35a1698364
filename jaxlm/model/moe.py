"""A mixture of experts: a router sends each token through a few feed-forward layers of many.

Dropless: tokens are sorted by expert and each expert's run is multiplied by its own matrices
(`jax.lax.ragged_dot`), so that no token is left out and nothing is padded. Each device sorts its
own tokens. Shape suffixes besides those of `layers`: e experts, c the chosen experts of a token,
m all choices of one device's tokens, f the width of an expert.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.config import ModelConfig
from jaxlm.mesh import spec
from jaxlm.model.parts import activated, declare, use
from jaxlm.model_config import GATED

Sums = dict[str, jax.Array]


class Experts(nnx.Module):
    """Top-k experts per token (Shazeer et al. 2017), weighted by the router's softmax, and shared
    ones that see every token (Dai et al. 2024)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config, moe = config, config.moe
        d, e, f = config.d_model, moe.n_experts, config.expert_dim
        active = moe.experts_per_token / e
        residual = (2 * config.n_layers) ** -0.5
        wide, back = ("experts", "d_model", "d_ff"), ("experts", "d_ff", "d_model")
        gated = config.activation in GATED
        self.router = declare(rngs, (d, e), ("d_model", "experts"), "hidden", d**-0.5)
        self.up = declare(rngs, (e, d, f), wide, "hidden", d**-0.5, active)
        self.gate = declare(rngs, (e, d, f), wide, "hidden", d**-0.5, active) if gated else None
        self.down = declare(rngs, (e, f, d), back, "hidden", f**-0.5 * residual, active)

    def __call__(self, x_btd: jax.Array, segments_bt: jax.Array) -> tuple[jax.Array, Sums]:
        logits_bte = jnp.einsum(
            "btd,de->bte", x_btd, use(self.router, x_btd), preferred_element_type=jnp.float32
        )
        share_bte = jax.nn.softmax(logits_bte)
        weight_btc, expert_btc = jax.lax.top_k(share_bte, self.config.moe.experts_per_token)
        if self.config.moe.normalize_weights:
            weight_btc = weight_btc / weight_btc.sum(-1, keepdims=True)
        y_btd = self._through(x_btd, weight_btc.astype(x_btd.dtype), expert_btc)
        return y_btd, router_sums(logits_bte, expert_btc, segments_bt)

    def _through(self, x_btd: jax.Array, weight_btc: jax.Array, expert_btc: jax.Array) -> jax.Array:
        """Σ weight · expert(x) over each token's experts."""
        rows, cut = spec(("batch", None, None)), spec(("experts", "d_model", "d_ff"), gathered=True)
        cut_down = spec(("experts", "d_ff", "d_model"), gathered=True)
        kind, whole = self.config.activation, spec(("d_ff",))[0]
        matrices = [use(w, x_btd) for w in (self.up, self.gate, self.down) if w is not None]

        def local(x_btd: jax.Array, weight_btc: jax.Array, expert_btc: jax.Array, *w: jax.Array):
            b, t, c = expert_btc.shape
            order = jnp.argsort(expert_btc.reshape(-1))  # stable: by expert, then by token
            sizes_e = jnp.bincount(expert_btc.reshape(-1), length=w[0].shape[0])
            x_md = x_btd.reshape(b * t, -1)[order // c]
            up_mf = jax.lax.ragged_dot(x_md, w[0], sizes_e)
            gate_mf = jax.lax.ragged_dot(x_md, w[1], sizes_e) if len(w) == 3 else None
            y_md = jax.lax.ragged_dot(activated(kind, up_mf, gate_mf), w[-1], sizes_e)
            y_md = y_md * weight_btc.reshape(-1)[order][:, None]
            y_nd = jnp.zeros((b * t, x_md.shape[-1]), y_md.dtype).at[order // c].add(y_md)
            return jax.lax.psum(y_nd.reshape(x_btd.shape), whole)

        in_specs = (rows, rows, rows, *[cut] * (len(matrices) - 1), cut_down)
        run = jax.shard_map(local, in_specs=in_specs, out_specs=rows)
        return run(x_btd, weight_btc, expert_btc, *matrices)


def router_sums(logits_bte: jax.Array, expert_btc: jax.Array, segments_bt: jax.Array) -> Sums:
    """Of one layer, over the tokens that are not padding (segment 0):

    moe/balance: e · Σ_e load · probability, 1 where both are uniform (Fedus et al. 2022, eq. 4);
    moe/router_z: the mean of log²Σexp of the logits (Zoph et al. 2022, eq. 5);
    moe/max_load: the largest share of the tokens · e, 1 where uniform, e where all go to one.
    """
    e, c = logits_bte.shape[-1], expert_btc.shape[-1]
    real_bt = (segments_bt != 0).astype(jnp.float32)
    tokens = jnp.maximum(real_bt.sum(), 1.0)
    hit_bte = (expert_btc[..., None] == jnp.arange(e)).sum(-2, dtype=jnp.float32)
    load_e = jnp.einsum("bte,bt->e", hit_bte, real_bt, out_sharding=spec((None,))) / (c * tokens)
    share_bte = jax.nn.softmax(logits_bte)
    share_e = jnp.einsum("bte,bt->e", share_bte, real_bt, out_sharding=spec((None,))) / tokens
    z_bt = jnp.square(jax.nn.logsumexp(logits_bte, axis=-1))
    return {
        "moe/balance": e * (load_e * share_e).sum(),
        "moe/router_z": (z_bt * real_bt).sum() / tokens,
        "moe/max_load": e * load_e.max(),
    }
