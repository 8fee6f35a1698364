"""Speculative decoding against plain decoding and the model's own probabilities."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from scipy import stats

from jaxlm import mesh
from jaxlm.config import Config, ModelConfig
from jaxlm.generate import decode, speculative
from jaxlm.generate import sampling as draws
from jaxlm.generate.sampling import Sampling
from jaxlm.generate.speculative import Draft
from jaxlm.model import transformer
from jaxlm.schema import UserError

MODEL = ModelConfig(
    d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32, vocab_size=8, seq_len=16
)
SMALL = dataclasses.replace(MODEL, n_layers=1, n_kv_heads=4)
LEARNED = dataclasses.replace(
    MODEL, positions="learned", norm="layernorm", bias=True, tie_embeddings=False
)
PROMPTS = [np.array(p, np.int32) for p in ([7], [1, 2, 3, 4, 5])]


@pytest.fixture(autouse=True)
def one_device():
    on = mesh.make(Config(model=MODEL), jax.devices()[:1])
    with jax.set_mesh(on), small.compiled_quickly():
        yield


def params(config: ModelConfig, seed: int = 0):
    return small.sharded(Config(model=config), small.params(Config(model=config), seed))


@pytest.mark.parametrize(
    "config",
    [MODEL, pytest.param(LEARNED, marks=pytest.mark.slow)],
    ids=["rope", "learned"],
)
def test_greedy_answers_are_the_models_own(config):
    """12 tokens after 5 are all that learned positions hold: proposals go beyond."""
    own = params(config)
    plain = decode.generate(config, own, PROMPTS, 12, None, Sampling(0.0))
    draft = Draft(SMALL, params(SMALL, 1))
    found = speculative.generate(config, own, draft, PROMPTS, 12, None, Sampling(0.0))
    np.testing.assert_array_equal([f.ids for f in found], plain)
    assert len(np.unique(plain)) > 2 and all(3 <= f.passes <= 12 for f in found)
    eos = int(plain[1][5])
    short = speculative.generate(config, own, draft, PROMPTS, 12, eos, Sampling(0.0))
    for got, whole in zip(short, plain, strict=True):
        want = whole.tolist()
        assert got.ids.tolist() == (want[: want.index(eos)] if eos in want else want)


@pytest.mark.slow
def test_a_draft_that_is_the_model_is_never_wrong():
    own = params(MODEL)
    draft = Draft(MODEL, own)
    [greedy] = speculative.generate(MODEL, own, draft, PROMPTS[1:], 12, None, Sampling(0.0), 3)
    [drawn] = speculative.generate(MODEL, own, draft, PROMPTS[1:], 12, None, Sampling(seed=4), 3)
    assert greedy.passes == drawn.passes == 3


def test_a_seed_says_the_same_again_and_copies_differ():
    own, draft = params(MODEL), Draft(SMALL, params(SMALL, 1))

    def say(prompts, seed):
        how = Sampling(temperature=1.5, seed=seed)
        found = speculative.generate(MODEL, own, draft, prompts, 12, None, how)
        return [f.ids.tolist() for f in found]

    twice = say([PROMPTS[0], PROMPTS[1], PROMPTS[0]], 3)
    assert twice[0] != twice[2]
    assert say([PROMPTS[1], PROMPTS[0]], 3) == [twice[1], twice[0]]
    assert say([PROMPTS[1]], 4) != [twice[1]]


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    """The p-value; cells that expect fewer than 5 are one."""
    few = p * counts.sum() < 5
    merged = [np.append(x[~few], x[few].sum()) for x in (counts, p * counts.sum())]
    return stats.chisquare(*(x[merged[1] > 0] for x in merged)).pvalue


@pytest.mark.parametrize(
    ("n", "how"),
    [
        pytest.param(1 << 17, Sampling(temperature=0.8, top_p=0.9), marks=pytest.mark.slow),
        pytest.param(1 << 17, Sampling(), marks=pytest.mark.slow),
        pytest.param(1 << 17, Sampling(temperature=1.4, top_k=5), marks=pytest.mark.slow),
    ],
)
def test_what_is_drawn_has_the_models_distribution(n, how):
    """All pairs of two tokens after a prompt: their shares by the plain forward pass."""
    own, draft_params = params(MODEL), params(SMALL, 1)
    method, knobs = draws.method([how]), draws.knobs([how], 8)
    knobs = jax.tree.map(lambda a: a[0], knobs)
    run = speculative._speculator(MODEL, SMALL, 16, 2, method, jax.sharding.get_mesh())
    placed, limit, end = decode.place(PROMPTS[1:]), np.int32(2), np.int32(-1)
    many = jax.vmap(lambda stream: run(own, draft_params, placed, stream, knobs, limit, end)[0])
    streams = np.random.default_rng(0).integers(0, 2**32, (n, 2), dtype=np.uint32)
    said = np.concatenate([many(part)[:, :2] for part in np.split(streams, n // (1 << 14))])
    counts = np.bincount(said[:, 0] * 8 + said[:, 1], minlength=64)
    p = pairs(MODEL, own, PROMPTS[1], method, knobs)
    q = pairs(SMALL, draft_params, PROMPTS[1], method, knobs)
    assert counts.sum() == n and chi_square(counts, p) > 1e-3
    assert chi_square(counts, 0.95 * p + 0.05 * q) < 1e-6  # a draft believed too often is seen


def pairs(config, own, prompt, method, knobs) -> np.ndarray:
    """float64 [64]: the probability of each two tokens after the prompt."""
    next_v = jax.jit(lambda ids: transformer.apply(config, own, ids)[:, -1])
    shares = jax.vmap(functools.partial(draws.shares, method, knobs=knobs))
    first = np.asarray(shares(next_v(prompt[None])), np.float64)[0]
    both = np.concatenate([np.tile(prompt, (8, 1)), np.arange(8, dtype=np.int32)[:, None]], axis=1)
    second = np.asarray(shares(next_v(both)), np.float64)
    joint = (first[:, None] * second).ravel()
    return joint / joint.sum()


def test_shares_are_what_is_chosen():
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=8).astype(np.float32)
    n = 1 << 14
    streams = rng.integers(0, 2**32, (n, 2), dtype=np.uint32)
    for how in (Sampling(0.0), Sampling(1.3), Sampling(0.7, top_k=4), Sampling(min_p=0.2)):
        method, knobs = draws.method([how]), draws.knobs([how] * n, 8)
        said = draws.said(method, [np.zeros(0, np.int32)] * n, [how] * n, 8)
        many = jnp.broadcast_to(logits, (n, 8)), streams, np.zeros(n, np.int32), knobs, said
        counts = np.bincount(jax.jit(draws.choose, static_argnums=0)(method, *many), minlength=8)
        one = jax.tree.map(lambda a: a[0], knobs)
        share = np.asarray(draws.shares(method, logits, one), np.float64)
        likely = how.temperature == 0 or chi_square(counts, share / share.sum())
        assert likely > 1e-3
        assert (counts[share == 0] == 0).all()


@pytest.mark.parametrize(
    ("draft", "how", "message"),
    [
        (dataclasses.replace(SMALL, vocab_size=9), {}, r"draft: expected the model's 8 tokens"),
        (dataclasses.replace(SMALL, architecture="encoder"), {}, r"draft: expected two decoders"),
        (SMALL, {"frequency_penalty": 1.0}, r"draft: expected no penalties"),
    ],
)  # fmt: skip
def test_what_a_draft_cannot_do_is_refused(draft, how, message):
    with pytest.raises(UserError, match=message):
        speculative.generate(MODEL, {}, Draft(draft, {}), PROMPTS, 4, None, Sampling(**how))
