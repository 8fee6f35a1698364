"""What is read, what is refused, and that nothing is lost or repaired in silence."""

import gzip
import json
import os
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlm.data import documents, formats
from jaxlm.data.documents import UNSTATED, Document, Tally, read
from jaxlm.schema import UserError


def refusal(*sources):
    """The one line with which `read` refuses."""
    with pytest.raises(UserError) as e:
        list(read(sources))
    assert "\n" not in str(e.value)
    return str(e.value)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


# ------------------------------------------------------------------------------------------ stdlib


def test_the_standard_library_is_its_code_without_tests_and_its_help_texts():
    docs = list(read(["stdlib"]))
    by_path = {d.path: d for d in docs}
    assert len(by_path) == len(docs) > 500
    with open(json.decoder.__file__, encoding="utf-8") as f:
        assert by_path["json/decoder.py"].text == f.read()
    assert by_path["json/decoder.py"].language == "python"
    assert "statement" in by_path["pydoc_data/topics.py:assert"].text
    assert by_path["pydoc_data/topics.py:assert"].language == "en"
    assert {(d.text_licence, d.package_licence) for d in docs} == {("PSF-2.0", "PSF-2.0")}
    parts = {part for d in docs for part in d.path.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert sum(len(d.text.encode()) for d in docs) > 8e6
    assert docs == list(read(["stdlib"]))


# ------------------------------------------------------------------------------- files and folders


def test_a_folder_is_read_in_one_order_and_hidden_or_unknown_files_are_not(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "1.md").write_text("one")
    (tmp_path / "z.txt").write_text("二\r\n")
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / ".git" / "c.txt").write_text("hidden")
    docs = list(read([str(tmp_path)], licence="CC0-1.0"))
    assert [d.text for d in docs] == ["x = 1\n", "二\r\n", "one"]
    assert [d.language for d in docs] == ["python", "", ""]
    assert docs[0].path == str(tmp_path / "a.py") and docs[0].source == str(tmp_path)
    assert {d.text_licence for d in docs} == {"CC0-1.0"}
    assert {d.package_licence for d in docs} == {UNSTATED}
    assert [d.text for d in read([str(tmp_path / "**" / "*.md"), str(tmp_path / "z.txt")])] == [
        "one",
        "二\r\n",
    ]


def test_a_record_states_its_own_provenance_and_the_configs_licence_fills_the_gaps(tmp_path):
    rows = [
        {"text": "a", "language": "en", "licence": "MIT", "source": "web", "date": "1999"},
        {"text": "b", "license": "CC-BY-4.0", "attribution": "B. Author", "lang": "ja", "n": 1},
        {"text": "c", "language": None},
    ]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    a, b, c = read([path], licence="CC0-1.0")
    assert a == Document("a", "web", f"{path}:1", "en", "MIT", UNSTATED, "1999", "")
    assert b == Document("b", path, f"{path}:2", "ja", "CC-BY-4.0", UNSTATED, "", "B. Author")
    assert (c.text_licence, c.language) == ("CC0-1.0", "")
    assert [d.text_licence for d in read([path])][2] == UNSTATED
    packed = tmp_path / "x.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "x.jsonl").read_bytes()))
    assert [d.text for d in read([str(packed)])] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"line {i} 日本語\n" for i in range(60_000)),
        "今日はいい天気ですね。" * 40_000,  # one line, three bytes a character
        "a" * (formats.PIECE_BYTES - 1) + "é" + "b" * formats.PIECE_BYTES,
    ],
    ids=["lines", "one line", "character on the border"],
)
def test_a_large_text_is_cut_at_line_ends_without_losing_a_byte(tmp_path, text):
    file = tmp_path / "corpus.txt"
    file.write_text(text, encoding="utf-8")
    pieces = list(read([str(file)]))
    assert "".join(p.text for p in pieces) == text
    assert len(pieces) > 1
    assert max(len(p.text.encode()) for p in pieces) <= 2 * formats.PIECE_BYTES + 3
    done = 0
    for p in pieces:
        assert p.path == f"{file}:{1 + text.count(chr(10), 0, done)}"
        done += len(p.text)
        assert "\n" not in text or p.text.endswith("\n")


def test_a_name_that_is_no_text_is_shown_in_one_line(tmp_path):
    (tmp_path / "a\nb.txt").write_bytes(b"\xff")
    assert "a\\nb.txt':1: not UTF-8" in refusal(str(tmp_path))
    (tmp_path / "a\nb.txt").rename(tmp_path / os.fsdecode(b"\xff.txt"))
    assert "\\udcff.txt':1: not UTF-8" in refusal(str(tmp_path))


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert [d.text for d in read([str(tmp_path)])] == ["hello"]


# ------------------------------------------------------------------------------------- bad records

BAD = {
    b"{": "not JSON",
    b"[" * 200_000: "not JSON",
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": "\\ud800"}': "not UTF-8",
    b'{"content": "x"}': "no string field 'text'",
    b'{"text": 3}': "no string field 'text'",
    b'"text"': "no string field 'text'",
    b'{"text": " \\n"}': "empty",
}


def test_bad_records_are_listed_with_their_line_and_the_good_ones_kept(tmp_path):
    good = [json.dumps({"text": f"text {i}"}).encode() for i in range(8_000)]
    lines = good[:1000] + list(BAD) + [b""] + good[1000:]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    tally = Tally()
    texts = [d.text for d in read([str(tmp_path)], tally=tally)]
    assert texts == [f"text {i}" for i in range(8_000)]
    want = [(f"{tmp_path}/x.jsonl:{1001 + i}", reason) for i, reason in enumerate(BAD.values())]
    assert [(u.place, u.reason) for u in tally.listed] == want
    assert tally.records == 8_000 + len(BAD) and tally.dropped.total() == len(BAD)


def test_too_many_bad_records_are_refused_in_one_line(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"text": "fine"}] * 998 + [{"body": "x", "id": 1}] * 2)
    line = refusal(str(tmp_path))
    assert "2 of 1,000 records are unusable (0.20%" in line
    assert "x.jsonl:999: no string field 'text' (got 'body', 'id')" in line


def test_bad_utf8_in_a_text_file_names_the_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xe9e\n")
    assert f"{tmp_path}/a.txt:3: not UTF-8 (byte 0xe9)" in refusal(str(tmp_path))


def test_an_overlong_line_is_never_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 1000)
    rows = [{"text": "x" * 5000}] + [{"text": "fine"}] * 1000
    tally = Tally()
    assert len(list(read([write_jsonl(tmp_path / "x.jsonl", rows)], tally=tally))) == 1000
    assert tally.dropped == {"line too long": 1}


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.binary(max_size=40) | st.sampled_from(list(BAD)) | st.just(b'{"text":"a"}'))
)
def test_any_bytes_are_counted_or_yielded_and_never_a_traceback(tmp_path, lines):
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    tally, texts = Tally(), []
    try:
        for d in read([str(tmp_path)], tally=tally):
            texts.append(d.text)
    except UserError as e:
        assert "\n" not in str(e)
    written = [x for line in lines for x in line.split(b"\n") if x.strip()]
    assert tally.records == len(written) == len(texts) + tally.dropped.total()


# ----------------------------------------------------------------------------------------- refusals


def test_each_wrong_source_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.pdf").write_bytes(b"x")
    (tmp_path / "blank.txt").write_text("")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 999)[:-20])
    assert refusal("corpos/x") == (
        "data.sources[0]: no such file or folder: corpos/x; did you mean 'corpus'?"
    )
    assert "did you mean 'stdlib'?" in refusal("stdlb")
    assert "known are .txt .md .rst" in refusal("corpus/a.pdf")
    assert "nothing to read in corpus" in refusal("corpus")
    assert "nothing to read in corpus/*" in refusal("corpus/*")
    assert "no such file or folder: *.md" in refusal("*.md")
    assert "is on this machine" in refusal("file:///x.txt")
    assert refusal("blank.txt") == "data.sources: no text in blank.txt"
    assert "cut.jsonl.gz is not a whole file" in refusal("blank.txt", "cut.jsonl.gz")


# --------------------------------------------------------------------------------------- own source

OWN = """
from jaxlm.data.documents import Document
def docs():
    yield "plain"
    yield Document("full", language="ja", text_licence="MIT", path="here")
def wrong():
    yield 3
def broken():
    yield "a"
    raise OSError("no such\\nhost")
"""


def test_an_own_function_is_a_source(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    plain, full = read([f"{path}:docs"], licence="CC0-1.0")
    assert (plain.text, plain.path, plain.text_licence) == ("plain", f"{path}:docs:0", "CC0-1.0")
    assert (full.text_licence, full.language, full.path) == ("MIT", "ja", "here")
    assert full.source == f"{path}:docs"
    assert "must yield Document or str, item 0 is 3" in refusal(f"{path}:wrong")
    assert "did you mean 'docs'?" in refusal(f"{path}:dosc")
    assert "broken failed: OSError: no such" in refusal(f"{path}:broken")
    assert "no such file" in refusal(f"{tmp_path}/none.py:docs")


def test_a_module_function_is_a_source(tmp_path, monkeypatch):
    (tmp_path / "my_corpus.py").write_text("def docs():\n    return ['a', 'b']\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [d.text for d in read(["my_corpus:docs"])] == ["a", "b"]
    sys.modules.pop("my_corpus")


def test_the_expected_size_is_known_only_where_it_can_be(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}])
    assert documents.total_bytes([path]) == (tmp_path / "x.jsonl").stat().st_size
    assert documents.total_bytes([path, "own.py:docs"]) == 0
    assert 8e6 < documents.total_bytes(["stdlib"]) < 50e6
