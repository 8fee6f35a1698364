"""A decoder in float64 numpy, forward and backward by hand, and AdamW: what jaxlm is held against.

Written from the papers' formulas; it shares nothing with jaxlm but the names of config fields and
of parameters. Each operation returns its output and a function from the gradient of the output to
that of the input; gradients of parameters are collected in a dict like the parameters.
"""

import numpy as np
from scipy import special

# ------------------------------------------------------------------------------------- operations


def affine(x, name, p, grads, n_in=1, bias=None):
    """x · W + b over the last `n_in` axes of x and the first `n_in` of W."""
    w, lead = p[name], x.ndim - n_in
    y = np.tensordot(x, w, n_in)
    if bias in p:
        y = y + p[bias]

    def back(dy):
        rows = tuple(range(lead))
        grads[name] = np.tensordot(x, dy, (rows, rows))
        if bias in p:
            grads[bias] = dy.sum(rows)
        out = w.ndim - n_in
        return np.tensordot(dy, w, (range(lead, lead + out), range(n_in, n_in + out)))

    return y, back


def norm(x, p, grads, centred):
    """LayerNorm (Ba et al. 2016, eq. 4) if `centred`, else RMSNorm (Zhang & Sennrich 2019)."""
    shifted = x - x.mean(-1, keepdims=True) if centred else x
    sigma = np.sqrt((shifted**2).mean(-1, keepdims=True) + 1e-5)
    unit = shifted / sigma
    y = unit * p["gain"] + p.get("bias", 0.0)

    def back(dy):
        rows = tuple(range(x.ndim - 1))
        grads["gain"] = (dy * unit).sum(rows)
        if "bias" in p:
            grads["bias"] = dy.sum(rows)
        dunit = dy * p["gain"]
        dx = dunit - unit * (dunit * unit).mean(-1, keepdims=True)
        return (dx - dunit.mean(-1, keepdims=True) if centred else dx) / sigma

    return y, back


def rotary(x, positions, theta, share=1.0):
    """Su et al. 2021, eq. 13, as a rotation of complex numbers x[i] + √-1 · x[i + k/2], of
    the first `share` of a head."""
    width = int(x.shape[-1] * share)
    half = width // 2
    frequency = theta ** (-2.0 * np.arange(half) / width)
    turn = np.exp(1j * positions[:, :, None, None] * frequency)

    def rotated(x, turn):
        z = (x[..., :half] + 1j * x[..., half:width]) * turn
        return np.concatenate([z.real, z.imag, x[..., width:]], -1)

    return rotated(x, turn), lambda dy: rotated(dy, turn.conj())


def attention(q, k, v, segments, window=None, cap=None, scale=None):
    """Vaswani et al. 2017, eq. 1, row by row and head by head; query head h reads key head
    h // (heads / kv heads); a query sees no later key, none `window` tokens back or more, and no
    other document. `cap`: scores s become cap · tanh(s / cap) (Gemma 2)."""
    b, t, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    back_in_time = np.arange(t)[:, None] - np.arange(t)
    slope = np.ones((b, heads, t, t))
    group = heads // k.shape[2]
    y, probabilities = np.zeros_like(q), np.zeros((b, heads, t, t))
    for i in range(b):
        allowed = np.tril(segments[i][:, None] == segments[i][None, :])
        allowed &= back_in_time < (t if window is None else window)
        for h in range(heads):
            score = q[i, :, h] @ k[i, :, h // group].T * scale
            if cap is not None:
                score = cap * np.tanh(score / cap)
                slope[i, h] = 1 - (score / cap) ** 2
            e = np.where(allowed, np.exp(score - score.max(-1, keepdims=True)), 0.0)
            probabilities[i, h] = e / e.sum(-1, keepdims=True)
            y[i, :, h] = probabilities[i, h] @ v[i, :, h // group]

    def back(dy):
        dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
        for i in range(b):
            for h in range(heads):
                p, g = probabilities[i, h], h // group
                dp = dy[i, :, h] @ v[i, :, g].T
                dscore = p * (dp - (dp * p).sum(-1, keepdims=True)) * slope[i, h] * scale
                dq[i, :, h] = dscore @ k[i, :, g]
                dk[i, :, g] += dscore.T @ q[i, :, h]
                dv[i, :, g] += p.T @ dy[i, :, h]
        return dq, dk, dv

    return y, back


def gelu(x):
    """Hendrycks & Gimpel 2016, §2: 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    c = np.sqrt(2 / np.pi)
    tanh = np.tanh(c * (x + 0.044715 * x**3))
    slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * c * (1 + 3 * 0.044715 * x**2)
    return 0.5 * x * (1 + tanh), lambda dy: dy * slope


def gelu_exact(x):
    """x Φ(x), Hendrycks & Gimpel 2016, §2."""
    phi = 0.5 * (1 + special.erf(x / np.sqrt(2)))
    slope = phi + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    return x * phi, lambda dy: dy * slope


def relu2(x):
    """So et al. 2021 (Primer)."""
    return np.maximum(x, 0) ** 2, lambda dy: dy * 2 * np.maximum(x, 0)


def relu(x):
    return np.maximum(x, 0), lambda dy: dy * (x > 0)


def silu(x):
    s = 1 / (1 + np.exp(-x))
    return x * s, lambda dy: dy * (s + x * s * (1 - s))


# -------------------------------------------------------------------------------------- the model


def self_attention(m, x, p, grads, positions, segments, local=False):
    q, q_back = affine(x, "query", p, grads, bias="query_bias")
    k, k_back = affine(x, "key", p, grads, bias="key_bias")
    v, v_back = affine(x, "value", p, grads, bias="value_bias")
    turns = [q_back], [k_back]
    if m.qk_norm:
        centred = m.norm == "layernorm"
        over_all = m.qk_norm_over == "projection"
        q, back = head_norm(q, p, grads, "query_norm", centred, over_all)
        turns[0].append(back)
        k, back = head_norm(k, p, grads, "key_norm", centred, over_all)
        turns[1].append(back)
    if m.positions == "rope":
        theta = m.local_rope_theta if local and m.local_rope_theta else m.rope_theta
        q, back = rotary(q, positions, theta, m.rope_fraction)
        turns[0].append(back)
        k, back = rotary(k, positions, theta, m.rope_fraction)
        turns[1].append(back)
    window = m.sliding_window if local else None
    cap, scale = m.attention_soft_cap, m.attention_scale
    y, attention_back = attention(q, k, v, segments, window, cap, scale)
    y, out_back = affine(y, "out", p, grads, n_in=2, bias="out_bias")

    def back(dy):
        dq, dk, dv = attention_back(out_back(dy))
        for q_turn in reversed(turns[0]):
            dq = q_turn(dq)
        for k_turn in reversed(turns[1]):
            dk = k_turn(dk)
        return dq + dk + v_back(dv)

    return y, back


def head_norm(x, p, grads, name, centred, over_all):
    """Over each head by itself, or over all of them together (OLMo 2)."""
    flat_x = x.reshape(*x.shape[:2], -1) if over_all else x
    y, back = norm(flat_x, p[name], grads.setdefault(name, {}), centred)
    return y.reshape(x.shape), lambda dy: back(dy.reshape(flat_x.shape)).reshape(x.shape)


PLAIN = {"gelu": gelu, "gelu_exact": gelu_exact, "relu": relu, "relu2": relu2}


def feed_forward(m, x, p, grads):
    up, up_back = affine(x, "up", p, grads, bias="up_bias")
    if m.activation in ("swiglu", "geglu"):  # Shazeer 2020, eq. 6
        gate, gate_back = affine(x, "gate", p, grads)
        open_, silu_back = (silu if m.activation == "swiglu" else gelu)(gate)
        y, down_back = affine(open_ * up, "down", p, grads, bias="down_bias")

        def back(dy):
            dh = down_back(dy)
            return up_back(dh * open_) + gate_back(silu_back(dh * up))
    else:
        h, gelu_back = PLAIN[m.activation](up)
        y, down_back = affine(h, "down", p, grads, bias="down_bias")

        def back(dy):
            return up_back(gelu_back(down_back(dy)))

    return y, back


def sub_layer(x, p, grads, name, centred, f):
    """f between the norms that there are: before it, behind it."""

    def maybe(x, name):
        if name not in p:
            return x, lambda dy: dy
        return norm(x, p[name], grads.setdefault(name, {}), centred)

    pre, norm_back = maybe(x, f"{name}_norm")
    y, back = f(pre, p[name], grads.setdefault(name, {}))
    y, out_back = maybe(y, f"{name}_out_norm")
    return y, lambda dy: norm_back(back(out_back(dy)))


def block(m, x, p, grads, positions, segments, local=False):
    """x + attention(x), then x + feed_forward(x), or both of the same x (GPT-NeoX)."""
    centred = m.norm == "layernorm"
    y, attention_back = sub_layer(
        x, p, grads, "attention", centred,
        lambda x, p, grads: self_attention(m, x, p, grads, positions, segments, local),
    )  # fmt: skip
    z, back = sub_layer(
        x if m.parallel_residual else x + y, p, grads, "feed_forward", centred,
        lambda x, p, grads: feed_forward(m, x, p, grads),
    )  # fmt: skip

    def whole_back(dout):
        if m.parallel_residual:
            return dout + back(dout) + attention_back(dout)
        dx = dout + back(dout)
        return dx + attention_back(dx)

    return x + y + z, whole_back


def model(m, params, tokens, positions, segments):
    """Logits [b, t, v], and a function from their gradient to that of the parameters."""
    p = to_float64(params)
    grads, layer_grads = {"norm": {}}, [{} for _ in range(m.n_layers)]
    enlarged = m.d_model**0.5 if m.scale_embeddings else 1.0
    x = enlarged * p["embedding"][tokens]
    if m.positions == "learned":
        x = x + p["positions"][positions]
    backs = []
    for i in range(m.n_layers):
        x, back = block(
            m, x, layer(p["layers"], i), layer_grads[i], positions, segments, m.local[i]
        )
        backs.append(back)
    x, norm_back = norm(x, p["norm"], grads["norm"], m.norm == "layernorm")
    out = p["embedding" if m.tie_embeddings else "unembedding"]
    mup = m.parametrization == "mup" and m.tie_embeddings
    scale = m.base_d_model / m.d_model if mup else 1.0

    def gradients(dlogits):
        if cap is not None:
            dlogits = dlogits * (1 - (logits / cap) ** 2)
        d_out = scale * np.einsum("btv,btd->vd", dlogits, x)
        dx = norm_back(scale * dlogits @ out)
        for back in reversed(backs):
            dx = back(dx)
        grads["layers"] = stack(layer_grads)
        grads["embedding"] = np.zeros_like(p["embedding"])
        np.add.at(grads["embedding"], tokens, enlarged * dx)
        if m.tie_embeddings:
            grads["embedding"] += d_out
        else:
            grads["unembedding"] = d_out
        if m.positions == "learned":
            grads["positions"] = np.zeros_like(p["positions"])
            np.add.at(grads["positions"], positions, dx)
        return grads

    logits, cap = scale * x @ out.T, m.final_soft_cap
    if cap is not None:
        logits = cap * np.tanh(logits / cap)
    return logits, gradients


def loss_and_gradients(m, params, batch, z_loss=0.0):
    """Mean cross-entropy over token weights plus z_loss · log(Z)² (PaLM, Chowdhery et al. 2022,
    §5), the logits, and the gradients of the parameters."""
    logits, gradients = model(m, params, batch.tokens, batch.positions, batch.segment_ids)
    weights = np.asarray(batch.weights, np.float64) / max(np.sum(batch.weights), 1.0)
    top = logits.max(-1, keepdims=True)
    log_z = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
    target = np.take_along_axis(logits, batch.targets[..., None], -1)
    loss = (weights[..., None] * (log_z - target + z_loss * log_z**2)).sum()
    softmax = np.exp(logits - log_z)
    one_hot = np.eye(logits.shape[-1])[batch.targets]
    dlogits = weights[..., None] * (softmax * (1 + 2 * z_loss * log_z) - one_hot)
    return loss, logits, gradients(dlogits)


# ---------------------------------------------------------------------------------- the optimizer


def factor(o, steps, step):
    """Learning rate of update `step` (0 first) as a share of the peak, from the names alone."""
    warmup = round(o.warmup_fraction * steps)
    decay = max(1, min(round(o.decay_fraction * steps), steps - warmup))
    if step < warmup:
        return (step + 1) / warmup
    done, low = (step - warmup) / max(steps - warmup, 1), o.final_fraction
    if o.schedule == "constant":
        return 1.0
    if o.schedule == "linear":
        return 1 + done * (low - 1)
    if o.schedule == "cosine":  # Loshchilov & Hutter 2017, eq. 5
        return low + (1 - low) * (1 + np.cos(np.pi * done)) / 2
    assert o.schedule == "wsd"
    return 1.0 if steps - step > decay else low + (1 - low) * (steps - step) / decay


MATRICES = {"query", "key", "value", "out", "up", "gate", "down", "unembedding"}


class AdamW:
    """Loshchilov & Hutter 2019, algorithm 2, its λ times the learning rate as in PyTorch; gradients
    clipped to a global norm (Pascanu et al. 2013); matrices decay and are scaled by 1/width under
    muP (Yang et al. 2022, table 3)."""

    def __init__(self, config):
        self.config, self.step, self.m, self.v = config, 0, {}, {}

    def update(self, params, grads):
        o, shape = self.config.optimizer, self.config.model
        params, grads = flat(to_float64(params)), flat(to_float64(grads))
        length = np.sqrt(sum((g**2).sum() for g in grads.values()))
        clip = o.grad_clip / length if 0 < o.grad_clip < length else 1.0
        rate = o.learning_rate * factor(o, self.config.train.steps, self.step)
        self.step += 1
        new = {}
        for path, w in params.items():
            g, zero = clip * grads[path], np.zeros_like(w)
            self.m[path] = o.b1 * self.m.get(path, zero) + (1 - o.b1) * g
            self.v[path] = o.b2 * self.v.get(path, zero) + (1 - o.b2) * g**2
            m_hat = self.m[path] / (1 - o.b1**self.step)
            v_hat = self.v[path] / (1 - o.b2**self.step)
            step = m_hat / (np.sqrt(v_hat) + o.eps)
            if path[-1] in MATRICES:
                if shape.parametrization == "mup":
                    step = step * shape.base_d_model / shape.d_model
                step = step + o.weight_decay * w
            new[path] = w - rate * step
        return unflat(new)


# ------------------------------------------------------------------------------------ nested dicts


def flat(tree, path=()):
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for name in tree for k, v in flat(tree[name], (*path, name)).items()}


def unflat(leaves):
    tree = {}
    for path, x in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = x
    return tree


def to_float64(tree):
    return unflat({path: np.asarray(x, np.float64) for path, x in flat(tree).items()})


def layer(tree, i):
    return unflat({path: x[i] for path, x in flat(tree).items()})


def stack(trees):
    leaves = [flat(tree) for tree in trees]
    return unflat({path: np.stack([tree[path] for tree in leaves]) for path in leaves[0]})
