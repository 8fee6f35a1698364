"""Tasks: what a model is asked, what is made of its answers, and what is refused beforehand."""

from __future__ import annotations

import gzip
import itertools
import json
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import small
from test_main import call, refused

import jaxlm
from jaxlm import api
from jaxlm.data import documents
from jaxlm.data.rows import rows
from jaxlm.generate import written
from jaxlm.schema import UserError
from jaxlm.tasks import answers, sandbox, shipped, task
from jaxlm.tasks.task import Item, Task

ALIKE = [("the sky is", (" blue", " a fish"), 0), ("a fish", (" swims", " sings"), 0),
         ("the", (" sea", " tree", " bird"), 1)]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with small.compiled_quickly():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.golden("gpt2", tmp_path_factory.mktemp("gpt2") / "gpt2")


@pytest.fixture(scope="module")
def gpt2(folder: Path):
    return jaxlm.from_pretrained(folder)


def log_p(model, given: str, text: str) -> tuple[float, int, bool]:
    """From the logits, token by token."""
    before, whole = (model.tokenizer.encode(t) for t in (given, given + text))
    ids = whole if given else np.concatenate([[model.tokenizer.eos_id], whole])
    row = np.asarray(model.logits(ids[None])[0], np.float64)
    row -= np.log(np.exp(row).sum(-1, keepdims=True))
    at = range(len(ids) - len(whole) + len(before), len(ids))
    each = [row[i - 1, ids[i]] for i in at]
    return sum(each), len(each), all(row[i - 1].argmax() == ids[i] for i in at)


def test_a_text_is_scored_after_what_is_given(gpt2) -> None:
    pairs = [("the sky is", " blue"), ("", "a fish"), ("a bird", " sings in the tree"), ("a", "n")]
    found = gpt2.score([t for _, t in pairs], [g for g, _ in pairs])
    for (given, text), score in zip(pairs, found, strict=True):
        want, tokens, greedy = log_p(gpt2, given, text)
        assert score.log_probability == pytest.approx(want, abs=1e-4)
        assert (score.tokens, score.bytes, score.greedy) == (tokens, len(text), greedy)
    [blank] = gpt2.score("is blue", "the sky ")  # as one text: the blank belongs to what follows
    assert blank.log_probability == gpt2.score(" is blue", "the sky")[0].log_probability
    with pytest.raises(UserError, match=r"texts\[1\]"):
        gpt2.score(["a", ""], ["the", "the"])


def test_choices_are_weighed_as_they_are_by_tokens_and_by_bytes(gpt2) -> None:
    items = [Item(p, c, answer=a) for p, c, a in ALIKE]
    names = ("accuracy", "accuracy_per_token", "accuracy_per_byte", "calibration_error")
    found = answers.answer(Task("t", "choose", lambda path: items, names), items, gpt2)
    right = {name: [] for name in names[:3]}
    for prompt, choices, answer in ALIKE:
        each = [log_p(gpt2, prompt, c) for c in choices]
        right["accuracy"].append(np.argmax([x for x, _, _ in each]) == answer)
        right["accuracy_per_token"].append(np.argmax([x / n for x, n, _ in each]) == answer)
        per_byte = [x / len(c) for (x, _, _), c in zip(each, choices, strict=True)]
        right["accuracy_per_byte"].append(np.argmax(per_byte) == answer)
    for name in names[:3]:
        assert found.scores["", name].value == pytest.approx(np.mean(right[name]))
    assert 0 <= found.scores["", "calibration_error"].value <= 1


def test_a_text_longer_than_the_context_is_read_to_its_end_once(gpt2) -> None:
    """In pieces after one token each; a short one costs what `score` says."""
    short, long = "the sky is blue", "a bird sings in the tree, " * 9
    items = [Item(references=(t,), group=g) for t, g in ((short, "a"), (long, "b"))]
    read = Task("t", "read", lambda path: items, ("perplexity", "bits_per_byte"))
    found = answers.answer(read, items, gpt2)
    [score] = gpt2.score(short)
    assert found.scores["a", "perplexity"].value == pytest.approx(score.perplexity, rel=1e-5)
    assert found.scores["a", "bits_per_byte"].value == pytest.approx(score.bits_per_byte, rel=1e-5)
    tokens = len(gpt2.tokenizer.encode(long))
    assert tokens > gpt2.config.seq_len and found.records[1]["tokens"] == tokens
    whole = np.concatenate([[gpt2.begins], gpt2.tokenizer.encode(long)])
    t, want = gpt2.config.seq_len, 0.0
    for i in range(0, tokens, t):
        row = np.asarray(gpt2.logits(whole[None, i : i + t])[0], np.float64)
        row -= np.log(np.exp(row).sum(-1, keepdims=True))
        after = whole[i + 1 : i + t + 1]
        want -= row[np.arange(len(after)), after].sum()
    assert found.records[1]["nats"] == pytest.approx(want, rel=1e-5)
    assert found.scores["", "bits_per_byte"].n == 2


def test_written_answers_end_where_they_should(gpt2, tmp_path: Path) -> None:
    mistral = jaxlm.from_pretrained(small.golden("mistral", tmp_path / "mistral"))
    items = [Item(text, references=("is blue",)) for text in ("the sky", "a fish", "a bird sings")]
    texts = mistral.generate([i.prompt for i in items], max_new_tokens=6, temperature=0,
                             return_full_text=False)  # fmt: skip
    said = [t.strip() for [t] in texts]
    assert all(len(t) > 1 for t in said)  # GPT-2's random weights say nothing

    def answered(*stop: str) -> list[str]:
        asked = Task("t", "write", lambda path: items, ("f1",), max_new_tokens=6, stop=stop)
        return [r["said"] for r in answers.answer(asked, items, mistral).records]

    assert answered("\x00") == said
    assert answered("\x00", said[0][1]) == [t.split(said[0][1])[0].strip() for t in said]
    chosen = Task("t", "write", lambda path: items, ("exact_match", "f1"), max_new_tokens=6)
    assert written.until("one\ntwo. three", (". ", "", "\n")) == "one"
    too_long = [Item("a fish " * 30, references=("x",))]
    with pytest.raises(UserError, match=r"item 0 has .* tokens"):
        answers.answer(chosen, too_long, gpt2)


def test_shots_stand_answered_before_what_is_asked() -> None:
    items = [Item(p, c, answer=a) for p, c, a in ALIKE]
    named = Task("t", "choose", lambda path: items, ("accuracy",))
    [only] = task.with_shots(named, items, 2, seed=0)
    left = next(item for item in items if item.prompt == only.text)
    shown = {f"{i.prompt}{i.choices[i.answer]}" for i in items if i is not left}
    *before, asked = only.prompt.split("\n\n")
    assert set(before) == shown and asked == left.prompt and only.choices == left.choices
    assert task.with_shots(named, items, 2, seed=0) == [only]
    japanese = [
        Item("質問:何\n回答:", references=("東京",)),
        Item("質問:誰\n回答:", references=("猫",)),
    ]
    written = Task("t", "write", lambda path: japanese, ("f1",))
    [one] = task.with_shots(written, japanese, 1, seed=0)
    assert one.prompt in (
        "質問:何\n回答:東京\n\n質問:誰\n回答:",
        "質問:誰\n回答:猫\n\n質問:何\n回答:",
    )
    english = [Item("2 + 2 =", references=("4",)), Item("1 + 1 =", references=("2",))]
    [one] = task.with_shots(written, english, 1, seed=0)
    assert one.prompt in ("2 + 2 = 4\n\n1 + 1 =", "1 + 1 = 2\n\n2 + 2 =")
    with pytest.raises(UserError, match="3 of the 3 items"):
        task.with_shots(named, items, 3, seed=0)
    with pytest.raises(UserError, match="nothing to show"):
        task.with_shots(Task("t", "read", lambda path: [], ()), items, 1, seed=0)


# ---------------------------------------------------------------------------------- shipped tasks

JSQUAD = {"data": [{"paragraphs": [{
    "context": "東京 [SEP] 東京は日本の首都である。",
    "qas": [{"question": "日本の首都は?", "answers": [{"text": "東京"}, {"text": "東京"}]}],
}]}]}  # fmt: skip
SAMPLES = {
    "imdb": ({"text": "fine", "label": 1}, Item("Review: fine\nSentiment:",
             (" negative", " positive"), ("negative", "positive"), 1, text="fine")),
    "blimp": ({"sentence_good": "g", "sentence_bad": "b", "UID": "u"},
              Item("", ("g", "b"), answer=0, group="u")),
    "hellaswag": ({"activity_label": "Roof", "ctx": "he [x] is", "endings": ["a", "b"],
                   "label": "1"}, Item("Roof: he is", (" a", " b"), answer=1)),
    "arc_easy": ({"question": {"stem": "q", "choices": [{"text": "x", "label": "A"},
                  {"text": "y", "label": "B"}]}, "answerKey": "B"},
                 Item("Question: q\nAnswer:", (" x", " y"), answer=1)),
    "arc_challenge": ({"question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]},
                       "answerKey": "A"}, Item("Question: q\nAnswer:", (" x", " y"), answer=0)),
    "mmlu": ({"question": "q", "choices": ["x", "y"], "answer": 1, "subject": "law"},
             Item("Question: q\nAnswer:", (" x", " y"), answer=1, group="law")),
    "jcommonsenseqa": ({"question": "何", **{f"choice{k}": str(k) for k in range(5)}, "label": 3},
                       Item("質問:何\n回答:", ("0", "1", "2", "3", "4"), answer=3)),
    "jnli": ({"sentence1": "一", "sentence2": "二", "label": "neutral"},
             Item("前提:一\n仮説:二\n関係:", ("含意", "矛盾", "中立"),
                  ("entailment", "contradiction", "neutral"), 2, text="一\n二")),
    "jsquad": (JSQUAD, Item("文章:東京は日本の首都である。\n質問:日本の首都は?\n回答:",
                            references=("東京",))),
    "lambada": ({"text": "he said yes"}, Item("he said", references=(" yes",))),
    "humaneval": ({"prompt": "def f():\n", "test": "def check(g): pass", "entry_point": "f"},
                  Item("def f():\n", references=("def check(g): pass\ncheck(f)\n",))),
    "gsm8k": ({"question": "q", "answer": "so\n#### 1,234"},
              Item("Question: q\nAnswer:", references=("1234",))),
    "cnn_dailymail": ({"article": "a", "highlights": "h"}, Item("a\n\nTL;DR:", references=("h",))),
    "xsum": ({"document": "a", "summary": "h"}, Item("a\n\nTL;DR:", references=("h",))),
    "translation": ({"source": "s", "target": ["t", "u"]}, Item("s", references=("t", "u"))),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_a_shipped_task_reads_what_is_published(name: str, tmp_path: Path) -> None:
    record, want = SAMPLES[name]
    path = tmp_path / ("x.json" if name == "jsquad" else "x.jsonl.gz")
    data = json.dumps(record, ensure_ascii=False).encode()
    path.write_bytes(data if name == "jsquad" else gzip.compress(data + b"\n"))
    assert task.read(task.load(name), str(path)) == [want]


def test_tasks_of_texts_in_archives_and_folders(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("movie_reviews/pos/1.txt", "good")
        z.writestr("movie_reviews/README", "about")
        z.writestr("p/rt-polarity.neg", "bad\nworse\n")
    assert [i.answer for i in task.read(task.load("nltk_movie_reviews"), str(path))] == [1]
    [one, two] = task.read(task.load("nltk_sentence_polarity"), str(path))
    assert (one.text, two.text, one.answer) == ("bad", "worse", 0)
    (tmp_path / "a.txt").write_text("some text")
    [item] = task.read(task.load("text"), str(tmp_path / "a.txt"))
    assert item.references == ("some text",)
    (tmp_path / "t.csv").write_text('text,label\n"a, b",neg\n')
    [item] = task.read(task.load("rotten_tomatoes"), str(tmp_path / "t.csv"))
    assert (item.text, item.answer) == ("a, b", 0)
    assert [shipped.last_number(t) for t in ("is $1,200.", "no", "3 or -4.5")] == [
        "1200", "", "-4.5"]  # fmt: skip


def test_a_leak_into_the_training_text_is_found(tmp_path: Path) -> None:
    """The data stage is given a task's texts as `clean.evaluation_sets`."""
    pytest.importorskip("xxhash")
    from jaxlm.data import contamination

    item = " ".join(f"word{i}" for i in range(40))
    (tmp_path / "t.csv").write_text(f"text,label\n{item},1\n")
    [asked] = task.read(task.load("imdb"), str(tmp_path / "t.csv"))
    [document] = documents.read([str(tmp_path / "t.csv")])
    assert document.text == asked.text  # what the data stage reads of the same file
    known = contamination.grams([document.text])
    clean, leak = "no such words at all are in here " * 9, f"seen before: {item[20:200]} and so on"
    assert known.found_in(leak) and not known.found_in(clean)


def test_what_is_not_whole_is_refused_by_its_place(tmp_path: Path) -> None:
    def said(name: str, text: str, file: str = "x.jsonl") -> str:
        (tmp_path / file).write_text(text)
        with pytest.raises(UserError) as e:
            task.read(task.load(name), str(tmp_path / file))
        return str(e.value)

    assert "no field 'label'" in said("imdb", '{"text": "a"}\n')
    assert "'fair'" in said("imdb", '{"text": "a", "label": "fair"}\n')
    assert "empty reference" in said("translation", '{"source": "a", "target": ""}\n')
    assert "item 1" in said("translation", '{"source": "a", "target": "b"}\n' * 1
                            + '{"source": "a", "target": []}\n')  # fmt: skip
    assert "cannot read" in said("imdb", "{\n")
    assert "no items" in said("imdb", "\n")
    with pytest.raises(UserError, match=r"imdb=PATH.*hub"):
        task.read(task.load("imdb"), "")
    with pytest.raises(UserError, match="states no address"):
        task.read(task.load("text"), "hub")
    with pytest.raises(UserError, match="did you mean 'imdb'"):
        task.load("imbd")
    with pytest.raises(UserError, match="no such file"):
        list(rows(str(tmp_path / "nowhere.csv")))


OWN = """
from jaxlm.tasks.task import Item, Task

def get_task():
    return Task("mine", "complete", lambda path: [Item("the sky is", references=(" blue",))] * 3,
                ({metric!r},))
"""


def test_the_command_gives_rows(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "mine.py"
    own.write_text(OWN.format(metric="accuracy"))
    lines = [json.dumps({"sentence_good": g, "sentence_bad": b, "UID": "u"})
             for g, b in (("the sky", "sky the"), ("a fish", "fish a"), ("is", "si"))]  # fmt: skip
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    where = [f"--workdir={folder}", f"--task=blimp={tmp_path / 'b.jsonl'}", f"--task={own}=-"]
    assert call("evaluate", *where, "--json", f"--out={tmp_path / 'out'}") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["task"], r["metric"], r["n"]) for r in found] == [
        ("blimp", "accuracy", 3), ("mine", "accuracy", 3)]  # fmt: skip
    assert all(set(r) == {"task", "metric", "value", "ci95", "n"} for r in found)
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert stored["rows"] == found
    assert len((tmp_path / "out" / "blimp.jsonl").read_text().splitlines()) == 3
    new = ["export", where[0], f"--out={tmp_path / 'hf'}", f"--scores={tmp_path / 'out'}"]
    assert call(*new, "--json") == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"| blimp | accuracy | {found[0]['value']:.4g} |" in card
    assert f"jaxlm evaluate {where[0]} {where[1]}" in card and "context of 32 tokens" in card
    capsys.readouterr()
    assert call("evaluate", *where, f"--against={folder}", "--json") == 0
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    assert row["difference"] == 0 and row["p"] == 1.0  # of one model with itself
    assert call("evaluate", *where) == 0
    assert "blimp" in capsys.readouterr().out
    assert call("evaluate", "--list") == 0
    assert "jsquad" in capsys.readouterr().out
    own.write_text(OWN.format(metric="acuracy"))
    assert "did you mean 'accuracy'" in refused(capsys, "evaluate", *where)
    assert "--task" in refused(capsys, "evaluate", where[0])
    assert "blimp is there twice" in refused(capsys, "evaluate", *where[:2], where[1])
    assert "is not empty" in refused(capsys, "evaluate", *where, f"--out={tmp_path / 'out'}")
    assert "--workdir" in refused(capsys, "evaluate", where[1])


def test_code_runs_apart_and_only_where_it_is_allowed(
    gpt2, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(code: str) -> bool:
        return not sandbox.passes(code, 1)

    try:
        assert sandbox.passes("assert 1 + 1 == 2", 5)
    except UserError as e:
        pytest.skip(str(e))
    assert dies("assert False") and dies("while True: pass") and dies("x = bytearray(1 << 31)")
    inside = "import socket; socket.create_connection(('127.0.0.1', {port}), 1)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert dies(inside.format(port=server.getsockname()[1]))
    assert dies(f"open({str(tmp_path / 'x')!r}, 'w').write('x' * (1 << 21))")
    assert dies("import os, time\nif not os.fork(): time.sleep(99)\ntime.sleep(99)")

    row = {"prompt": "def f():\n    return 1\n", "entry_point": "f"}
    tests = ("def check(g): assert g() == 1", "def check(g): assert g() == 2")
    rows = [json.dumps(row | {"test": t}) for t in tests]
    (tmp_path / "h.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match="--run-code"):
        api.evaluate(folder, [f"humaneval={tmp_path / 'h.jsonl'}"])
    items = [Item(row["prompt"], references=(f"{t}\ncheck(f)",)) for t in tests]
    made = Task("t", "code", lambda path: items, ("pass@1",), max_new_tokens=4, samples=2)
    monkeypatch.setattr(type(gpt2), "generate", lambda self, prompts, **_: [["", "1/0"]] * 2)
    monkeypatch.setattr(answers, "_check_room", lambda *_: None)
    found = answers.answer(made, items, gpt2)
    assert found.scores["", "pass@1"].value == 0.25  # one of two programs, of one of two items


def test_pass_at_k_is_the_share_of_draws_with_one_that_passes() -> None:
    for n, right, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 2)):
        draws = list(itertools.combinations(range(n), k))
        want = np.mean([min(d) < right for d in draws])
        assert sandbox.pass_at_k(n, right, k) == pytest.approx(want)


@pytest.mark.slow  # lm-eval alone takes 10 s to import
def test_lm_eval_asks_the_same_and_finds_the_same(folder: Path, tmp_path: Path) -> None:
    """BLiMP-like pairs as a task of lm-eval's, and as ours."""
    pytest.importorskip("lm_eval")
    records = [{"sentence_good": g, "sentence_bad": b, "UID": "u"}
               for g, b in (("the sky is blue", "the sky blue is"), ("a fish", "fish a"),
                            ("the sea is wide", "sea the is wide"), ("is", "si"))]  # fmt: skip
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "pairs.yaml").write_text(
        "task: pairs\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    validation: {tmp_path / 'b.jsonl'}\n"
        "output_type: multiple_choice\ntarget_delimiter: ''\nvalidation_split: validation\n"
        "doc_to_text: ''\n"
        "doc_to_target: 0\ndoc_to_choice: '{{[sentence_good, sentence_bad]}}'\n"
        "metric_list:\n  - metric: acc\n"
    )
    theirs = api.lm_eval(folder, ["pairs"], include=str(tmp_path))
    ours = api.evaluate(folder, [f"blimp={tmp_path / 'b.jsonl'}"])
    acc = next(r for r in theirs["rows"] if r["metric"] == "acc")
    assert acc["value"] == ours["rows"][0]["value"] and acc["n"] == 4
    with pytest.raises(UserError, match="no task 'nothing'"):
        api.lm_eval(folder, ["nothing"], include=str(tmp_path))
