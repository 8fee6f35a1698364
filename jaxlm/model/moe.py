"""A mixture of experts: a router sends each token through a few feed-forward layers of many.

Dropless: tokens are sorted by expert and each expert's run is multiplied by its own matrices
(`jax.lax.ragged_dot`), so that no token is left out and nothing is padded. Each device sorts its
own tokens. Along the mesh axis `expert` devices have some of the experts each, and tokens travel to
theirs and back (all-to-all). A device may be sent everybody's tokens, so it has room for them all:
the price of dropping none, n times the rows on n devices, of which only the real ones are sent and
multiplied on a TPU. Shape suffixes besides those of `layers`: e experts, c the chosen experts of a
token, m all choices of one device's tokens, n devices along `expert`, f the width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm import mesh
from jaxlm.config import ModelConfig
from jaxlm.mesh import EXPERT, TENSOR, spec
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
        self.router = declare(rngs, (d, e), ("d_model", "routes"), "hidden", d**-0.5)
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
        return y_btd, router_counts(logits_bte, expert_btc, segments_bt)

    def _through(self, x_btd: jax.Array, weight_btc: jax.Array, expert_btc: jax.Array) -> jax.Array:
        """Σ weight · expert(x) over each token's experts."""
        rows = spec(("batch", "seq", None))
        cut = spec(("experts", "d_model", "d_ff"), gathered=True)
        cut_down = spec(("experts", "d_ff", "d_model"), gathered=True)
        kind, e, n = self.config.activation, self.config.moe.n_experts, mesh.size(EXPERT)
        widths_cut = mesh.size(TENSOR) > 1
        matrices = [use(w, x_btd) for w in (self.up, self.gate, self.down) if w is not None]

        def through(x_md: jax.Array, sizes_e: jax.Array, w: tuple[jax.Array, ...]) -> jax.Array:
            """Rows sorted by expert, so many of each, through their expert."""
            up_mf = jax.lax.ragged_dot(x_md, w[0], sizes_e)
            gate_mf = jax.lax.ragged_dot(x_md, w[1], sizes_e) if len(w) == 3 else None
            return jax.lax.ragged_dot(activated(kind, up_mf, gate_mf), w[-1], sizes_e)

        def of_device(
            x_btd: jax.Array, weight_btc: jax.Array, expert_btc: jax.Array, *w: jax.Array
        ) -> jax.Array:
            b, t, c = expert_btc.shape
            order = jnp.argsort(expert_btc.reshape(-1))  # stable: by expert, then by token
            sizes_e = jnp.bincount(expert_btc.reshape(-1), length=e)
            x_md = x_btd.reshape(b * t, -1)[order // c]
            if n == 1:
                y_md = through(x_md, sizes_e, w)
            else:
                y_md = _elsewhere(lambda x_md, sizes_e: through(x_md, sizes_e, w), x_md, sizes_e, n)
            y_md = y_md * weight_btc.reshape(-1)[order][:, None]
            y_nd = jnp.zeros((b * t, x_md.shape[-1]), y_md.dtype).at[order // c].add(y_md)
            y_btd = y_nd.reshape(x_btd.shape)
            return jax.lax.psum(y_btd, TENSOR) if widths_cut else y_btd

        in_specs = (rows, rows, rows, *[cut] * (len(matrices) - 1), cut_down)
        return mesh.local(of_device, in_specs, rows)(x_btd, weight_btc, expert_btc, *matrices)


def _elsewhere(
    through: Callable[[jax.Array, jax.Array], jax.Array],
    x_md: jax.Array,
    sizes_e: jax.Array,
    n: int,
) -> jax.Array:
    """`through` of rows sorted by expert, computed by the devices that have the experts."""
    here = jax.lax.axis_index(EXPERT)
    sizes_nne = jax.lax.all_gather(sizes_e.reshape(n, -1), EXPERT)  # from, to, expert
    sent_nn = sizes_nne.sum(-1)
    start_nn, place_nn = _before(sent_nn, 1), _before(sent_nn, 0)  # at the sender, the receiver
    sent, coming = sent_nn[here], sent_nn[:, here]
    there = Travel(start_nn[here], sent, place_nn[here], coming)
    back = Travel(place_nn[:, here], coming, start_nn[:, here], sent)
    room = jnp.zeros((n * x_md.shape[0], x_md.shape[1]), x_md.dtype)
    arrived_md = _travel(x_md, room, there)
    # They lie by sender and expert. Sorted by expert alone; behind them what is no row.
    sizes_ne = sizes_nne[:, here]
    ends = jnp.cumsum(sizes_ne.reshape(-1))
    run = jnp.searchsorted(ends, jnp.arange(len(room)), side="right")
    order = jnp.argsort(jnp.where(run < ends.size, run % sizes_ne.shape[1], sizes_ne.shape[1]))
    y_md = through(arrived_md[order], sizes_ne.sum(0))
    y_md = jnp.where((jnp.arange(len(room)) < ends[-1])[:, None], y_md, 0)
    y_md = jnp.zeros_like(y_md).at[order].set(y_md)
    return _travel(y_md, jnp.zeros_like(x_md), back)


class Travel(NamedTuple):
    """Of `jax.lax.ragged_all_to_all`: int32 [n] each, per other device."""

    starts: jax.Array  # of the rows for it, here
    sizes: jax.Array  # how many rows
    places: jax.Array  # where they begin there
    coming: jax.Array  # how many rows come from it


def _before(sizes_nn: jax.Array, axis: int) -> jax.Array:
    return jnp.cumsum(sizes_nn, axis) - sizes_nn


def _travel(x_md: jax.Array, room_md: jax.Array, travel: Travel) -> jax.Array:
    """`room_md` with the rows that the other devices have for this one."""
    if mesh.platform() != "cpu":
        travel = Travel(*(a.astype(jnp.int32) for a in travel))
        # Empty, and each device's own: else the sum of its gradients over all devices is computed.
        room_md = jnp.broadcast_to(jax.lax.stop_gradient(0 * x_md[:1]), room_md.shape)
        return jax.lax.ragged_all_to_all(x_md, room_md, *travel, axis_name=EXPERT)
    # XLA:CPU has none: to each device go as many rows as there may be, most of them meaningless.
    at_m = jnp.arange(min(len(x_md), len(room_md)))
    sent_nmd = x_md.at[travel.starts[:, None] + at_m].get(mode="clip")
    came_nmd = jax.lax.all_to_all(sent_nmd, EXPERT, 0, 0)
    starts = jnp.cumsum(travel.coming) - travel.coming
    real = at_m < travel.coming[:, None]
    at_nm = jnp.where(real, starts[:, None] + at_m, len(room_md))
    return room_md.at[at_nm].set(came_nmd, mode="drop")


def router_counts(logits_bte: jax.Array, expert_btc: jax.Array, segments_bt: jax.Array) -> Sums:
    """Of one layer, sums over the tokens that are not padding (segment 0): those of the parts of a
    batch add up, and `router_sums` makes its numbers of them."""
    e, c = logits_bte.shape[-1], expert_btc.shape[-1]
    real_bt = (segments_bt != 0).astype(jnp.float32)
    hit_bte = (expert_btc[..., None] == jnp.arange(e)).sum(-2, dtype=jnp.float32)
    share_bte = jax.nn.softmax(logits_bte)
    z_bt = jnp.square(jax.nn.logsumexp(logits_bte, axis=-1))
    whole = spec((None,))
    return {
        "moe/load": jnp.einsum("bte,bt->e", hit_bte, real_bt, out_sharding=whole),
        "moe/share": jnp.einsum("bte,bt->e", share_bte, real_bt, out_sharding=whole),
        "moe/router_z": (z_bt * real_bt).sum(),
        "moe/tokens": real_bt.sum(),
        "moe/choices": c * real_bt.sum(),
    }


def router_sums(counts: Sums) -> Sums:
    """Of `router_counts`, with any leading axes; what is none of them stays.

    moe/balance: e · Σ_e load · probability, 1 where both are uniform (Fedus et al. 2022, eq. 4);
    moe/router_z: the mean of log²Σexp of the logits (Zoph et al. 2022, eq. 5);
    moe/max_load: the largest share of the tokens · e, 1 where uniform, e where all go to one.
    """
    if "moe/tokens" not in counts:
        return counts
    counts = dict(counts)
    tokens, choices = (jnp.maximum(counts.pop(f"moe/{k}"), 1.0) for k in ("tokens", "choices"))
    load_e, share_e = (counts.pop(f"moe/{k}") for k in ("load", "share"))
    load_e, share_e, e = load_e / choices[..., None], share_e / tokens[..., None], load_e.shape[-1]
    return {
        **counts,
        "moe/balance": e * (load_e * share_e).sum(-1),
        "moe/router_z": counts["moe/router_z"] / tokens,
        "moe/max_load": e * load_e.max(-1),
    }
