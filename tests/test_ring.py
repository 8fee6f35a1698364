"""Attention over sequences that are cut up against full attention in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from jaxlm.model import attention, ring

B, T, HEADS, GROUPS, K = 2, 64, 4, 2, 8


def full(q, k, v, segments, causal, window, dy):
    """Output [b, t, h, k] and the gradients of its product with `dy`; all float64, the whole square
    of scores at once."""
    k, v = (np.repeat(x, HEADS // GROUPS, axis=2) for x in (k, v))
    back = np.arange(T)[:, None] - np.arange(T)[None, :]
    seen = segments[:, None, :, None] == segments[:, None, None, :]
    seen = seen & (back >= 0 if causal else True) & (back < (window or T))
    scores = np.where(seen, np.einsum("bthk,bshk->bhts", q, k) * K**-0.5, -np.inf)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    dv, d_share = np.einsum("bhts,bthk->bshk", share, dy), np.einsum("bthk,bshk->bhts", dy, v)
    d_scores = share * (d_share - (d_share * share).sum(-1, keepdims=True)) * K**-0.5
    dq, dk = np.einsum("bhts,bshk->bthk", d_scores, k), np.einsum("bhts,bthk->bshk", d_scores, q)
    dk, dv = (x.reshape(B, T, GROUPS, -1, K).sum(3) for x in (dk, dv))
    return np.einsum("bhts,bshk->bthk", share, v), dq, dk, dv


@pytest.mark.parametrize(
    "causal, window, axes",
    [(True, None, {"context": 8}), (True, 20, {"context": 4, "tensor": 2}),
     (False, None, {"context": 2, "data": 2})],
)  # fmt: skip
def test_a_ring_is_full_attention_of_packed_documents(causal, window, axes):
    rng = np.random.default_rng(0)
    q, dy = rng.normal(size=(2, B, T, HEADS, K))
    k, v = rng.normal(size=(2, B, T, GROUPS, K))
    segments = np.cumsum(rng.random((B, T)) < 0.08, axis=1).astype(np.int32)
    sizes = {axis: axes.get(axis, 1) for axis in ("data", "fsdp", "tensor", "context")}
    config = small.config({"n_heads": 2, "seq_len": T}, sizes=tuple(sizes.values()))
    with small.on_mesh(config):
        # A causal stack runs in zig-zag order.
        there, back = (ring.to_zigzag, ring.from_zigzag) if causal else (lambda x: x,) * 2

        def attended(q, k, v):
            ids = there(jnp.asarray(segments))
            qkv = map(there, (q, k, v))
            return back(attention.attend(*qkv, ids, ids, causal=causal, window=window))

        def found(q, k, v, dy):
            y, gradients = jax.vjp(attended, q, k, v)
            return y, *gradients(jax.reshard(dy, jax.typeof(y).sharding))

        got = jax.device_get(jax.jit(found)(*(jnp.asarray(x, jnp.float32) for x in (q, k, v, dy))))
    expected = full(q, k, v, segments, causal, window, dy)
    for name, a, b in zip(("y", "dq", "dk", "dv"), got, expected, strict=True):
        assert np.abs(a - b).max() < 1e-5, name
