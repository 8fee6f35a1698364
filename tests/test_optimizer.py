"""Schedules against closed forms, AdamW and clipping against numpy, Muon against an SVD."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import reference
import small
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import OptimizerConfig
from jaxlm.model import transformer
from jaxlm.schema import UserError
from jaxlm.train import optimizer

# ------------------------------------------------------------------------------------ schedules


def factors(config):
    o, steps = config.optimizer, config.train.steps
    rates = optimizer.learning_rate(o, optimizer.hyper(config), np.arange(300))  # one shape
    return np.asarray(rates, np.float64)[:steps] / o.learning_rate


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    schedule=st.sampled_from(sorted(optimizer.SCHEDULES)),
    steps=st.integers(1, 300),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_every_schedule_is_its_closed_form(schedule, steps, warmup, decay, final):
    numbers = {
        "warmup_fraction": warmup,
        "decay_fraction": decay * (1 - warmup),
        "final_fraction": final,
    }
    config = small.config(train={"steps": steps}, optimizer={"schedule": schedule, **numbers})
    want = [reference.factor(config.optimizer, steps, i) for i in range(steps)]
    assert factors(config) == pytest.approx(np.array(want), rel=1e-5, abs=2e-6)


def test_schedules_as_one_would_draw_them():
    """By hand: 100 steps, 10 of warm-up, 20 of decay (wsd), down to a tenth."""
    share = {"warmup_fraction": 0.1, "decay_fraction": 0.2, "final_fraction": 0.1}
    drawn = {
        "constant": {0: 0.1, 4: 0.5, 9: 1, 10: 1, 99: 1},
        "linear": {4: 0.5, 10: 1, 55: 0.55, 99: 0.11},
        "cosine": {4: 0.5, 10: 1, 55: 0.55, 99: 0.1 + 0.9 * np.sin(np.pi / 180) ** 2},
        "wsd": {4: 0.5, 10: 1, 80: 1, 90: 0.55, 99: 0.145},
    }
    for schedule, points in drawn.items():
        config = small.config(train={"steps": 100}, optimizer={"schedule": schedule, **share})
        got = factors(config)
        assert {i: pytest.approx(got[i], abs=1e-5) for i in points} == points, schedule


# ---------------------------------------------------------------------------------- directions


def updates(config, params, gradients):
    """Parameters after each of the gradients, with jaxlm's chain as the train step uses it."""
    h = optimizer.hyper(config)

    @jax.jit
    def update(step, params, state, grads):
        rate = optimizer.learning_rate(config.optimizer, h, step)
        tx = optimizer.transform(config, h.weight_decay, rate)
        moved, state = tx.update(grads, state, params)
        return jax.tree.map(lambda p, u: p + u, params, moved), state

    with small.on_mesh(config):
        params = small.sharded(config, params)
        state = optimizer.transform(config, 0.0, 0.0).init(params)
        for step, grads in enumerate(gradients):
            params, state = update(np.int32(step), params, state, small.sharded(config, grads))
            yield jax.device_get(params)


def random_gradients(config, steps, size):
    """Of changing length around `size`, so that some are clipped and some not."""
    with small.on_mesh(config):
        for step in range(steps):
            grads = small.params(config, seed=100 + step)
            length = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(grads)))
            scale = np.float32(size * 1.3 ** (step % 7 - 3) / length)
            yield jax.tree.map(functools.partial(np.multiply, scale), grads)


@pytest.mark.parametrize(
    "model, chosen",
    [
        ({"tie_embeddings": False}, {"grad_clip": 1.0, "weight_decay": 0.3}),
        (
            {"bias": True, "norm": "layernorm", "positions": "learned", "activation": "swiglu",
             "parametrization": "mup", "base_d_model": 2},
            {"grad_clip": 0.0, "b1": 0.8, "b2": 0.99, "eps": 1e-3, "schedule": "cosine"},
        ),
    ],
)  # fmt: skip
def test_adamw_clipping_decay_and_mup_are_the_reference_over_20_steps(model, chosen):
    config = small.config(model, {"steps": 20}, {"learning_rate": 0.02, **chosen})
    with small.on_mesh(config):
        params = small.params(config)
    gradients = list(random_gradients(config, 20, size=1.0))
    adamw, want = reference.AdamW(config), params
    for got, grads in zip(updates(config, params, gradients), gradients, strict=True):
        want = adamw.update(want, grads)
        small.assert_near(got, want, rel=3e-6)
    moved = reference.flat(got)["layers", "attention", "query"]
    assert np.abs(moved - params["layers"]["attention"]["query"]).mean() > 0.01


def matrices(path, x):
    """The matrices of a hidden parameter, [layers, in, out]."""
    n_in = 2 if path[-1] == "out" else 1
    rows = int(np.prod(x.shape[1 : 1 + n_in]))
    return np.asarray(x, np.float64).reshape(x.shape[0], rows, -1)


@pytest.mark.parametrize("parametrization", ["standard", "mup"])
def test_muon_orthogonalises_hidden_matrices_at_rms_a_fifth_and_leaves_the_rest_to_adam(
    parametrization,
):
    """Liu et al. 2025, eq. 4: RMS 0.2. Its Newton–Schulz iteration (Jordan 2024) brings singular
    values near 1, between about 0.7 and 1.2, not to it."""
    model = {
        "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "activation": "swiglu", "d_ff": 48,
        "tie_embeddings": False, "bias": True, "base_d_model": 8,
        "parametrization": parametrization,
    }  # fmt: skip
    chosen = {"name": "muon", "learning_rate": 1.0, "schedule": "constant", "warmup_fraction": 0.0}
    config = small.config(model, optimizer={**chosen, "weight_decay": 0.0, "grad_clip": 0.0})
    adam = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, name="adamw")
    )
    with small.on_mesh(config):
        params = jax.tree.map(np.zeros_like, small.params(config))
    gradients = list(random_gradients(config, 2, size=1.0))
    first, second = updates(config, params, gradients)
    adamw, want = reference.AdamW(adam), params
    want = [want := adamw.update(want, g) for g in gradients]
    shrink = 0.5 if parametrization == "mup" else 1.0  # √(8 / 32)
    hidden = 0
    for path, got in reference.flat(first).items():
        if path[0] != "layers" or path[-1] not in reference.MATRICES:
            for mine, theirs in zip((first, second), want, strict=True):
                theirs = reference.flat(theirs)[path]
                assert reference.flat(mine)[path] == pytest.approx(theirs, rel=1e-4), path
            continue
        hidden += 1
        grads = matrices(path, reference.flat(gradients[0])[path])
        for update, grad in zip(matrices(path, got), grads, strict=True):
            rms = np.sqrt((update**2).mean()) / shrink
            assert 0.2 * 0.7 < rms < 0.2 * 1.2
            u, sizes, vt = np.linalg.svd(-grad, full_matrices=False)
            s = u.T @ update @ vt.T / (0.2 * shrink * np.sqrt(max(grad.shape)))
            assert (np.abs(s - np.diag(np.diag(s))) < 1e-4).all()
            assert np.diag(s)[sizes > 0.05 * sizes[0]].min() > 0.6 and np.diag(s).max() < 1.25
    assert hidden == 7


def test_muon_follows_momentum_and_decays_hidden_matrices():
    chosen = {"name": "muon", "learning_rate": 0.1, "schedule": "constant", "warmup_fraction": 0.0}
    config = small.config(optimizer={**chosen, "weight_decay": 0.5})
    with small.on_mesh(config):
        params = small.params(config)
    zero = jax.tree.map(np.zeros_like, params)
    (still,) = updates(config, params, [zero])
    for path, x in reference.flat(params).items():
        keep = 0.95 if path[-1] in reference.MATRICES else 1.0
        assert reference.flat(still)[path] == pytest.approx(keep * x, rel=1e-6), path
    gradient = next(random_gradients(config, 1, size=1.0))
    one, two = updates(config, params, [gradient, zero])
    query = [x["layers"]["attention"]["query"] for x in (params, one, two)]
    assert np.abs(query[2] - 0.95 * query[1]).mean() > 0.01  # momentum goes on without a gradient


# ------------------------------------------------------------------------------- own and unknown


def test_an_own_optimizer_and_schedule_come_from_a_file(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "import jax, optax\n"
        "def sign(config):\n"
        "    return optax.stateless(lambda g, p: jax.tree.map(jax.numpy.sign, g))\n"
        "def gram(config):  # a product along sharded axes\n"
        "    def update(g, p):\n"
        "        x = g['embedding']\n"
        "        return {**g, 'embedding': x @ (x.T @ x)}\n"
        "    return optax.stateless(update)\n"
        "def square(done, h):\n"
        "    return (1.0 - done) ** 2\n"
    )
    chosen = {
        "schedule": f"{own}:square", "weight_decay": 0.0, "grad_clip": 0.0, "learning_rate": 0.5,
        "warmup_fraction": 0.0,
    }  # fmt: skip
    config = small.config(optimizer={"name": f"{own}:sign", **chosen})
    steps = np.arange(10)
    assert factors(config) == pytest.approx((1 - steps / 10) ** 2, rel=1e-5)
    with small.on_mesh(config):
        params = small.params(config)
    gradient = next(random_gradients(config, 1, size=1.0))
    (moved,) = updates(config, params, [gradient])
    want = jax.tree.map(lambda p, g: p - 0.5 * np.sign(g), params, gradient)
    small.assert_near(moved, want, rel=1e-6)

    config = small.config(optimizer={"name": f"{own}:gram", **chosen})
    (moved,) = updates(config, params, [gradient])
    x = gradient["embedding"].astype(np.float64)
    want = {**jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)}
    want["embedding"] = params["embedding"] - 0.5 * x @ (x.T @ x)
    small.assert_near(moved, want, rel=1e-6)


@pytest.mark.parametrize(
    "chosen, said",
    [
        ({"name": "adamv"}, ["config.optimizer.name", "'adamv'", "did you mean 'adamw'?"]),
        ({"schedule": "cosin"}, ["config.optimizer.schedule", "did you mean 'cosine'?"]),
        ({"schedule": "x.py:f"}, ["config.optimizer.schedule", "no such file: x.py"]),
    ],
)
def test_an_unknown_name_is_one_clear_line(chosen, said):
    config = small.config(optimizer=chosen)
    with pytest.raises(UserError) as e:
        factors(config)
        optimizer.transform(config, 0.0, 0.0)
    assert "\n" not in str(e.value)
    assert all(part in str(e.value) for part in said), e.value


def test_the_default_is_wsd_adamw():
    assert (OptimizerConfig().name, OptimizerConfig().schedule) == ("adamw", "wsd")
    assert set(transformer.table(small.MODEL)) == {"embedding", "layers", "norm"}
