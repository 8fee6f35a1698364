"""Continuous batching: whoever comes and goes, each answer is that of its request alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from jaxlm import mesh
from jaxlm.config import Config, MeshConfig, ModelConfig
from jaxlm.generate import decode, sampling, slot_programs
from jaxlm.generate.sampling import Sampling
from jaxlm.generate.slots import Request, Slots, Token
from jaxlm.model import transformer
from jaxlm.model_config import MoE
from jaxlm.schema import UserError

CONTEXT, END = 80, 5
LLAMA = ModelConfig(
    d_model=32,
    n_layers=2,
    n_heads=8,
    n_kv_heads=4,
    d_ff=64,
    vocab_size=32,
    seq_len=8,
    tie_embeddings=False,
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
SLOW = dict.fromkeys(("gemma 3", "no positions"), pytest.mark.slow)
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


def expected(config: ModelConfig, request: Request, said: list[int]) -> np.ndarray:
    """Float32 [tokens, v]: the plain forward pass's logits in place of each token of an answer.
    (What is to the right has no influence: all requests share one program.)"""
    row = np.zeros((1, 64), np.int32)
    whole = [*request.prompt.tolist(), *said]
    row[0, : len(whole)] = whole
    logits = np.asarray(_forward(config)(weights(config), row))[0]
    return logits[len(request.prompt) - 1 : len(whole) - 1]


@functools.lru_cache
def _forward(config: ModelConfig):
    return jax.jit(functools.partial(transformer.apply, config))


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in MODELS])
def test_whoever_comes_and_goes_each_greedy_answer_is_the_forward_passs(name):
    config = MODELS[name]
    engine = Slots(config, weights(config), 3, CONTEXT)
    wanted = requests(20, seed=1)
    found = answers(engine, wanted)
    for tokens, said, request in zip(found, ids(found), wanted, strict=True):
        want = expected(config, request, said).astype(np.float64)
        want -= want.max(axis=1, keepdims=True)
        want -= np.log(np.exp(want).sum(axis=1, keepdims=True))
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
    assert len(set(np.concatenate(ids(found)))) > 4  # one that repeats itself proves nothing
    assert engine.reused > 50 and engine.free == 3


def test_each_ones_sampling_is_its_own():
    """Whatever the others' ways: each token is what `sampling.choose` takes of the forward pass's
    logits, given that row's prompt and what it said before."""
    engine = Slots(LLAMA, weights(LLAMA), 3, CONTEXT)
    wanted = requests(20, seed=2, ways=WAYS, longest=40)
    found = ids(answers(engine, wanted))
    rows = [(r, said, t) for r, said in zip(wanted, found, strict=True) for t in range(len(said))]
    logits = np.concatenate([expected(LLAMA, *pair) for pair in zip(wanted, found, strict=True)])
    ways = [r.sampling for r, _, _ in rows]
    method = sampling.method(ways)
    seen = sampling.said(method, [r.prompt for r, _, _ in rows], ways, LLAMA.vocab_size)
    for counts, (_, said, t) in zip(seen.generated, rows, strict=True):
        counts += np.bincount(said[:t], minlength=LLAMA.vocab_size)
    streams = np.concatenate([sampling.streams([r.prompt], r.sampling.seed) for r, _, _ in rows])
    at = np.array([len(r.prompt) - 1 + t for r, _, t in rows])
    knobs = sampling.knobs(ways, LLAMA.vocab_size)
    want = jax.jit(sampling.choose, static_argnums=0)(method, logits, streams, at, knobs, seen)
    assert np.concatenate(found).tolist() == want.tolist()
    assert np.mean(logits.argmax(axis=1) == want) < 0.8  # the ways matter


def test_answers_are_those_of_generate():
    """Which writes its whole answer in one program; seeds, copies and ends included."""
    engine = Slots(LLAMA, weights(LLAMA), 3, CONTEXT)
    prompts = [r.prompt[:16] for r in requests(3, seed=3)] * 2
    how = Sampling(1.5, seed=7)
    wanted = [Request(p, 12, how, frozenset([END]), i // 3) for i, p in enumerate(prompts)]
    found = ids(answers(engine, wanted))
    alone = decode.generate(LLAMA, weights(LLAMA), prompts, 12, END, how)
    assert [said[:-1] if said[-1] == END else said for said in found] == [a.tolist() for a in alone]
    assert found[:3] != found[3:]


def test_what_was_read_once_is_not_read_again():
    rng = np.random.default_rng(4)
    system, one, two = (rng.integers(6, 32, n).astype(np.int32) for n in (40, 20, 7))
    engine = Slots(LLAMA, weights(LLAMA), 3, CONTEXT)
    (first,) = answers(engine, [Request(np.append(system, one), 6)])
    assert (engine.read, engine.reused) == (59, 0)
    busy = engine.join(Request(np.append(system, two), 30))
    assert engine.reused == 40  # a copy of the first one's, who might go on
    more = np.concatenate([system, one, [t.id for t in first], two]).astype(np.int32)
    again = Request(more, 6, top=3)
    row = engine.join(again)
    assert row == first[0].row != busy
    assert engine.reused == 40 + 59 + 6  # all but the last token said, whose turn it was not
    found = []
    while engine.free < 2:
        found += [token for token in engine.step() if token.row == row]
    fresh = Slots(LLAMA, weights(LLAMA), 3, CONTEXT)
    (want,) = answers(fresh, [again])
    assert fresh.reused == 0 and [t.id for t in found] == [t.id for t in want]
    np.testing.assert_allclose(
        [t.log_prob for t in found], [t.log_prob for t in want], rtol=1e-4, atol=1e-5
    )


def spoilt(engine: Slots, row: int, slot: int) -> None:
    engine._cache = tuple(
        (keys.at[row, ..., slot].set(jnp.nan), values.at[row, :, slot].set(jnp.nan))
        for keys, values in engine._cache
    )


def test_a_spoilt_row_is_read_again_and_its_neighbours_do_not_notice():
    wanted = [Request(r.prompt, new) for r, new in zip(requests(3, 5), (7, 9, 7), strict=True)]
    want = answers(Slots(LLAMA, weights(LLAMA), 3, CONTEXT), wanted)
    for slot in (0, 60):  # one that is seen, one that lies behind
        engine = Slots(LLAMA, weights(LLAMA), 3, CONTEXT)
        found: list[list[Token]] = [[], [], []]
        rows = [engine.join(request) for request in wanted]
        while engine.free < 3:
            for token in engine.step():
                found[rows.index(token.row)].append(token)
                if token.row == rows[1] and len(found[1]) == 2:
                    spoilt(engine, rows[1], slot)
                    read = engine.read
        assert ids(found) == ids(want) and engine.read > read
        for i in (0, 2):
            assert [t.log_prob for t in found[i]] == [t.log_prob for t in want[i]]


def test_a_request_that_has_no_numbers_ends_alone():
    wanted = requests(6, seed=6)
    want = answers(Slots(LLAMA, weights(LLAMA), 3, CONTEXT), wanted)
    never = min(set(range(6)) - set(np.concatenate(ids(want)).tolist()))  # nor in prompts
    params = jax.tree.map(np.array, weights(LLAMA))
    params["embedding"][never] = np.nan
    ill = Request(np.append(wanted[0].prompt, [never, 8]).astype(np.int32), 9)
    where = jax.tree.map(lambda x: x.sharding, weights(LLAMA))
    engine = Slots(LLAMA, jax.device_put(params, where), 3, CONTEXT)
    found = answers(engine, [wanted[0], ill, *wanted[1:3], ill, *wanted[3:]])
    for i in (1, 4):
        assert [t.finish for t in found[i]] == ["error"] and np.isnan(found[i][0].log_prob)
    assert ids([f for i, f in enumerate(found) if i not in (1, 4)]) == ids(want)


@pytest.mark.parametrize("failing", [(3,), (3, 8)])
def test_a_step_that_finds_no_memory_is_told_and_begun_anew(failing, monkeypatch, caplog):
    wanted = [dataclasses.replace(r, max_new_tokens=12) for r in requests(3, 7, WAYS[:3])]
    want = answers(Slots(LLAMA, weights(LLAMA), 3, CONTEXT), wanted)
    engine, steps = Slots(LLAMA, weights(LLAMA), 3, CONTEXT), []
    say = engine._say

    def fails():
        steps.append(1)
        if len(steps) in failing:
            jax.tree.map(lambda a: a.delete(), engine._cache)  # it was given away
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")
        return say()

    monkeypatch.setattr(engine, "_say", fails)
    assert [engine.join(request) for request in wanted] == [0, 1, 2]
    found: list[list[Token]] = [[], [], []]
    while engine.free < 3:
        for token in engine.step():
            found[token.row].append(token)
    assert caplog.text.count("a step failed") == len(failing)
    if len(failing) == 1:
        assert ids(found) == ids(want)
    else:  # nor may it go on for ever
        assert [tokens[-1].finish for tokens in found] == ["error"] * 3
        assert [t[:-1] for t in ids(found)] == [
            w[: len(t) - 1] for t, w in zip(found, ids(want), strict=True)
        ]


def test_one_may_leave_at_any_time():
    wanted = requests(3, seed=8)
    engine, fresh = (Slots(LLAMA, weights(LLAMA), 3, CONTEXT) for _ in range(2))
    long = Request(np.arange(74, dtype=np.int32) % 32, 6)
    engine.leave(engine.join(long))  # before anything was read
    row = engine.join(long)
    engine.step()  # … in the middle of its prompt
    assert engine.read == 64
    engine.leave(row)
    row = engine.join(long)
    while not engine.step():
        pass
    engine.leave(row)  # … and of its answer
    assert engine.free == 3 and engine.step() == []
    assert ids(answers(engine, wanted)) == ids(answers(fresh, wanted))


def test_what_does_not_fit_is_refused_in_one_line():
    engine = Slots(MODELS["gpt2"], weights(MODELS["gpt2"]), 3, 10 * CONTEXT)
    assert engine.context == CONTEXT
    full = Request(np.arange(10, dtype=np.int32), CONTEXT - 9)
    (found,) = answers(engine, [full])
    assert len(found) == CONTEXT - 9
    engine = Slots(LLAMA, weights(LLAMA), 3, CONTEXT)
    for request, says in (
        (dataclasses.replace(full, max_new_tokens=72), r"prompt: 10 tokens and 72 .* of 81; .* 80"),
        (dataclasses.replace(full, top=21), "top: expected 0 … 20 alternatives, got 21"),
        (dataclasses.replace(full, prompt=np.array([99])), r"prompt\[0\]: token 99 .* 0 … 31"),
        (dataclasses.replace(full, sampling=Sampling(-1.0)), "temperature: .* got -1.0"),
    ):
        with pytest.raises(UserError, match=says):
            engine.join(request)
    assert engine.free == 3
    for other in ({"architecture": "encoder"}, {"prefix_attention": True}):
        with pytest.raises(UserError, match="expected a decoder that only looks back"):
            Slots(dataclasses.replace(LLAMA, **other), {}, 1, CONTEXT)


def test_eight_devices_say_what_one_says():
    """Two copies of four devices each: a batch lies on one of them."""
    wanted = requests(5, seed=9, ways=WAYS[3:4])
    want = ids(answers(Slots(LLAMA, weights(LLAMA), 3, CONTEXT), wanted))
    with jax.set_mesh(devices(4, data=2)):
        there = transformer.relaid(LLAMA, weights(LLAMA))
        engine = Slots(LLAMA, there, 3, CONTEXT)
        assert ids(answers(engine, wanted)) == want
    keys = engine._cache[0][0]
    assert {s.data.shape for s in keys.addressable_shards} == {(4, 1, 4, keys.shape[3])}


def test_longer_prompts_seldom_compile_again():
    engine = Slots(LLAMA, weights(LLAMA), 3, CONTEXT)
    prompts = [(np.arange(n, 2 * n) % 32).astype(np.int32) for n in range(1, CONTEXT)]
    answers(engine, [Request(prompt, 2) for prompt in prompts])
    programs = [
        make(LLAMA, 128, engine.mesh) for make in (slot_programs.forward, slot_programs.reader)
    ]
    assert [program._cache_size() for program in programs] == [2, 2]  # 1 row, 3; chunks of 16, 64
