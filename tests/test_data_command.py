"""`jaxlm data`: one command from files to shards and their page, and what is in them."""

import json
import re

import pytest

from jaxlm import main
from jaxlm.data import tokenizer
from jaxlm.data.inspect import compare
from jaxlm.schema import UserError


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    en, ja = {"language": "en", "licence": "MIT"}, {"language": "ja", "licence": "CC0-1.0"}
    rows = [{"text": f"Text number {i} <b>", "date": f"20{10 + i % 5}", **en} for i in range(80)]
    rows += [{"text": f"文章その{i}です。", **ja} for i in range(40)]
    lines = [json.dumps(r) for r in [*rows, rows[0]]]
    (folder / "x.jsonl").write_text("\n".join(lines))
    out = folder / "out"
    main.run(["data", "build", str(out), f"--sources={folder}/x.jsonl", "--tokenizer=bpe",
              "--vocab-size=300", "--config.data.eval_fraction=0.2"])  # fmt: skip
    return folder, out


def test_build_says_what_it_read_and_leaves_card_and_page(built, capsys):
    _, out = built
    card = (out / "DATA_CARD.md").read_text()
    assert "120 documents" in card and "2010 … 2014" in card and "| MIT |" in card
    page = (out / "report.html").read_text()
    assert "duplicate" in page and "CC0-1.0" in page
    assert (out / "lengths.png").exists()
    main.run(["data", "report", str(out), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["documents"] == 120 and found["dropped"] == {"duplicate": 1}
    assert set(found["languages"]) == {"en", "ja"} and found["licences"]["MIT"] > 1000
    assert found["records"] == 121 and found["tokens"] > 0 and found["tokenizer"]["lossless"]


def test_inspect_shows_texts_with_their_origin(built, capsys):
    _, out = built
    main.run(["data", "inspect", str(out), "--json", "--count=200", "--split=eval"])
    main.run(["data", "inspect", str(out), "--json", "--count=200"])
    rows = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert len(rows) == 120 and len({r["sha256"] for r in rows}) == 120
    for row in rows:
        want = ("ja", "CC0-1.0") if "文章" in row["text"] else ("en", "MIT")
        assert (row["language"], row["text_licence"]) == want
    with pytest.raises(UserError, match="fewer than 501 documents"):
        main.run(["data", "inspect", str(out), "--first=500"])


def test_tokenizers_are_compared_by_language(built, capsys):
    folder, _ = built
    main.run(["data", "tokenizer", f"--sources={folder}/x.jsonl", "--json", "--vocab-size=600"])
    rows = json.loads(capsys.readouterr().out)
    by_name = {(r["tokenizer"], r["language"]): r for r in rows}
    assert {n for n, _ in by_name} == {"bytes", "bpe", "chars", "wordpiece"}
    assert by_name["bytes", "ja"]["bytes_per_token"] == 1.0
    assert by_name["bytes", "en"]["tokens_per_character"] == 1.0
    assert by_name["chars", "ja"]["tokens_per_character"] == pytest.approx(1.0, abs=0.2)
    assert by_name["bpe", "en"]["exact"] == 1.0 and by_name["wordpiece", "en"]["exact"] < 1.0
    assert "".join(by_name["bytes", "en"]["pieces"]).count("\ufffd") == 33  # bytes of the sentence
    main.run(["data", "tokenizer", f"--sources={folder}/x.jsonl"])
    assert re.search(r"wordpiece .* ja ", capsys.readouterr().out)


def test_unknown_pieces_are_counted():
    words = tokenizer.create("wordpiece", 120, ["abc abd abe " * 50])
    [row] = compare({"w": words}, {"en": ["abc xyz"]})
    assert row["unknown"] > 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["data", "bild"], "did you mean 'build'"),
        (["data", "build"], "expected a folder of shards"),
        (["data", "report", "/none"], "no such file"),
    ],
)
def test_mistakes_are_one_line(arguments, line):
    with pytest.raises(UserError, match=line):
        main.run(arguments)
