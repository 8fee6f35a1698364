"""Continuous batching: whoever comes and goes, each answer is that of its request alone."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import small

from jaxlm import mesh
from jaxlm.config import Config, MeshConfig, ModelConfig
from jaxlm.generate import decode
from jaxlm.generate.sampling import Sampling
from jaxlm.generate.slots import Request, Slots, Token
from jaxlm.model import transformer
from jaxlm.model_config import MoE

CONTEXT, END = 80, 5
LLAMA = ModelConfig(
    d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32, vocab_size=32, seq_len=8
)
MODELS = {
    "llama": LLAMA,
    "gpt2": dataclasses.replace(
        LLAMA, positions="learned", norm="layernorm", bias=True, n_kv_heads=None, seq_len=CONTEXT
    ),
    "gemma 3": dataclasses.replace(
        LLAMA,
        n_layers=3,
        norm_placement="both",
        qk_norm=True,
        sliding_window=4,
        global_every=3,
        local_rope_theta=100.0,
        final_soft_cap=9.0,
    ),
    "mixtral": dataclasses.replace(
        LLAMA, activation="swiglu", sliding_window=5, moe=MoE(n_experts=4)
    ),
    "no positions": dataclasses.replace(LLAMA, positions="none", n_layers=1),
}
WAYS = (
    Sampling(0.0),
    Sampling(0.0, repetition_penalty=1.3, frequency_penalty=0.5),
    Sampling(0.0, logit_bias=((7, 4.0), (11, -9.0))),
    Sampling(1.3, seed=4),
    Sampling(0.8, top_k=9, top_p=0.9, min_p=0.01, presence_penalty=0.4, seed=9),
)


@pytest.fixture(autouse=True)
def one_device():
    with small.compiled_quickly(), jax.set_mesh(devices(1)):
        yield


def devices(tensor: int, data: int = 1):
    config = Config(model=LLAMA, mesh=MeshConfig(data=data, tensor=tensor))
    return mesh.make(config, jax.devices()[: tensor * data])


@functools.lru_cache
def weights(config: ModelConfig):
    """So far from zero that what comes next depends on all that came before."""
    rng = np.random.default_rng(0)

    def draw(row):
        w = rng.normal(row.role == "gain", 0.4, row.shape).astype(np.float32)
        return jax.device_put(w, jax.NamedSharding(jax.sharding.get_mesh(), row.spec))

    return jax.tree.map(draw, transformer.table(config))


def requests(n: int, seed: int, ways=WAYS[:1], longest: int = 24) -> list[Request]:
    """Random ones; half of the prompts go on from one of three beginnings."""
    rng = np.random.default_rng(seed)
    begins = [rng.integers(6, 32, length) for length in (17, 20, longest)]
    out = []
    for i in range(n):
        prompt = rng.integers(6, 32, rng.integers(1, 30)).astype(np.int32)
        if rng.random() < 0.5:
            prompt = np.concatenate([begins[rng.integers(3)], prompt[:8]]).astype(np.int32)
        ends = frozenset([END]) if rng.random() < 0.5 else frozenset()
        out.append(Request(prompt, int(rng.integers(1, 12)), ways[i % len(ways)], ends, top=3))
    return out


def answers(engine: Slots, wanted: list[Request], seed: int = 0) -> list[list[Token]]:
    """All of them, each joining at a random time."""
    rng, waiting, rows = np.random.default_rng(seed), list(enumerate(wanted)), {}
    out: list[list[Token]] = [[] for _ in wanted]
    while waiting or rows:
        while waiting and engine.free and (not rows or rng.random() < 0.6):
            i, request = waiting.pop(0)
            rows[engine.join(request)] = i
        for token in engine.step():
            out[rows[token.row]].append(token)
            if token.finish is not None:
                del rows[token.row]
    return out


def ids(found: list[list[Token]]) -> list[list[int]]:
    return [[token.id for token in tokens] for tokens in found]


def log_probs(config: ModelConfig, request: Request, said: list[int]) -> np.ndarray:
    """float64 [tokens, v]: what the plain forward pass expects in place of each token of an
    answer. (What is to the right has no influence: all requests share one program.)"""
    row = np.zeros((1, 64), np.int32)
    whole = [*request.prompt.tolist(), *said]
    row[0, : len(whole)] = whole
    logits = np.asarray(_forward(config)(weights(config), row))[0].astype(np.float64)
    logits = logits[len(request.prompt) - 1 : len(whole) - 1]
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@functools.lru_cache
def _forward(config: ModelConfig):
    return jax.jit(functools.partial(transformer.apply, config))


@pytest.mark.parametrize("name", MODELS)
def test_whoever_comes_and_goes_each_greedy_answer_is_the_forward_passs(name):
    config = MODELS[name]
    engine = Slots(config, weights(config), 3, CONTEXT)
    wanted = requests(20, seed=1)
    found = answers(engine, wanted)
    for tokens, said, request in zip(found, ids(found), wanted, strict=True):
        want = log_probs(config, request, said)
        assert said == want.argmax(axis=1).tolist()
        for token, row in zip(tokens, want, strict=True):
            best = np.argsort(-row)[:3]
            assert [i for i, _ in token.top] == best.tolist()
            np.testing.assert_allclose([p for _, p in token.top], row[best], atol=1e-4)
            assert token.log_prob == token.top[0][1]
        ended = said[-1] in request.ends
        assert ended or len(said) == request.max_new_tokens
        assert not request.ends.intersection(said[:-1])
        last = "stop" if ended else "length"
        assert [t.finish for t in tokens] == [None] * (len(tokens) - 1) + [last]
    assert len(set(np.concatenate(ids(found)))) > 6  # one that repeats itself proves nothing
    assert engine.reused > 50 and engine.free == 3


def test_each_ones_sampling_is_its_own():
    """Penalties, bias and draws are those of a batch in which all are chosen alike."""
    engine = Slots(LLAMA, weights(LLAMA), 4, CONTEXT)
    wanted = requests(25, seed=2, ways=WAYS, longest=40)
    found = ids(answers(engine, wanted))
    for k, how in enumerate(WAYS):
        rows = range(k, len(wanted), len(WAYS))
        prompts = [wanted[i].prompt for i in rows]
        want = decode.generate(LLAMA, weights(LLAMA), prompts, 12, None, how)
        for i, row in zip(rows, want, strict=True):
            assert found[i] == row[: len(found[i])].tolist()
    assert found != ids(answers(engine, [dataclasses.replace(r, sampling=WAYS[0]) for r in wanted]))
