"""Decoding against the plain forward pass, sampling against numpy and the model's probabilities."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest
from scipy import stats

from jaxlm import mesh
from jaxlm.config import Config, MeshConfig, ModelConfig
from jaxlm.data.tokenizer import Bytes, create
from jaxlm.generate import decode, layout, sampling, watch
from jaxlm.generate.sampling import Sampling
from jaxlm.model import transformer
from jaxlm.model_config import MoE
from jaxlm.schema import UserError

TINY = ModelConfig(
    d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32, vocab_size=32, seq_len=8
)  # shorter than what the tests say with it: rotary positions know no end
VARIANTS = {
    "rope, grouped, tied": TINY,
    "rope, unrolled, bfloat16": dataclasses.replace(
        TINY, n_layers=1, scan_layers=False, compute_dtype="bfloat16", remat="full"
    ),
    "learned, layernorm, bias, untied, unrolled": dataclasses.replace(
        TINY,
        seq_len=64,
        positions="learned",
        norm="layernorm",
        bias=True,
        tie_embeddings=False,
        scan_layers=False,
        n_kv_heads=None,
    ),
    "none, swiglu, qk_norm, untied": dataclasses.replace(
        TINY, positions="none", activation="swiglu", qk_norm=True, tie_embeddings=False
    ),
    "gemma 3: windows of two kinds, scanned": dataclasses.replace(
        TINY,
        n_layers=3,
        norm_placement="both",
        qk_norm=True,
        sliding_window=4,
        global_every=3,
        local_rope_theta=100.0,
        final_soft_cap=9.0,
        tie_embeddings=False,
    ),
    "mixtral, windowed: experts, unrolled": dataclasses.replace(
        TINY, activation="swiglu", sliding_window=5, scan_layers=False, moe=MoE(n_experts=4)
    ),
}
SEQ2SEQ = {
    "t5": dataclasses.replace(
        TINY,
        architecture="encoder_decoder",
        n_encoder_layers=3,
        n_kv_heads=None,
        positions="relative",
        relative_distance=20,
        attention_scale=1.0,
        scale_output=True,
    ),
    "rope, grouped, unrolled": dataclasses.replace(
        TINY, architecture="encoder_decoder", scan_layers=False, activation="geglu"
    ),
}
PROMPTS = [np.array(p, np.int32) for p in ([7], [1, 2, 3, 4, 5], [9] * 3 + [30, 2, 11, 9, 9, 4])]


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(devices(1, 1, 1)):
        yield


def devices(*shape: int):
    names = ("data", "fsdp", "tensor")
    config = Config(model=TINY, mesh=MeshConfig(**dict(zip(names, shape, strict=True))))
    return mesh.make(config, jax.devices()[: int(np.prod(shape))])


@functools.lru_cache
def make_params(config: ModelConfig):
    """Weights so far from zero that what comes next depends on all that came before."""
    rng = np.random.default_rng(0)

    def draw(row):
        return rng.normal(row.role == "gain", 0.4, row.shape).astype(np.float32)

    return on_this_mesh(config, jax.tree.map(draw, transformer.table(config)))


def on_this_mesh(config: ModelConfig, params):
    def put(row, w):
        return jax.device_put(np.asarray(w), jax.NamedSharding(jax.sharding.get_mesh(), row.spec))

    return jax.tree.map(put, transformer.table(config), params)


@functools.lru_cache
def forward(config: ModelConfig):
    return jax.jit(functools.partial(transformer.apply, config))


def next_logits(config: ModelConfig, params, ids) -> np.ndarray:
    """Float32 [v], from a forward pass over all that came before (what is to its right has no
    influence: so all lengths share one program)."""
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(forward(config)(params, padded))[0, len(ids) - 1]


def uncached(config: ModelConfig, params, prompt: np.ndarray, new: int) -> list[int]:
    """Greedy continuation."""
    ids = prompt.tolist()
    for _ in range(new):
        ids.append(int(next_logits(config, params, ids).argmax()))
    return ids[len(prompt) :]


def probabilities(config: ModelConfig, params, ids) -> np.ndarray:
    """float64 [v]: the softmax after `ids`."""
    logits = next_logits(config, params, ids).astype(np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def greedy(config: ModelConfig, params, prompts, new: int, eos_id: int | None = None):
    found = decode.generate(config, params, prompts, new, eos_id, Sampling(0))
    assert all(row.dtype == np.int32 for row in found)
    return [row.tolist() for row in found]


# ---------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_greedy_equals_the_forward_pass_token_by_token(name):
    config = VARIANTS[name]
    params = make_params(config)
    found = greedy(config, params, PROMPTS, 12)
    assert found == [uncached(config, params, p, 12) for p in PROMPTS]
    assert len(set(np.ravel(found))) > 6  # a model that repeats itself would prove nothing


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_an_encoder_decoder_answers_token_by_token_as_its_forward_pass_does(name):
    config = SEQ2SEQ[name]
    params = make_params(config)
    found = greedy(config, params, PROMPTS, 12)
    model = jax.jit(
        lambda params, ids, source: transformer.apply(config, params, ids, source=source)
    )
    for prompt, answer in zip(PROMPTS, found, strict=True):
        at = np.arange(16, dtype=np.int32)[None]
        source = np.zeros((1, 16), np.int32)
        source[0, : len(prompt)] = prompt
        source = transformer.Source(source, at, (at < len(prompt)).astype(np.int32))
        said = np.zeros((1, 16), np.int32)  # each token after those before it, the first after 0
        said[0, 1:12] = answer[:11]
        want = np.asarray(model(params, said, source))[0, :12].argmax(-1)
        assert answer == want.tolist()
    assert len(set(np.ravel(found))) > 4


def test_a_prefix_model_reads_its_prompt_both_ways():
    config = dataclasses.replace(TINY, prefix_attention=True)
    params = make_params(config)
    found = greedy(config, params, PROMPTS, 12)
    assert found != [uncached(config, params, p, 12) for p in PROMPTS]
    ids = np.zeros((1, 32), np.int32)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids[0, : len(prompt) + 11] = [*prompt, *answer[:11]]
        at = np.arange(32, dtype=np.int32)[None]
        x, _ = transformer.hidden_and_sums(
            config, params, ids, at, np.ones_like(ids), prefix_bt=at < len(prompt)
        )
        logits = np.asarray(transformer.logits(config, params, x))[0]
        assert answer == logits[len(prompt) - 1 : len(prompt) + 11].argmax(-1).tolist()


def test_an_encoder_continues_nothing():
    with pytest.raises(UserError, match=r"prompts: an encoder .* continues no text"):
        decode.generate(dataclasses.replace(TINY, architecture="encoder"), {}, PROMPTS, 4, None)


def test_a_batch_says_what_each_prompt_says_alone():
    params = make_params(TINY)
    prompts = [*PROMPTS, np.arange(16, dtype=np.int32)]  # the last one needs no padding
    how = Sampling(seed=5, top_k=7, temperature=2.0)
    together = decode.generate(TINY, params, prompts, 9, None, how)
    alone = [decode.generate(TINY, params, [p], 9, None, how)[0] for p in prompts]
    np.testing.assert_array_equal(together, alone)


def test_it_stops_before_the_end_of_text_and_only_there():
    params = make_params(TINY)
    free = greedy(TINY, params, PROMPTS, 12)
    eos = free[1][3]
    want = [row[: row.index(eos)] if eos in row else row for row in free]
    assert greedy(TINY, params, PROMPTS, 12, eos) == want
    assert greedy(TINY, params, PROMPTS, 5, None) == [row[:5] for row in free]


def test_eight_devices_say_what_one_says():
    params = make_params(TINY)
    want = greedy(TINY, params, PROMPTS, 12)
    drawn = decode.generate(TINY, params, PROMPTS, 12, None, Sampling(seed=3, top_p=0.9))
    p = probabilities(TINY, params, PROMPTS[2])
    with jax.set_mesh(devices(2, 2, 2)):
        there = on_this_mesh(TINY, params)
        # One candidate only is the greedy choice (and shares its program with the draws).
        only = decode.generate(TINY, there, PROMPTS, 12, None, Sampling(top_k=1))
        np.testing.assert_array_equal(only, want)
        found = decode.generate(TINY, there, PROMPTS, 12, None, Sampling(seed=3, top_p=0.9))
        np.testing.assert_array_equal(found, drawn)
        (top,) = decode.expected(TINY, there, PROMPTS[2:], 4)
    np.testing.assert_allclose([share for _, share in top], p[[i for i, _ in top]], rtol=1e-4)


def test_a_step_of_one_row_writes_the_cache_where_it_lies():
    config = dataclasses.replace(TINY, n_layers=1)
    here, prompt, how = jax.sharding.get_mesh(), PROMPTS[1:2], Sampling(0.0)
    method = sampling.method([how])
    streams_b2, knobs, said = decode._choice(config, prompt, how, method)
    laid = layout.laid_out(config, make_params(config))
    begun, running = decode._starter(config, 16, here)(laid, decode.place(prompt), said)
    program = decode._decoder(config, method, here)
    given = laid, begun, running, streams_b2, knobs, np.int32(4), np.int32(-1)
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", program.lower(*given).compile().as_text())
    copied = [math.prod(map(int, shape.split(","))) for shape in shapes]
    assert running.cache[0][0].size == 2 * 32 * config.head_dim  # 16 of the prompt, 16 new
    assert running.cache[0][0].size not in copied


def test_growing_prompts_and_other_settings_seldom_compile_again():
    config = dataclasses.replace(TINY, n_layers=1)
    params, how = make_params(config), Sampling(0.5, top_k=3)
    for n in range(1, 33):
        prompt = np.arange(n, dtype=np.int32)
        way = dataclasses.replace(how, top_k=n, top_p=1 / n, seed=n)
        decode.generate(config, params, [prompt], 9 + n % 8, n % 5, way)
    here = jax.sharding.get_mesh()
    programs = (
        decode._starter(config, 16, here),
        decode._decoder(config, sampling.method([how]), here),
    )
    assert [program._cache_size() for program in programs] == [2, 2]  # 16 tokens, and 32


@pytest.mark.parametrize("how", [Sampling(0.0), Sampling(1.5, seed=3, presence_penalty=1.0)])
def test_answers_come_with_the_models_log_probabilities(how):
    params = make_params(TINY)
    for prompt, answer in zip(
        PROMPTS, decode.answers(TINY, params, PROMPTS, 12, 3, how), strict=True
    ):
        assert answer.ended == (len(answer.ids) < 12) and answer.log_probs.dtype == np.float32
        whole = [*prompt, *answer.ids]
        want = [
            np.log(probabilities(TINY, params, whole[: len(prompt) + t])[i])
            for t, i in enumerate(answer.ids)
        ]
        np.testing.assert_allclose(answer.log_probs, want, atol=1e-4)


def test_rows_of_which_there_is_enough_end_early():
    params = make_params(TINY)
    whole = decode.answers(TINY, params, PROMPTS, 40, None, Sampling(0.0))
    asked = []

    def enough(i: int, ids: np.ndarray) -> bool:
        asked.append((i, len(ids)))
        return i != 1

    found = decode.answers(TINY, params, PROMPTS, 40, None, Sampling(0.0), enough)
    assert [len(a.ids) for a in found] == [16, 40, 16]
    assert [a.ended for a in found] == [True, False, True]
    for a, b in zip(found, whole, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids[: len(a.ids)])
        np.testing.assert_allclose(a.log_probs, b.log_probs[: len(a.ids)], atol=1e-5)
    assert asked == [(0, 16), (1, 16), (2, 16), (1, 32)]
    found = decode.answers(TINY, params, PROMPTS, 40, None, Sampling(0.0), lambda i, ids: True)
    assert [len(a.ids) for a in found] == [16, 16, 16]


# ---------------------------------------------------------------------------------------- sampling


def test_draws_follow_the_models_probabilities():
    params = make_params(TINY)
    p = probabilities(TINY, params, PROMPTS[1]) ** (1 / 0.7)
    drawn = decode.generate(
        TINY, params, [PROMPTS[1]] * 4096, 1, None, Sampling(temperature=0.7, seed=1)
    )
    counts = np.bincount(np.ravel(drawn), minlength=32)
    assert chi_square(counts, p / p.sum()) > 1e-3
    assert chi_square(counts, probabilities(TINY, params, PROMPTS[1])) < 1e-6  # it can tell


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    """The p-value; cells that expect fewer than 5 are one."""
    few = p * counts.sum() < 5
    merged = [np.append(x[~few], x[few].sum()) for x in (counts, p * counts.sum())]
    return stats.chisquare(*(x[merged[1] > 0] for x in merged)).pvalue


FILTERS = {
    "temperature": Sampling(0.7),
    "top-k": Sampling(1.3, top_k=7),
    "top-p": Sampling(1.3, top_p=0.8),
    "min-p": Sampling(1.3, min_p=0.1),
    "typical-p": Sampling(1.3, typical_p=0.7),
    "all": Sampling(1.6, top_k=12, top_p=0.9, min_p=0.05, typical_p=0.9),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILTERS)
def test_a_hundred_thousand_draws_follow_what_the_filters_leave(name):
    how, params = FILTERS[name], make_params(TINY)
    counts, copies = np.zeros(32, int), [PROMPTS[1]] * 4096
    for seed in range(25):
        way = dataclasses.replace(how, seed=seed)
        drawn = decode.generate(TINY, params, copies, 1, None, way)
        counts += np.bincount(np.ravel(drawn), minlength=32)
    assert counts.sum() == 102_400
    logits = next_logits(TINY, params, PROMPTS[1])
    weights = np.exp((logits.astype(np.float64) - logits.max()) / how.temperature)
    kept = np.isin(np.arange(32), list(support(logits, how)))
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(kept))
    p = np.where(kept, weights, 0)
    assert chi_square(counts, p / p.sum()) > 1e-3
    skewed = p**1.1  # it can tell
    assert chi_square(counts, skewed / skewed.sum()) < 1e-6


def test_a_step_draws_given_what_was_drawn_before():
    params = make_params(TINY)
    drawn = np.array(decode.generate(TINY, params, [PROMPTS[1]] * 4096, 2, None, Sampling(seed=2)))
    first = np.bincount(drawn[:, 0]).argmax()
    second = np.bincount(drawn[drawn[:, 0] == first, 1], minlength=32)
    p = probabilities(TINY, params, np.append(PROMPTS[1], first))
    assert second.sum() > 300 and chi_square(second, p) > 1e-3


def support(logits: np.ndarray, how: Sampling) -> set[int]:
    """The ids that may be drawn, by the definition."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: how.top_k or None]
    weights = np.exp((logits[order].astype(np.float64) - logits.max()) / how.temperature)
    reached = np.cumsum(weights / weights.sum())
    n = int(np.argmax(reached >= how.top_p - 1e-12)) + 1 if how.top_p < 1 else len(order)
    kept = [i for i, w in zip(order[:n], weights, strict=False) if w >= how.min_p]
    if how.typical_p == 1:
        return set(kept)
    log_p = (logits[kept].astype(np.float64) - logits.max()) / how.temperature
    log_p -= np.log(np.exp(log_p).sum())
    nearest = np.argsort(np.abs(np.sum(np.exp(log_p) * log_p) - log_p), kind="stable")
    reached = np.cumsum(np.exp(log_p)[nearest])
    return {kept[i] for i in nearest[: int(np.argmax(reached >= how.typical_p - 1e-12)) + 1]}


def choose(logits: np.ndarray, how: list[Sampling], streams, prompts=None) -> np.ndarray:
    """One choice for each row, jitted."""
    n, v = logits.shape
    method = sampling.method(how)
    said = sampling.said(method, prompts or [np.zeros(0, np.int32)] * n, how, v)
    run = jax.jit(sampling.choose, static_argnums=0)
    where = np.zeros(n, np.int32)
    return np.asarray(run(method, logits, streams, where, sampling.knobs(how, v), said))


def test_supports_of_filters_are_exact():
    rng = np.random.default_rng(0)
    ranked, typical = jax.jit(sampling.ranked), jax.jit(sampling.typical)
    for _ in range(200):
        logits = rng.normal(0, 3, 50).astype(np.float32)
        logits[rng.integers(0, 50, 5)] = logits[0]  # ties: the lower id first
        temperature, top_p = float(rng.uniform(0.2, 3)), float(rng.uniform(0.01, 1))
        top_k, min_p = int(rng.integers(1, 51)), float(rng.uniform(0, 0.5))
        for case in ((top_k, 1.0, 0.0), (50, top_p, 0.0), (50, 1.0, min_p), (top_k, top_p, min_p)):
            order, kept = (np.asarray(a) for a in ranked(logits, temperature, *case))
            assert set(order[np.isfinite(kept)]) == support(logits, Sampling(temperature, *case))
            how = Sampling(temperature, *case, typical_p=top_p)
            left = np.isfinite(typical(kept, top_p))
            assert set(order[left]) == support(logits, how)


def test_rows_are_chosen_each_in_its_own_way():
    logits = np.random.default_rng(1).normal(0, 2, (7, 40)).astype(np.float32)
    how = [
        Sampling(0.0), Sampling(1.5, top_k=3), Sampling(1.0), Sampling(0.7, top_p=0.5),
        Sampling(2.0, min_p=0.3), Sampling(0.0, frequency_penalty=9.0),
        Sampling(1.2, typical_p=0.4),
    ]  # fmt: skip
    streams = sampling.streams([np.array([i]) for i in range(7)], 3)
    together = choose(logits, how, streams)
    alone = [choose(logits[i : i + 1], how[i : i + 1], streams[i : i + 1])[0] for i in range(7)]
    assert together.tolist() == [int(i) for i in alone]
    assert together[0] == logits[0].argmax() and together[5] == logits[5].argmax()


def test_the_likeliest_is_numpys_argmax():
    rng = np.random.default_rng(0)
    logits = rng.integers(-3, 4, (50, 33)).astype(np.float32)  # with ties
    logits[:3] = -np.inf
    np.testing.assert_array_equal(sampling.likeliest(logits), logits.argmax(axis=-1))


def test_penalties_and_bias_by_their_definitions():
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 2, 30).astype(np.float32)
    how = Sampling(
        repetition_penalty=1.7, frequency_penalty=0.3, presence_penalty=-0.4,
        logit_bias=((4, 2.5), (9, -1.0)),
    )  # fmt: skip
    prompt, generated = [3, 4, 5], [4, 8, 8, 8]
    want = logits.astype(np.float64)
    for i, more in how.logit_bias:
        want[i] += more
    for i in {*prompt, *generated}:
        want[i] = want[i] / 1.7 if want[i] > 0 else want[i] * 1.7
    for i in set(generated):
        want[i] -= 0.3 * generated.count(i) - 0.4
    method = sampling.method([how])
    said = sampling.said(method, [np.array(prompt)], [how], 30)
    for token in generated:
        said = sampling.noted(said, np.array([token]))
    knobs, said = (jax.tree.map(lambda a: a[0], x) for x in (sampling.knobs([how], 30), said))
    np.testing.assert_allclose(sampling.altered(logits, knobs, said), want, rtol=1e-5)


def test_filtered_draws_follow_the_renormalised_probabilities():
    logits = np.random.default_rng(3).normal(0, 1, 32).astype(np.float32)
    kept = support(logits, Sampling(0.8, 12, 0.8))
    assert 2 < len(kept) < 12
    weights = np.exp(logits.astype(np.float64) / 0.8)
    p = np.where(np.isin(np.arange(32), list(kept)), weights, 0)
    n = 20_000
    streams = sampling.streams([np.array([i]) for i in range(n)], seed=0)
    drawn = choose(np.tile(logits, (n, 1)), [Sampling(0.8, 12, 0.8)] * n, streams)
    counts = np.bincount(drawn, minlength=32)
    assert set(np.flatnonzero(counts)) == kept
    assert chi_square(counts, p / p.sum()) > 1e-3


def test_copies_and_seeds_draw_differently():
    params = make_params(TINY)

    def draw(prompts, seed):
        return decode.generate(TINY, params, prompts, 16, None, Sampling(top_k=31, seed=seed))

    a, b, _ = draw([PROMPTS[0], PROMPTS[0], PROMPTS[1]], 1)
    _, again, _ = draw([PROMPTS[2], PROMPTS[0], PROMPTS[1]], 1)
    _, other, _ = draw([PROMPTS[2], PROMPTS[0], PROMPTS[1]], -2)
    np.testing.assert_array_equal(a, again)
    assert (a != b).any() and (a != other).any()


# ------------------------------------------------------------------------------------ what is said

BYTES = dataclasses.replace(TINY, vocab_size=256)


def test_probes_are_the_softmax_of_apply():
    params = make_params(BYTES)
    prompts = ["the sky is ", "a", "日本"]
    rows = watch.probes(Bytes(), prompts, k=5)(Config(model=BYTES), params, 70)
    assert [row["probe/prompt"] for row in rows] == prompts
    for row in rows:
        p = probabilities(BYTES, params, Bytes().encode(row["probe/prompt"]))
        best = np.argsort(-p)[:5]
        assert row.keys() == {"step", "probe/prompt", "probe/top"} and row["step"] == 70
        assert [text for text, _ in row["probe/top"]] == [
            watch.token_text(Bytes(), int(i)) for i in best
        ]
        np.testing.assert_allclose([share for _, share in row["probe/top"]], p[best], rtol=1e-5)


def test_samples_are_the_same_at_each_step_of_the_same_model():
    params = make_params(BYTES)
    observe = watch.samples(Bytes(), ["def ", "日本"], 12, seed=4)
    first, second = (observe(Config(model=BYTES), params, step) for step in (10, 20))
    assert [row["step"] for row in second] == [20, 20]
    assert [row["sample/text"] for row in first] == [row["sample/text"] for row in second]
    prompts = Bytes().encode_batch(["def ", "日本"])
    ids = decode.generate(BYTES, params, prompts, 12, Bytes.eos_id, Sampling(seed=4))
    assert first[1] == {
        "step": 10, "sample/prompt": "日本", "sample/text": Bytes().decode(ids[1])
    }  # fmt: skip


def test_every_token_is_readable():
    text = [watch.token_text(Bytes(), i) for i in range(257)]
    assert text[ord("a")] == "a" and text[ord("\n")] == "\n"
    assert text[0xE3] == "\\xe3" and text[0] == "<|endoftext|>" and text[256] == "<256>"
    words = create("bpe", 280, ["日本 日本 the sky"] * 3)
    shown = [watch.token_text(words, i) for i in range(words.vocab_size)]
    assert all(shown) and not any("\ufffd" in s for s in shown) and "日本" in shown


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("prompt", "new", "kwargs", "says"),
    [
        ([], 4, {}, r"prompts\[1\]: expected at least one token"),
        ([3, 99], 4, {}, r"prompts\[1\]: token 99 .* 0 … 31"),
        ([1] * 60, 6, {}, r"prompts\[1\]: 60 tokens and 6 new ones need 65 .* learned 64 .* by 1"),
        ([1], 0, {}, "max_new_tokens: expected at least 1, got 0"),
        ([1], 4, {"temperature": -1.0}, "temperature: expected .* got -1.0"),
        ([1], 4, {"top_p": 0.0}, "top_p: expected above 0 .* got 0.0"),
        ([1], 4, {"top_k": -3}, "top_k: expected 0 .* got -3"),
        ([1], 4, {"top_k": 0.5}, "top_k: expected int, got 0.5"),
        ([1], 4, {"min_p": 1.5}, "min_p: expected 0 .* got 1.5"),
        ([1], 4, {"typical_p": 0.0}, "typical_p: expected above 0 .* got 0.0"),
        ([1], 4, {"repetition_penalty": 0.0}, "repetition_penalty: .* got 0.0"),
        ([1], 4, {"logit_bias": ((99, 1.0),)}, r"logit_bias: expected token ids in 0 … 31"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(prompt, new, kwargs, says):
    config = VARIANTS["learned, layernorm, bias, untied, unrolled"]
    with pytest.raises(UserError, match=says):
        decode.generate(
            config, {}, [np.array([1]), np.array(prompt)], new, None, Sampling(**kwargs)
        )


def test_prompts_are_checked_before_training():
    learned = dataclasses.replace(BYTES, positions="learned", seq_len=16)
    config = Config(model=learned)
    ok = dataclasses.replace(
        config.train, probes=("x" * 16,), sample_prompts=("abc",), sample_tokens=14
    )
    watch.check_prompts(dataclasses.replace(config, train=ok), Bytes())
    for field in ({"probes": ("x" * 17,)}, {"sample_tokens": 15}, {"probes": ("a", "")}):
        bad = dataclasses.replace(config, train=dataclasses.replace(ok, **field))
        with pytest.raises(UserError, match=r"config\.train\.(probes|sample_prompts)\[[01]\]: "):
            watch.check_prompts(bad, Bytes())


def test_an_own_layer_without_a_cache_is_refused(tmp_path):
    (tmp_path / "own.py").write_text(
        "from jaxlm.model.layers import Block\n\n\n"
        "class Forgetful(Block):\n"
        "    def __call__(self, x_btd, context, cache=None):\n"
        "        return super().__call__(x_btd, context, None)\n"
    )
    own = dataclasses.replace(TINY, layer=f"{tmp_path}/own.py:Forgetful")
    with pytest.raises(UserError, match=r"config\.model\.layer: .*own\.py:Forgetful .* no cache"):
        greedy(own, make_params(own), PROMPTS, 3)
