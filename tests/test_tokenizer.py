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


@pytest.fixture(scope="module", params=["bytes", "bpe", "bpe reloaded"])
def any_tokenizer(request, bpe, tmp_path_factory):
    if request.param == "bytes":
        return tokenizers.create("bytes", 256, [])
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
@example("")
def test_every_text_comes_back_exactly_and_its_bytes_are_counted(any_tokenizer, text):
    if any_tokenizer.kind == "subword":
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
from jaxlm.data.tokenizer import train_bpe
texts = ["word%d wörter %d 言葉" % (i % 97, i % 89) * 5 for i in range(3000)]
print(train_bpe(texts, 600).fingerprint)
"""


def test_training_is_the_same_in_every_process():
    found = set()
    for parallel, seed in (("true", "1"), ("false", "2")):
        env = {**os.environ, "TOKENIZERS_PARALLELISM": parallel, "PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, "-c", TRAIN], env=env, capture_output=True, text=True, check=True
        )
        found.add(run.stdout)
    assert len(found) == 1


def test_a_trained_vocabulary_is_used(bpe):
    assert tokenizers.BPE_MIN_VOCAB < bpe.vocab_size <= 400
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


# ----------------------------------------------------------------------------------------- refusals


def test_refusals_name_the_field_and_the_numbers(wordpiece, tmp_path):
    def refusal(name, vocab_size):
        with pytest.raises(UserError) as e:
            tokenizers.create(name, vocab_size, TEXTS)
        assert "\n" not in str(e.value)
        return str(e.value)

    assert refusal("bytes", 100) == (
        "model.vocab_size: tokenizer 'bytes' has 256 ids, more than vocab_size=100; "
        "set it to at least 256"
    )
    assert "has 7 ids, more than vocab_size=6" in refusal(str(wordpiece), 6)
    assert "at least 257 ids" in refusal("bpe", 256)
    assert "did you mean 'bytes'?" in refusal("byte", 256)
    assert "cannot read" in refusal("no/tokenizer.json", 256)
    (tmp_path / "bad.json").write_text("{}")
    assert "is not a tokenizer.json" in refusal(str(tmp_path / "bad.json"), 256)
