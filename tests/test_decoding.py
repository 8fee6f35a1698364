"""Whole answers against those of transformers: tests/golden/generate.py wrote them down."""

import functools
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small

from jaxlm import mesh
from jaxlm.config import Config, MeshConfig
from jaxlm.generate import beams, decode, layout
from jaxlm.generate.sampling import Sampling
from jaxlm.model.hf import load
from jaxlm.schema import UserError

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
NAMES = ("gpt2", "llama3", "t5", pytest.param("mistral", marks=pytest.mark.slow))
EOS, NEW = 2, 20
SAMPLED = {
    "greedy": Sampling(0.0),
    "repetition": Sampling(0.0, repetition_penalty=1.4),
    "bias": Sampling(0.0, logit_bias=((7, 3.0), (11, -20.0))),
}
BEAMS = {"beams": 1.0, "long_beams": 2.0, "short_beams": -1.0}  # length penalties


def prompts() -> list[np.ndarray]:
    """As tests/golden/generate.py makes them."""
    rng = np.random.default_rng(7)
    lengths = rng.integers(1, 12, 6)
    return [rng.integers(3, 64, length).astype(np.int32) for length in lengths]


@pytest.fixture(autouse=True)
def quickly():
    with small.compiled_quickly():
        yield


@functools.lru_cache
def model(name: str, shape=(1, 1, 1)):
    checkpoint = load.open_folder(GOLDEN / name)
    config = Config(model=checkpoint.config, mesh=MeshConfig(*shape))
    on = mesh.make(config, jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(on):
        return checkpoint.config, load.load(checkpoint), on


def rows(found: list[np.ndarray], new: int = NEW) -> np.ndarray:
    out = np.full((len(found), new), -1, np.int32)
    for row, ids in zip(out, found, strict=True):
        row[: len(ids)] = ids
    return out


@pytest.mark.parametrize("name", NAMES)
def test_greedy_answers_are_those_of_transformers(name: str) -> None:
    config, params, on = model(name)
    want = np.load(GOLDEN / name / "generated.npz")
    with jax.set_mesh(on):
        for way, how in SAMPLED.items():
            found = decode.generate(config, params, prompts(), NEW, EOS, how)
            np.testing.assert_array_equal(rows(found), want[way], err_msg=way)
    assert (want["greedy"] != want["repetition"]).any() and (want["greedy"] != want["bias"]).any()


@pytest.mark.parametrize("name", NAMES)
def test_beams_are_those_of_transformers(name: str) -> None:
    config, params, on = model(name)
    want = np.load(GOLDEN / name / "generated.npz")
    with jax.set_mesh(on):
        for way, penalty in BEAMS.items():
            found = beams.search(config, params, prompts(), NEW, EOS, 3, penalty)
            best = rows([answers[0] for answers in found])
            np.testing.assert_array_equal(best, want[way], err_msg=way)
            assert all(len(answers) == 3 for answers in found)
            assert all(len({a.tobytes() for a in answers}) == 3 for answers in found)
    assert (want["greedy"] != want["beams"]).any()


LONG = {
    "gpt2": {"n_positions": 128},
    "smollm2": {"max_position_embeddings": 128, "tie_word_embeddings": True},
    "t5": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_32_answers_of_64_tokens_are_those_of_transformers_live(name: str, tmp_path: Path) -> None:
    """Greedy and by beams, in a batch and alone."""
    pytest.importorskip("torch", reason="needs the extra parity: pip install -e '.[parity]'")
    pytest.importorskip("transformers")
    import generate
    import make

    *classes, values = make.MODELS["llama3" if name == "smollm2" else name]
    values = {k: v for k, v in values.items() if name != "smollm2" or k != "rope_parameters"}
    make.MODELS[name] = (*classes, {**values, **LONG[name]})
    theirs = make.build(name, seed=7 if name == "gpt2" else 3)  # one that repeats itself little
    theirs.save_pretrained(tmp_path)
    checkpoint = load.open_folder(tmp_path)
    given = generate.prompts(32, 1, 40)
    with jax.set_mesh(mesh.make(Config(model=checkpoint.config), jax.devices()[:1])):
        config, params = checkpoint.config, load.load(checkpoint)
        want = generate.answers(theirs, given, 64, {})
        found = decode.generate(config, params, given, 64, EOS, Sampling(0.0))
        np.testing.assert_array_equal(rows(found, 64), want)
        laid = layout.laid_out(config, params)
        for prompt, answer in zip(given[:8], found, strict=False):
            [alone] = decode.generate(config, laid, [prompt], 64, EOS, Sampling(0.0))
            np.testing.assert_array_equal(alone, answer)
        want = generate.answers(theirs, given, 64, {"num_beams": 3})
        best = [answers[0] for answers in beams.search(config, params, given, 64, EOS, 3)]
        np.testing.assert_array_equal(rows(best, 64), want)
    assert len(np.unique(want)) > 10


@pytest.mark.slow
def test_beams_on_eight_devices_are_those_on_one() -> None:
    config, params, on = model("llama3", (2, 2, 2))
    want = np.load(GOLDEN / "llama3" / "generated.npz")["beams"]
    with jax.set_mesh(on):
        found = beams.search(config, params, prompts(), NEW, EOS, 3)
    np.testing.assert_array_equal(rows([answers[0] for answers in found]), want)


def test_more_beams_than_half_the_vocabulary_are_refused() -> None:
    config, params, on = model("gpt2")
    with jax.set_mesh(on), pytest.raises(UserError, match=r"num_beams: expected 1 … 32, got 33"):
        beams.search(config, params, prompts(), NEW, EOS, 33)
