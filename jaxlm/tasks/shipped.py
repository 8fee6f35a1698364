"""Tasks that come with jaxlm: published sets, read from where you have them or, asked for as
NAME=hub, from where they are published; and plain ones for any text or pairs of texts.

Prompts are zero-shot. For prompts and few-shot settings that others report, take lm-eval's tasks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlm.data import documents
from jaxlm.data.rows import field, rows
from jaxlm.schema import UserError
from jaxlm.tasks.task import Item, Task

_GITHUB = "https://raw.githubusercontent.com"
_LABELS = ("negative", "positive")
_SPELLED = (_LABELS, ("neg", "pos"), ("0", "1"))  # in published files

# ------------------------------------------------------------------------------------------ reading


def _numbered(path: str, name: str) -> Iterator[tuple[Any, int]]:
    """(a getter of fields that names the record that lacks one, its number)."""
    for i, row in enumerate(rows(path)):
        yield (lambda key, row=row, i=i: field(row, key, i, f"task {name}")), i


def _texts(path: str) -> Iterator[Item]:
    """Any text that `data.sources` may name; the file's language, else its source, is the group."""
    for document in documents.read([path]):
        group = document.language or Path(document.source).name
        yield Item(references=(document.text,), group=group)


def _pairs(path: str) -> Iterator[Item]:
    """Records {"source", "target"}: a target is one text or a list of them."""
    for get, _ in _numbered(path, "pairs"):
        target = get("target")
        yield Item(get("source"), references=tuple([target] if isinstance(target, str) else target))


# ------------------------------------------------------------------------------------- sentiment


def sentiment(text: str, positive: bool) -> Item:
    """A review: a classifier reads it as it is, a language model chooses what follows."""
    prompt = f"Review: {text.strip()}\nSentiment:"
    return Item(prompt, (" negative", " positive"), _LABELS, int(positive), text=text)


def _reviews(path: str) -> Iterator[Item]:
    for get, i in _numbered(path, "sentiment"):
        label = str(get("label")).strip().lower()
        known = {name: i for names in _SPELLED for i, name in enumerate(names)}
        if label not in known:
            raise UserError(f"task sentiment: record {i} has the label {label!r}, not 0 or 1")
        yield sentiment(get("text"), bool(known[label]))


def _by_folder(path: str) -> Iterator[Item]:
    """NLTK's reviews: one text per file, in neg/ or pos/."""
    for row in rows(path):
        kind = Path(row.get("path", "")).parent.name
        if kind in ("neg", "pos"):
            yield sentiment(row["text"], kind == "pos")


def _by_line(path: str) -> Iterator[Item]:
    """NLTK's sentence polarity: one text per line of rt-polarity.neg and .pos."""
    for row in rows(path):
        suffix = Path(row.get("path", "")).suffix
        if suffix in (".neg", ".pos"):
            for line in filter(str.strip, row["text"].split("\n")):
                yield sentiment(line, suffix == ".pos")


# ---------------------------------------------------------------------------------- multiple choice


def _blimp(path: str) -> Iterator[Item]:
    """Minimal pairs: the good sentence should be likelier as a whole (Warstadt et al. 2020)."""
    for get, _ in _numbered(path, "blimp"):
        good, bad = get("sentence_good"), get("sentence_bad")
        yield Item("", (good, bad), answer=0, group=get("UID"))


def _hellaswag(path: str) -> Iterator[Item]:
    for get, _ in _numbered(path, "hellaswag"):
        context = f"{get('activity_label')}: {get('ctx')}"
        yield Item(_unmarked(context), tuple(" " + _unmarked(e) for e in get("endings")),
                   answer=int(get("label")))  # fmt: skip


def _unmarked(text: str) -> str:
    """WikiHow's [title], [step] … out."""
    return " ".join(re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).split())


def _arc(path: str) -> Iterator[Item]:
    for get, _ in _numbered(path, "arc"):
        question = get("question")
        if isinstance(question, dict):  # AllenAI's own JSON lines
            choices = {k: [c[k] for c in question["choices"]] for k in ("text", "label")}
            question = question["stem"]
        else:
            choices = get("choices")
        answer = choices["label"].index(get("answerKey"))
        yield _asked(question, choices["text"], answer)


def _mmlu(path: str) -> Iterator[Item]:
    for get, _ in _numbered(path, "mmlu"):
        yield _asked(get("question"), get("choices"), int(get("answer")), get("subject"))


def _asked(question: str, choices: Any, answer: int, group: str = "") -> Item:
    spoken = tuple(f" {c}" for c in choices)
    return Item(f"Question: {question}\nAnswer:", spoken, answer=answer, group=group)


def _jcommonsenseqa(path: str) -> Iterator[Item]:
    for get, _ in _numbered(path, "jcommonsenseqa"):
        choices = tuple(get(f"choice{k}") for k in range(5))
        yield Item(f"質問:{get('question')}\n回答:", choices, answer=int(get("label")))


_JNLI = {"entailment": "含意", "contradiction": "矛盾", "neutral": "中立"}


def _jnli(path: str) -> Iterator[Item]:
    names = tuple(_JNLI)
    for get, _ in _numbered(path, "jnli"):
        first, second = get("sentence1"), get("sentence2")
        prompt = f"前提:{first}\n仮説:{second}\n関係:"
        yield Item(prompt, tuple(_JNLI.values()), names, names.index(get("label")),
                   text=f"{first}\n{second}")  # fmt: skip


# ----------------------------------------------------------------------------- cloze and generation


def _lambada(path: str) -> Iterator[Item]:
    """The last word of a passage (Paperno et al. 2016)."""
    for get, _ in _numbered(path, "lambada"):
        before, _, last = get("text").strip().rpartition(" ")
        yield Item(before, references=(f" {last}",))


def _jsquad(path: str) -> Iterator[Item]:
    for row in rows(path):
        for article in row["data"]:
            for paragraph in article["paragraphs"]:
                passage = paragraph["context"].rpartition("[SEP]")[2].strip()
                for qa in paragraph["qas"]:
                    yield Item(
                        f"文章:{passage}\n質問:{qa['question']}\n回答:",
                        references=tuple(dict.fromkeys(a["text"] for a in qa["answers"])),
                    )


def _gsm8k(path: str) -> Iterator[Item]:
    for get, _ in _numbered(path, "gsm8k"):
        answer = get("answer").rpartition("####")[2].strip().replace(",", "")
        yield Item(f"Question: {get('question')}\nAnswer:", references=(answer,))


def _human_eval(path: str) -> Iterator[Item]:
    """Python functions to be finished, and their tests (Chen et al. 2021)."""
    for get, _ in _numbered(path, "humaneval"):
        yield Item(get("prompt"), references=(f"{get('test')}\ncheck({get('entry_point')})\n",))


def last_number(text: str) -> str:
    """The last number in an answer, without thousands' commas; '' where there is none."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return found[-1].replace(",", "").rstrip(".") if found else ""


def _cnn(path: str) -> Iterator[Item]:
    for get, _ in _numbered(path, "cnn_dailymail"):
        yield _summary(get("article"), get("highlights"))


def _xsum(path: str) -> Iterator[Item]:
    for get, _ in _numbered(path, "xsum"):
        yield _summary(get("document"), get("summary"))


def _summary(text: str, summary: str) -> Item:
    return Item(f"{text.strip()}\n\nTL;DR:", references=(summary,))


def _task(name: str, kind: Any, items: Any, metrics: str, home: str = "", licence: str = "",
          **more: Any) -> Task:  # fmt: skip
    return Task(name, kind, items, tuple(metrics.split()), home, licence, **more)


_CHOICE = "accuracy accuracy_per_token accuracy_per_byte calibration_error"
_CLASSES = "accuracy macro_f1 calibration_error"
_ROUGE = "rouge1 rouge2 rougeL"
_UNSTATED = "LicenseRef-unstated"
_NLTK = f"{_GITHUB}/nltk/nltk_data/gh-pages/packages/corpora"
_JGLUE = f"{_GITHUB}/yahoojapan/JGLUE/main/datasets"
_HF = "hf://datasets"

SHIPPED = {
    task.name: task
    for task in (
        _task("text", "read", _texts, "bits_per_byte perplexity"),
        _task("translation", "write", _pairs, "chrf bleu"),
        _task("translation-ja", "write", _pairs, "chrf bleu-char"),
        _task("summaries", "write", _pairs, _ROUGE),
        _task("imdb", "choose", _reviews, _CLASSES,
              f"{_HF}/stanfordnlp/imdb/plain_text/test-00000-of-00001.parquet", _UNSTATED),
        _task("rotten_tomatoes", "choose", _reviews, _CLASSES,
              f"{_HF}/cornell-movie-review-data/rotten_tomatoes/test.parquet", _UNSTATED),
        _task("nltk_movie_reviews", "choose", _by_folder, _CLASSES,
              f"{_NLTK}/movie_reviews.zip", "CC-BY-4.0"),
        _task("nltk_sentence_polarity", "choose", _by_line, _CLASSES,
              f"{_NLTK}/sentence_polarity.zip", "CC-BY-4.0"),
        _task("blimp", "choose", _blimp, "accuracy",
              f"{_GITHUB}/alexwarstadt/blimp/master/BLiMP.zip!*.jsonl", "CC-BY-4.0"),
        _task("hellaswag", "choose", _hellaswag, _CHOICE,
              f"{_GITHUB}/rowanz/hellaswag/master/data/hellaswag_val.jsonl", "MIT"),
        _task("arc_easy", "choose", _arc, _CHOICE,
              f"{_HF}/allenai/ai2_arc/ARC-Easy/test-00000-of-00001.parquet", "CC-BY-SA-4.0"),
        _task("arc_challenge", "choose", _arc, _CHOICE,
              f"{_HF}/allenai/ai2_arc/ARC-Challenge/test-00000-of-00001.parquet", "CC-BY-SA-4.0"),
        _task("mmlu", "choose", _mmlu, _CHOICE,
              f"{_HF}/cais/mmlu/all/test-00000-of-00001.parquet", "MIT"),
        _task("jcommonsenseqa", "choose", _jcommonsenseqa, _CHOICE,
              f"{_JGLUE}/jcommonsenseqa-v1.3/valid-v1.3.json", "CC-BY-SA-4.0"),
        _task("jnli", "choose", _jnli, _CLASSES,
              f"{_JGLUE}/jnli-v1.3/valid-v1.3.json", "CC-BY-SA-4.0"),
        _task("jsquad", "write", _jsquad, "exact_match f1",
              f"{_JGLUE}/jsquad-v1.3/valid-v1.3.json", "CC-BY-SA-4.0"),
        _task("lambada", "complete", _lambada, "accuracy perplexity",
              "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
              _UNSTATED),
        _task("gsm8k", "write", _gsm8k, "exact_match",
              f"{_GITHUB}/openai/grade-school-math/master/grade_school_math/data/test.jsonl",
              "MIT", max_new_tokens=256, stop=("\n\n", "Question:"), extract=last_number),
        _task("humaneval", "code", _human_eval, "pass@1",
              f"{_GITHUB}/openai/human-eval/master/data/HumanEval.jsonl.gz", "MIT",
              max_new_tokens=384, stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint")),
        _task("cnn_dailymail", "write", _cnn, _ROUGE,
              f"{_HF}/abisee/cnn_dailymail/3.0.0/test-00000-of-00001.parquet", "Apache-2.0",
              max_new_tokens=128),
        _task("xsum", "write", _xsum, _ROUGE, "", _UNSTATED),
    )
}  # fmt: skip
