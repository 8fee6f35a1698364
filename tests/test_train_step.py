"""The train step: sums over tokens however a batch is cut, one program for many runs."""

import jax
import numpy as np
import pytest
import reference
import small

from jaxlm import mesh
from jaxlm.train.optimizer import hyper
from jaxlm.train.step import abstract_state, program


def step_by_step(config, batches, params):
    """The states and losses of `batches`, one per dispatch, from these host parameters."""
    run, state = program(config), small.state(config, params)
    devices = jax.sharding.get_mesh()
    for i in range(batches.tokens.shape[0]):
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], batches)
        state, metrics = run.chunk(hyper(config), state, mesh.put_batch(one, devices, 1))
        yield jax.device_get(state), float(metrics["train/loss"][0]), metrics


def test_training_is_the_float64_reference_step_by_step():
    """Forward, backward, clipping, AdamW and schedule together, one batch without any target. A
    large eps keeps Adam from making a whole step out of rounding where a gradient is nearly 0."""
    config = small.config(
        {"activation": "swiglu", "n_kv_heads": 1},
        {"steps": 6, "z_loss": 1e-2},
        {"eps": 1e-3, "learning_rate": 0.03, "grad_clip": 0.5},
    )
    batches = small.batch(config, steps=6)
    batches.weights[3] = 0.0
    adamw = reference.AdamW(config)
    with small.on_mesh(config):
        first = small.params(config)
        want = reference.to_float64(first)
        for i, (state, loss, metrics) in enumerate(step_by_step(config, batches, first)):
            one = jax.tree.map(lambda x, i=i: x[i], batches)
            expected, _, grads = reference.loss_and_gradients(config.model, want, one, 1e-2)
            length = np.sqrt(sum((g**2).sum() for g in reference.flat(grads).values()))
            want = adamw.update(want, grads)
            assert loss == pytest.approx(expected, rel=3e-6)
            assert float(metrics["train/grad_norm"][0]) == pytest.approx(length, rel=1e-5)
            rate = 0.03 * reference.factor(config.optimizer, 6, i)
            assert float(metrics["learning_rate"][0]) == pytest.approx(rate, rel=1e-5)
            assert int(state.step) == i + 1
            small.assert_near(state.params, want, rel=1e-5)


def test_micro_batches_add_up_to_the_batch():
    """1, 2 and 4 micro-batches whose weights differ, one row (so one micro-batch) without any."""
    results = []
    for n in (1, 2, 4):
        config = small.config(
            {"norm": "layernorm", "positions": "learned"},
            {"accumulation_steps": n, "z_loss": 1e-2},
            {"grad_clip": 0.0},
        )
        batches = small.batch(config, seed=3, steps=1)
        tokens = batches.weights[0].sum(-1)
        assert tokens[0] == 0 and len(set(tokens)) == 4
        with small.on_mesh(config):
            (out,) = step_by_step(config, batches, small.params(config))
        results.append((out[0].opt_state, out[1]))
    one, *several = results
    for opt_state, loss in several:
        assert loss == pytest.approx(one[1], rel=1e-6)
        gradient, gradient_of_one = (s[1][0].mu for s in (opt_state, one[0]))  # times 1 - b1
        small.assert_near(gradient, gradient_of_one, rel=1e-6)


# ------------------------------------------------------------- one program, chunks and members

MEMBERS = [
    {"seed": 0},
    {"seed": 1, "learning_rate": 1e-3, "weight_decay": 0.3},
    {"seed": 2, "warmup_fraction": 0.5, "final_fraction": 0.2, "steps": 14},
]


def member(seed=0, steps=10, **optimizer):
    optimizer = {"eps": 1e-5, **optimizer}
    return small.config(train={"steps": steps}, optimizer=optimizer, seed=seed)


def trained(config, batches, population=()):
    """Losses and final parameters of one run, or of a population trained as one program."""
    run = program(config, len(population))
    h = hyper(config)
    if population:
        h = jax.tree.map(lambda *x: np.stack(x), *[hyper(c) for c in population])
        batches = jax.tree.map(lambda x: np.stack([x] * len(population)), batches)
    leading = 2 if population else 1
    state = run.init(h)
    on_mesh = mesh.put_batch(batches, jax.sharding.get_mesh(), leading)
    state, metrics = run.chunk(h, state, on_mesh)
    return np.asarray(metrics["train/loss"]), jax.device_get(state.params)


def test_a_member_of_a_population_trains_as_it_does_alone_and_alone_they_share_one_program():
    configs = [member(**m) for m in MEMBERS]
    batches = small.batch(configs[0], steps=10)
    compiled = []
    with small.on_mesh(configs[0]):
        losses, params = trained(configs[0], batches, configs)
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, seconds, **_: compiled.append(event)
        )
        alone = []
        for config in configs:
            before = compiled.count("/jax/core/compile/backend_compile_duration")
            alone.append(trained(config, batches))
            after = compiled.count("/jax/core/compile/backend_compile_duration")
            assert (after > before) == (config is configs[0])  # compiled once, for the first
        run = program(configs[0])
        assert all(program(c) is run for c in configs)
        assert (run.init._cache_size(), run.chunk._cache_size()) == (1, 1)
    assert len({loss[-1] for loss, _ in alone}) == 3
    for i, (loss, last) in enumerate(alone):
        assert np.abs(losses[i] - loss).max() < 1e-5
        small.assert_near(jax.tree.map(lambda x, i=i: x[i], params), last, rel=1e-4)


def test_a_chunk_is_its_steps_one_by_one_and_takes_the_state_over():
    config = member()
    batches = small.batch(config, steps=10)
    with small.on_mesh(config):
        params = small.params(config)
        state = small.state(config, params)
        on_mesh = mesh.put_batch(batches, jax.sharding.get_mesh(), 1)
        last, metrics = program(config).chunk(hyper(config), state, on_mesh)
        assert all(x.is_deleted() for x in jax.tree.leaves(state))
        steps = list(step_by_step(config, batches, params))
    losses = np.asarray(metrics["train/loss"])
    assert [loss for _, loss, _ in steps] == pytest.approx(losses, rel=1e-6)
    small.assert_near(steps[-1][0].params, last.params, rel=1e-5)


def test_another_shape_is_another_program():
    with small.on_mesh(small.config()):
        base = program(small.config())
        assert program(small.config(train={"steps": 99, "log_every": 3}, name="x")) is base
        for other in (
            small.config({"n_layers": 3}),
            small.config(train={"accumulation_steps": 2}),
            small.config(optimizer={"b2": 0.9}),
        ):
            assert program(other) is not base
        assert program(small.config(), population=2) is not base


def test_the_abstract_state_is_the_fresh_one():
    config = small.config({"norm": "layernorm"}, sizes=(2, 2, 2))
    with small.on_mesh(config):
        abstract = abstract_state(config, hyper(config))
        state = small.state(config, small.params(config))
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
