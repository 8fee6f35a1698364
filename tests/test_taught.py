"""Objectives that ask another model: preferences and distillation, against their formulas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from reference import flat

from jaxlm import mesh
from jaxlm.config import TuneConfig
from jaxlm.data import examples
from jaxlm.data.windows import TaughtBatch
from jaxlm.evaluate import teachers
from jaxlm.model import transformer
from jaxlm.schema import UserError
from jaxlm.train import example_losses

VOCAB, T = 16, 12


@pytest.fixture(autouse=True)
def quickly() -> Iterator[None]:
    with small.compiled_quickly():
        yield


def pairs(rng: np.random.Generator, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Chosen and other texts of n prompts, in turn: ids and which are the answer."""
    out = []
    for _ in range(n):
        prompt = rng.integers(0, VOCAB, 2)
        for _ in range(2):
            ids = np.concatenate([prompt, rng.integers(0, VOCAB, rng.integers(2, 5))])
            out.append((ids.astype(np.int32), np.arange(len(ids)) >= 2))
    return out


def log_p(model, params, answers: list[tuple[np.ndarray, np.ndarray]]) -> jax.Array:
    """Of each answer [n], from the logits of its text in a row of its own."""
    tokens, hit = np.zeros((len(answers), T), np.int32), np.zeros((len(answers), T, VOCAB))
    for row, (ids, says) in enumerate(answers):
        tokens[row, : len(ids) - 1] = ids[:-1]
        hit[row, : len(ids) - 1] = np.eye(VOCAB)[ids[1:]] * says[1:, None]
    tokens = jax.reshard(jnp.asarray(tokens), mesh.spec(("batch", None)))
    rows = jax.nn.log_softmax(transformer.apply(model, params, tokens))
    return jnp.sum(rows * hit, axis=(1, 2))


def test_preference_is_dpo_s_formula_and_its_gradient_the_difference_of_two() -> None:
    """At the reference the loss is ln 2, and its gradient -beta / 2 times that of log p(chosen)
    minus log p(other) (Rafailov et al. 2023, §4); away from it, eq. 7."""
    c = small.config({"n_layers": 1}, tune=TuneConfig(beta=0.3))
    answers = pairs(np.random.default_rng(0), 2)
    with small.on_mesh(c):
        params = small.sharded(c, small.params(c))
        other = jax.tree.map(lambda x: x * 1.1, params)
        some = examples.of_preferences(answers, T)
        theirs = teachers.log_p(c.model, params, some)
        both = zip(theirs, some.beside, strict=True)
        some = replace(some, beside=[np.concatenate([a, b[:, 1:]], 1) for a, b in both])
        batch = some.windows(np.arange(2))
        assert isinstance(batch, TaughtBatch) and batch.weights.sum() == 2
        placed = mesh.put_batch(batch, jax.sharding.get_mesh())

        def loss(p):
            return example_losses.preference(c, p, placed, jax.random.key(0))

        def difference(p):
            each = log_p(c.model, p, answers)
            return jnp.sum(each[::2] - each[1::2])

        (value, sums), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        assert float(value) == pytest.approx(2 * np.log(2), rel=1e-5)
        assert float(sums["train/margin"]) == pytest.approx(0, abs=1e-4)
        want = jax.tree.map(lambda g: -0.15 * g, jax.jit(jax.grad(difference))(params))
        small.assert_near(grads, want, rel=2e-4)

        each = jax.jit(lambda p: log_p(c.model, p, answers))
        before, after = np.asarray(each(params)), np.asarray(each(other))
        margins = (after - before)[::2] - (after - before)[1::2]
        value, sums = jax.jit(loss)(other)
    assert float(value) == pytest.approx(np.log1p(np.exp(-0.3 * margins)).sum(), rel=1e-4)
    assert float(sums["train/accuracy"]) == (margins > 0).sum()
    with pytest.raises(UserError, match="pair 0 has"):
        examples.of_preferences(answers, 4)


@pytest.mark.parametrize("k", [VOCAB, pytest.param(3, marks=pytest.mark.slow)])
def test_distillation_is_the_divergence_from_the_teacher(k: int) -> None:
    """temperature² · KL over the teacher's k likeliest; of all tokens it is 0, and without a
    gradient, where the model is its teacher (Hinton et al. 2015, §2)."""
    c = small.config({"n_layers": 1}, tune=TuneConfig(temperature=2.0))
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (9, 5, 12)]
    some = examples.of_answers([(t, np.ones(len(t), bool)) for t in texts], T)
    with small.on_mesh(c):
        params = small.sharded(c, small.params(c))
        teacher = jax.tree.map(lambda x: x * 1.2, params)
        some = replace(some, beside=teachers.likeliest(c.model, teacher, some, k))
        batch = mesh.put_batch(some.windows(np.arange(len(some))), jax.sharding.get_mesh())

        def loss(p):
            return example_losses.distill(c, p, batch, jax.random.key(0))

        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (value, sums), _ = run(params)
        want = plain = 0.0
        apply = jax.jit(lambda p, tokens: transformer.apply(c.model, p, tokens))
        for text in texts:
            ours, theirs = (
                np.asarray(apply(p, np.pad(text[None, :-1], ((0, 0), (0, T - len(text) + 1)))),
                           np.float64)[0, : len(text) - 1] for p in (params, teacher)
            )  # fmt: skip
            for x, y, target in zip(ours, theirs, text[1:], strict=True):
                best = np.argsort(-y)[:k]
                q = np.exp(y[best] / 2.0) / np.exp(y[best] / 2.0).sum()
                log_p = x / 2.0 - np.log(np.exp(x / 2.0).sum())
                want += 4.0 * (q * (np.log(q) - log_p[best])).sum()
                plain += np.log(np.exp(x).sum()) - x[target]
        assert float(value) == pytest.approx(want, rel=1e-4)
        assert float(sums["train/nll"]) == pytest.approx(plain, rel=1e-4)
        half = replace(c, tune=replace(c.tune, teacher_share=0.25))
        mixed = example_losses.distill(half, params, batch, jax.random.key(0))[0]
        assert float(mixed) == pytest.approx(0.25 * want + 0.75 * plain, rel=1e-4)
        if k == VOCAB:
            (value, _), grads = run(teacher)
            assert abs(float(value)) < 1e-4
            assert max(np.abs(g).max() for g in flat(jax.device_get(grads)).values()) < 1e-4
