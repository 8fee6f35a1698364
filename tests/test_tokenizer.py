"""Round trips, counts of bytes, and refusals, for every kind of tokenizer."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxlm.data import tokenizer as tokenizers
from jaxlm.schema import JaxlmError, UserError

TEXTS = [
    "今日はいい天気ですね。明日も晴れるでしょう。" * 20,
    "The quick brown fox jumps over the lazy dog. " * 40,
    "def f(x):\n    return x + 1\n" * 40,
]


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.create("bpe", 400, TEXTS)


NEEDS = {"unigram": ("sentencepiece",), "bpe+sudachi": ("sudachipy", "sudachidict_core")}


@pytest.fixture(
    scope="module", params=["bytes", "bpe", "bpe reloaded", "chars", "unigram", "bpe+sudachi"]
)
def any_tokenizer(request, bpe, tmp_path_factory):
    if request.param not in ("bpe", "bpe reloaded"):
        for module in NEEDS.get(request.param, ()):
            pytest.importorskip(module)
        made = tokenizers.create(request.param, 450, TEXTS)
        assert made.lossless
        return made
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe.save(folder)
    return bpe if request.param == "bpe" else tokenizers.load(folder)


def check_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert not len(ids) or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode().replace(b"\0", b""))
    np.testing.assert_array_equal(tokenizer.encode_batch([text, "a"])[0], ids)


@settings(max_examples=300, deadline=None)
@given(text=st.text())
@example("今日はいい天気ですね。")
@example("👩‍👩‍👧‍👦 e\u0301 \u2028 \ufeff \ufffd \r\n\t  x")
@example("<|endoftext|> a<|endoftext|>")
@example("<0x41> <<0x00>> ▁▁a ▁")
@example("")
def test_every_text_comes_back_exactly_and_its_bytes_are_counted(any_tokenizer, text):
    if any_tokenizer.kind != "bytes":
        text = text.replace("\0", "")  # test below
    check_round_trip(any_tokenizer, text)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(text=st.text())
def test_ten_thousand_texts_come_back_exactly(any_tokenizer, text):
    check_round_trip(any_tokenizer, text.replace("\0", ""))


def test_nul_stays_possible(any_tokenizer):
    assert any_tokenizer.decode(any_tokenizer.encode("a\0b")) == "a\0b"


def test_text_that_spells_the_end_does_not_end(bpe):
    assert bpe.eos_id not in bpe.encode("a <|endoftext|> b")
    assert bpe.decode([bpe.eos_id]) == "<|endoftext|>"


def test_half_a_character_and_unknown_ids_do_not_break_decoding(any_tokenizer):
    ids = any_tokenizer.encode("ꙮ")
    assert "\ufffd" in any_tokenizer.decode(ids[:1])
    known = any_tokenizer.encode("ab")
    beyond = [-1, any_tokenizer.vocab_size, 10**9]
    assert any_tokenizer.decode([*beyond, *known]) == "ab"
    assert any_tokenizer.decode([]) == ""


def test_the_end_is_an_id_of_no_bytes(any_tokenizer):
    counts = any_tokenizer.token_bytes()
    assert counts.shape == (any_tokenizer.vocab_size,) and counts.dtype == np.int32
    assert counts[any_tokenizer.eos_id] == 0
    assert (np.delete(counts, any_tokenizer.eos_id) > 0).all()


def test_saving_and_loading_keep_the_fingerprint(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path)
    again = tokenizers.load(tmp_path)
    assert again.fingerprint == any_tokenizer.fingerprint and len(again.fingerprint) == 64
    assert (again.vocab_size, again.eos_id) == (any_tokenizer.vocab_size, any_tokenizer.eos_id)
    np.testing.assert_array_equal(again.token_bytes(), any_tokenizer.token_bytes())
    assert json.loads((tmp_path / "jaxlm.json").read_text())["format"] == "jaxlm.tokenizer/1"


def test_an_altered_or_missing_tokenizer_is_refused(bpe, tmp_path):
    bpe.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"vocab":{', '"vocab":{"zzz":999,', 1))
    with pytest.raises(JaxlmError, match="altered"):
        tokenizers.load(tmp_path)
    file.write_text("{")
    with pytest.raises(JaxlmError):
        tokenizers.load(tmp_path)
    with pytest.raises(JaxlmError, match="no readable tokenizer"):
        tokenizers.load(tmp_path / "none")


# ----------------------------------------------------------------------------------------- training

TRAIN = """
import sys
from jaxlm.data.tokenizer import create
texts = ["word%d wörter %d 言葉" % (i % 97, i % 89) * 5 for i in range(3000)]
print(create(sys.argv[1], 600, texts).fingerprint)
"""


@pytest.mark.parametrize("name", ["bpe", "wordpiece", "unigram", "chars"])
def test_training_is_the_same_in_every_process(name):
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    found = set()
    for parallel, seed in (("true", "1"), ("false", "2")):
        env = {**os.environ, "TOKENIZERS_PARALLELISM": parallel, "PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, "-c", TRAIN, name], env=env, capture_output=True, text=True, check=True
        )
        found.add(run.stdout)
    assert len(found) == 1


def test_a_trained_vocabulary_is_used(bpe):
    assert 257 < bpe.vocab_size <= 400
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 4


# --------------------------------------------------------------------------------- a tokenizer.json


@pytest.fixture
def wordpiece(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "un": 3, "##able": 4, "é": 5, "##": 6}
    inner = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    inner.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    inner.enable_truncation(2)
    inner.enable_padding(length=8)
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_any_tokenizer_json_is_read_without_its_truncation_padding_and_specials(wordpiece):
    found = tokenizers.create(str(wordpiece), 7, [])
    assert found.encode("unable é unable").tolist() == [3, 4, 5, 3, 4]
    assert (found.vocab_size, found.eos_id, found.eos) == (7, 2, "[SEP]")
    assert found.token_bytes().tolist() == [0, 0, 0, 2, 4, 2, 0]


def test_its_end_of_text_is_the_one_it_states(wordpiece):
    config = wordpiece.with_name("tokenizer_config.json")
    config.write_text('{"eos_token": {"content": "[CLS]"}}')
    assert tokenizers.from_file(wordpiece).eos == "[CLS]"
    config.write_text('{"eos_token": "<end>"}')
    with pytest.raises(UserError, match="no end of text"):
        tokenizers.from_file(wordpiece)


def test_sentencepiece_spellings_count_the_bytes_they_stand_for(tmp_path):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces = [("</s>", 0.0), ("▁日本", -1.0), ("a", -1.0), ("<0xE6>", -9.0), ("##", -1.0)]
    inner = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    inner.add_special_tokens(["</s>"])
    inner.add_tokens([AddedToken("wörd", normalized=False)])
    inner.save(str(tmp_path / "tokenizer.json"))
    found = tokenizers.from_file(tmp_path / "tokenizer.json")
    assert found.token_bytes().tolist() == [0, 7, 1, 1, 2, 5]


def test_gpt2s_two_files_are_the_tokenizer_that_they_describe(bpe, tmp_path):
    spec = json.loads(bpe.inner.to_str())["model"]
    for vocab, merges in tokenizers.PAIRS:
        folder = tmp_path / vocab
        folder.mkdir()
        (folder / vocab).write_text(json.dumps(spec["vocab"]))
        lines = [
            "#version: 0.2",
            *(m if isinstance(m, str) else " ".join(m) for m in spec["merges"]),
        ]
        (folder / merges).write_text("\n".join(lines) + "\n")
        found = tokenizers.from_file(folder)
        assert found.lossless and found.eos_id == bpe.eos_id
        for text in TEXTS:
            np.testing.assert_array_equal(found.encode(text), bpe.encode(text))


def test_a_vocab_txt_is_berts_tokenizer(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##able", "café", "日"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    found = tokenizers.create(str(tmp_path), 8, [])
    assert found.encode("Unable 日本 [SEP]").tolist()[:4] == [4, 5, 7, 1]
    assert not found.lossless and found.eos == "[SEP]"


def test_what_loses_text_says_so():
    found = tokenizers.create("wordpiece", 200, TEXTS)
    assert not found.lossless
    assert found.decode(found.encode("the  quick")) == "the quick"


def test_a_sentencepiece_model_is_run_by_its_own_library(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:2] * 20),
        model_prefix=str(tmp_path / "m"),
        vocab_size=330,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    found = tokenizers.create(str(tmp_path / "m.model"), 400, [])
    peer = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    text = "今日は quick 🦊"
    assert found.encode(text).tolist() == peer.encode(text)
    assert found.decode(found.encode(text)) == text and not found.lossless  # it squeezes spaces
    found.save(tmp_path / "saved")
    assert tokenizers.load(tmp_path / "saved").fingerprint == found.fingerprint


def test_words_of_japanese_are_never_joined():
    pytest.importorskip("sudachidict_core")
    from jaxlm.data import japanese

    words = japanese.segmenter()
    assert words("今日はいい天気ですね。x 1") == [
        "今日", "は", "いい", "天気", "です", "ね", "。x 1"
    ]  # fmt: skip
    text = "私は東京都に住んでいます。" * 3000 + "End"
    assert "".join(words(text)) == text
    found = tokenizers.create("bpe+sudachi", 600, TEXTS)
    pieces = [found.decode([i]) for i in found.encode("今日はいい天気ですね。")]
    assert not any("日は" in p or "すね" in p for p in pieces)


# ----------------------------------------------------------------------------------------- refusals


def test_refusals_name_the_field_and_the_numbers(wordpiece, tmp_path):
    def refusal(name, vocab_size):
        with pytest.raises(UserError) as e:
            tokenizers.create(name, vocab_size, TEXTS)
        assert "\n" not in str(e.value)
        return str(e.value)

    assert refusal("bytes", 100) == (
        "model.vocab_size: tokenizer 'bytes' has 256 ids, more than the 100 that the model and its"
        " objective leave to text; raise it by at least 156"
    )
    assert "has 7 ids, more than the 6" in refusal(str(wordpiece), 6)
    assert "at least 257 ids" in refusal("bpe", 256)
    assert "did you mean 'bytes'?" in refusal("byte", 256)
    assert "cannot read" in refusal("no/tokenizer.json", 256)
    (tmp_path / "bad.json").write_text("{}")
    assert "is not a tokenizer.json" in refusal(str(tmp_path / "bad.json"), 256)
