"""`jaxlm.from_pretrained`: folders, GGUF files, runs; logits, generate, score, embed; export."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from small import GOLDEN, TEXT
from test_main import call

import jaxlm
from jaxlm.data import pretrained, tokenizer
from jaxlm.generate import decode
from jaxlm.generate.sampling import Sampling
from jaxlm.model import transformer
from jaxlm.schema import UserError


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with small.compiled_quickly():
        yield


@pytest.fixture(scope="module")
def words() -> tokenizer.Subword:
    return small.words()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.golden("gpt2", tmp_path_factory.mktemp("gpt2") / "gpt2")


@pytest.fixture(scope="module")
def gpt2(folder: Path):
    return jaxlm.from_pretrained(folder)


def test_logits_are_the_golden_ones(gpt2) -> None:
    golden = np.load(GOLDEN / "gpt2" / "output.npz")
    got = gpt2.logits(golden["tokens"])
    assert got.shape == golden["output"].shape and got.dtype == np.float32
    assert np.abs(np.asarray(got) - golden["output"]).max() <= 1e-4
    one = gpt2.logits(golden["tokens"][:1, :5].tolist())  # as lists; prefixes do not see the rest
    assert np.abs(np.asarray(one) - golden["output"][:1, :5]).max() <= 1e-4
    for bad in ([1, 2], [[0.5]], [[64]]):
        with pytest.raises(UserError, match="token"):
            gpt2.logits(bad)


def test_generate_obeys_every_argument(gpt2, words: tokenizer.Subword) -> None:
    prompts = ["the sky", "a bird sings in"]
    lengths = [len(words.encode(p)) for p in prompts]
    found = gpt2.generate(prompts, max_length=20, num_return_sequences=3, seed=1)
    assert [len(texts) for texts in found] == [3, 3]
    for prompt, texts in zip(prompts, found, strict=True):
        assert len(set(texts)) == 3  # drawn apart
        assert all(text.startswith(prompt) for text in texts)
    assert found == gpt2.generate(prompts, max_length=20, num_return_sequences=3, seed=1)
    assert found != gpt2.generate(prompts, max_length=20, num_return_sequences=3, seed=2)
    assert [found[1]] == gpt2.generate(
        prompts[1], max_length=20, num_return_sequences=3, seed=1
    )  # whatever else is in the batch

    ids = words.encode(prompts[0])
    [[text]] = gpt2.generate(prompts[0], max_new_tokens=5, temperature=0)
    for _ in range(5):
        step = int(np.asarray(gpt2.logits(ids[None]))[0, -1].argmax())
        if step == words.eos_id:
            break
        ids = np.append(ids, step)
    assert text == words.decode(ids)
    assert gpt2.generate(prompts[0], max_length=lengths[0] + 5, temperature=0) == [[text]]
    assert gpt2.generate(prompts[0], max_new_tokens=5, top_k=1) == [[text]]
    assert gpt2.generate(prompts[0], max_new_tokens=5, top_p=1e-9) == [[text]]

    for bad, said in (
        ({"max_length": 5, "max_new_tokens": 5}, "one of them"),
        ({"max_length": lengths[0]}, "tokens already"),
        ({"num_return_sequences": 0, "max_new_tokens": 4}, "num_return_sequences"),
        ({"max_new_tokens": 60}, "positions"),
        ({"temperature": -1.0, "max_new_tokens": 4}, "temperature"),
    ):
        with pytest.raises(UserError, match=said):
            gpt2.generate(prompts[0], **bad)


def test_continuations_tell_what_was_said_how_likely_it_was_and_why_it_ended(gpt2, words) -> None:
    how = {"max_new_tokens": 18, "seed": 2}  # most ids of the tiny vocabulary stand for no text
    [[said]] = gpt2.continuations("the sky", **how)
    assert [[said.text]] == gpt2.generate("the sky", return_full_text=False, **how)
    prompt = words.encode("the sky")
    assert words.decode([*prompt, *said.token_ids]) == "the sky" + said.text
    logits = gpt2.logits(np.concatenate([prompt, said.token_ids])[None])[0]
    log_p = np.asarray(jax.nn.log_softmax(logits))[len(prompt) - 1 : -1]
    want = log_p[np.arange(len(said.token_ids)), said.token_ids]
    np.testing.assert_allclose(said.log_probs, want, atol=1e-4)
    assert said.finish_reason == "length" and len(said.token_ids) == 18

    stop = said.text[2:4]
    assert len(stop) == 2
    [[short], [other]] = gpt2.continuations(["the sky", "a"], stop=["", stop], **how)
    assert short.finish_reason == "stop" and short.text == said.text[: said.text.find(stop)]
    n = len(short.token_ids)
    assert short.token_ids.tolist() == said.token_ids[:n].tolist() and n < 18
    assert stop in words.decode([*prompt, *short.token_ids])
    assert stop not in words.decode([*prompt, *short.token_ids[:-1]])[len("the sky") :]
    assert len(short.log_probs) == n and stop not in other.text
    found = gpt2.continuations(["the", "a"], num_return_sequences=2, max_length=8, seed=1)
    again = gpt2.generate(["the", "a"], num_return_sequences=2, max_length=8, seed=1)
    assert again == [[p + c.text for c in of] for p, of in zip(["the", "a"], found, strict=True)]


def test_an_encoder_decoder_writes_what_transformers_would(words, tmp_path: Path) -> None:
    """T5, greedily: each token is the most likely one after the start and those before."""
    t5 = Path(shutil.copytree(GOLDEN / "t5", tmp_path / "t5"))
    for name, text in pretrained.as_files(words, 32).items():
        (t5 / name).write_text(text)
    model = jaxlm.from_pretrained(t5)
    [[text]] = model.generate("the sea", max_length=6, temperature=0)
    source = words.encode("the sea")[None]
    how = words.eos_id, Sampling(0.0)
    with jax.set_mesh(model.mesh):
        [new] = decode.generate(model.config, model.params, list(source), 5, *how)
    assert text == words.decode(new)  # some ids of the tiny vocabulary stand for no text
    ids = np.concatenate([[0], new])[None].astype(np.int32)  # 0: T5's start
    where = np.arange(source.shape[1], dtype=np.int32)[None]
    given = transformer.Source(source, where, np.ones_like(where))
    with jax.set_mesh(model.mesh):
        run = jax.jit(functools.partial(transformer.apply, model.config))
        best = np.asarray(run(model.params, ids, source=given))[0].argmax(-1)
    assert best[:-1].tolist() == ids[0, 1:].tolist()
    assert ids.shape[1] == 6 or best[-1] == words.eos_id  # max_length counts the start
    with pytest.raises(UserError, match="encoder_decoder"):
        model.score("the sea")


def test_score_is_the_sum_of_log_probabilities(gpt2, words: tokenizer.Subword) -> None:
    texts = ["the sky is blue", "a fish", "the sea is wide and the sky is blue and the"]
    scores = gpt2.score(texts)
    for text, score in zip(texts, scores, strict=True):
        ids = np.concatenate([[words.eos_id], words.encode(text)])
        row = np.asarray(gpt2.logits(ids[None])[0], np.float64)
        log_p = row - np.log(np.exp(row).sum(-1, keepdims=True))
        want = log_p[np.arange(len(ids) - 1), ids[1:]].sum()
        assert score.log_probability == pytest.approx(want, abs=1e-4)
        assert (score.tokens, score.bytes) == (len(ids) - 1, len(text))
        assert score.bits_per_byte == pytest.approx(-want / np.log(2) / len(text))
        assert score.perplexity == pytest.approx(np.exp(-want / score.tokens))
    with pytest.raises(UserError, match=r"texts\[1\]"):
        gpt2.score(["a", ""])


def test_embeddings_do_not_depend_on_the_batch(gpt2) -> None:
    texts = ["the sky is blue", "a fish", "the sea is wide and the sky is blue"]
    together = gpt2.embed(texts)
    assert together.shape == (3, 16) and together.dtype == np.float32
    for i, text in enumerate(texts):
        np.testing.assert_allclose(gpt2.embed(text)[0], together[i], atol=1e-5)


def test_export_of_a_run_is_read_back(tmp_path: Path, capsys) -> None:
    """train → export --verify → from_pretrained, through the command line."""
    from jaxlm.config import Config, DataConfig, ModelConfig, TrainConfig

    for i, text in enumerate(TEXT):
        (tmp_path / f"{i}.txt").write_text(f"{i}: {text} " * 5)
    config = Config(
        model=ModelConfig(d_model=16, n_layers=1, n_heads=2, seq_len=16),
        data=DataConfig(sources=(str(tmp_path),), eval_sequences=4, eval_fraction=0.3),
        train=TrainConfig(steps=3, global_batch_size=8, log_every=3),
    )
    run, out = tmp_path / "run", tmp_path / "out"
    jaxlm.train(config, run)
    arguments = ("export", f"--workdir={run}", f"--out={out}", "--verify", "--json")
    assert call(*arguments) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["family"] == "arcee" and found["verified"]["jaxlm"] <= 1e-5
    ours, again = jaxlm.from_pretrained(run), jaxlm.from_pretrained(out)
    assert [int(i) for i in again.tokenizer.encode("Äé\n日")] == [*"Äé\n日".encode()]
    assert again.tokenizer.decode([*"Äé\n日".encode()]) == "Äé\n日"
    how = {"max_new_tokens": 8, "temperature": 0}
    assert ours.generate(["the sky"], **how) == again.generate(["the sky"], **how)
    assert call(*arguments) == 2 and "not empty" in capsys.readouterr().err


def test_nothing_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="no such folder"):
        jaxlm.from_pretrained(tmp_path / "not" / "there")
    (tmp_path / "model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="code"):
        jaxlm.from_pretrained(tmp_path / "model.bin")
    shutil.copytree(GOLDEN / "gpt2", tmp_path / "wordless")
    with pytest.raises(UserError, match="holds none of"):
        jaxlm.from_pretrained(tmp_path / "wordless")


# ----------------------------------------------------------------------------------------- inspect


def test_inspect_says_what_the_logits_say(gpt2, words: tokenizer.Subword) -> None:
    found = gpt2.inspect("the sky is", top=3)
    ids = words.encode("the sky is")
    assert [entry["id"] for entry in found["tokens"]] == ids.tolist()
    assert "".join(entry["text"] for entry in found["tokens"]) == "the sky is"
    assert found["maps"].shape == (2, 4, len(ids), len(ids))
    np.testing.assert_allclose(found["maps"].sum(-1), 1, atol=1e-5)
    logits = np.asarray(gpt2.logits(ids[None])[0])
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for row, best in zip(share, found["next"], strict=True):
        assert [p for _, p in best] == pytest.approx(sorted(row.tolist())[:-4:-1], abs=1e-5)


def test_the_page_is_safe_and_whole(folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "page.html"
    nasty = "a <script>alert(1)</script> \"'&amp; b"
    # the tiny vocabulary spells only letters that it knows, but the prompt itself is shown whole
    arguments = ("inspect", f"--workdir={folder}", f"--prompt={nasty}", f"--out={out}")
    assert call(*arguments) == 0 and capsys.readouterr().out.strip() == str(out)
    page = out.read_text()
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &quot;&#x27;&amp;amp; b" in page
    assert "default-src &#x27;none&#x27;" in page
    for layer in range(2):
        for head in range(4):
            assert page.count(f'id="map-{layer}-{head}"') == 1
            assert page.count(f'href="#map-{layer}-{head}"') >= 1
    assert page.count("data:image/png;base64,") == 2 * 2 * 4  # small and large


def test_an_encoder_embeds_and_is_inspected_but_does_not_write(tmp_path: Path) -> None:
    bert = Path(shutil.copytree(GOLDEN / "bert_base", tmp_path / "bert"))
    letters = "abcdefghijklmnopqrstuvwxy"
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (bert / "vocab.txt").write_text("\n".join(vocab))
    (bert / "1_Pooling").mkdir()
    pooling = bert / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True}))
    (bert / "modules.json").write_text('[{"type": "sentence_transformers.models.Normalize"}]')
    model = jaxlm.from_pretrained(bert)
    found = model.inspect("a sky")
    assert [entry["text"] for entry in found["tokens"]][:1] == ["[CLS]"]
    assert found["next"] == [] and (found["maps"][:, :, 0] > 0).all()  # looks both ways
    first = model.embed(["a sky", "the sea is wide"])
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(model.embed("a sky")[0], first[0], atol=1e-6)
    pooling.write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    assert np.abs(jaxlm.from_pretrained(bert).embed("a sky")[0] - first[0]).max() > 1e-3
    for call_it in (lambda: model.generate("a"), lambda: model.score("a")):
        with pytest.raises(UserError, match="encoder"):
            call_it()


# -------------------------------------------------------------------------------------------- GGUF


def write_gguf(path: Path, words: tokenizer.Subword, **change) -> None:
    """The golden Llama (its rotary positions unscaled) as llama.cpp would store it."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((GOLDEN / "llama3" / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, change.get("architecture", "llama"))
    writer.add_context_length(32)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    spec = json.loads(words.inner.to_str())
    vocab = words.inner.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=lambda t: vocab[t])
    writer.add_tokenizer_model(change.get("model", "gpt2"))
    writer.add_tokenizer_pre(change.get("pre", "gpt-2"))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t == "<|endoftext|>" else 1 for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
    writer.add_eos_token_id(words.eos_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, x in load_file(GOLDEN / "llama3" / "model.safetensors").items():
        part = name.split(".")[-2]
        if part in heads:  # as llama.cpp's converter permutes them
            n = heads[part]
            x = x.reshape(n, 2, x.shape[0] // n // 2, -1).swapaxes(1, 2).reshape(x.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_the_model_that_was_stored(words: tokenizer.Subword, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    write_gguf(path, words)
    model = jaxlm.from_pretrained(tmp_path)
    assert model.tokenizer.encode("the sea is").tolist() == words.encode("the sea is").tolist()
    assert model.tokenizer.eos_id == words.eos_id
    hf = shutil.copytree(GOLDEN / "llama3", tmp_path / "hf")
    config = json.loads((hf / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0}
    (hf / "config.json").write_text(json.dumps(config))
    for name, text in pretrained.as_files(words, 32).items():
        (hf / name).write_text(text)
    ids = np.arange(24).reshape(2, 12)
    want = jaxlm.from_pretrained(hf).logits(ids)
    np.testing.assert_allclose(model.logits(ids), want, atol=1e-5)


def test_a_damaged_or_unknown_gguf_is_told_in_one_line(
    words: tokenizer.Subword, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    good, path = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    write_gguf(good, words)

    def refused() -> str:
        with pytest.raises(UserError) as caught:
            jaxlm.from_pretrained(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return str(caught.value)

    for change, said in (
        ({"architecture": "mamba"}, "architecture 'mamba'"),
        ({"model": "rwkv"}, "tokenizer.ggml.model"),
        ({"pre": "other"}, "tokenizer.ggml.pre"),
    ):
        write_gguf(path, words, **change)
        assert said in refused()
    data = good.read_bytes()
    for n in (0, 3, 30, 200, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:n])
        refused()
    # the type of the first tensor: after its name, number of axes and axes
    name = b"output_norm.weight"
    at = data.index(name) + len(name) + 4 + 8
    for kind in (gguf.GGMLQuantizationType.I8, 99):
        path.write_bytes(data[:at] + int(kind).to_bytes(4, "little") + data[at + 4 :])
        refused()


def test_functions_are_not_hidden_by_the_folders_of_their_names() -> None:
    """`jaxlm.train` the function, also after `jaxlm.train.loop` was imported."""
    import importlib

    for folder in ("jaxlm.train.loop", "jaxlm.generate.decode", "jaxlm.report.page"):
        importlib.import_module(folder)
    for name in jaxlm.__all__:
        assert callable(getattr(jaxlm, name)), name
