"""A model's answers to a task's items, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxlm.evaluate import metrics
from jaxlm.evaluate.intervals import Scored, mean_of
from jaxlm.language_model import LanguageModel, Score
from jaxlm.schema import UserError
from jaxlm.tasks import sandbox
from jaxlm.tasks.task import Item, Task

Measured = dict[tuple[str, str], Scored]
"""(group, metric) → its score; the group of all items is ''."""


@dataclass(frozen=True)
class Answered:
    """Scores, one record per item of what was asked and said, and what else there is to see."""

    scores: Measured
    records: list[dict[str, Any]]
    details: dict[str, Any] = field(default_factory=dict)


def answer(task: Task, items: Sequence[Item], model: LanguageModel) -> Answered:
    """Asks all items. Raises UserError, before any is asked, for one that the model cannot take."""
    kinds = {"choose": _choose, "complete": _complete, "write": _write, "code": _code,
             "read": _read}  # fmt: skip
    return kinds[task.kind](task, items, model)


def _grouped(items: Sequence[Item], measure: Any, names: Sequence[str]) -> Measured:
    """`measure(name, rows)` for all rows, and for those of each group where there are several."""
    groups = {"": np.arange(len(items))}
    found = {item.group for item in items}
    for name in sorted(found - {""}) if len(found) > 1 else ():
        groups[name] = np.array([i for i, item in enumerate(items) if item.group == name])
    return {(g, name): measure(name, rows) for g, rows in groups.items() for name in names}


# ----------------------------------------------------------------------------------------- choosing


def _choose(task: Task, items: Sequence[Item], model: LanguageModel) -> Answered:
    classifier = model.config.n_classes > 0
    values = _labelled(items, model) if classifier else _likelihoods(task, items, model)
    answers = np.array([item.answer for item in items])
    alike = len({item.labels or item.choices for item in items}) == 1
    said = {name: np.array([int(np.argmax(v)) for v in values[name]]) for name in values}
    shares = [_softmax(v) for v in values["accuracy"]]

    def measure(name: str, rows: np.ndarray) -> Scored:
        if name in said:
            return metrics.accuracy(said[name][rows], answers[rows])
        if name == "macro_f1":
            return metrics.macro_f1(said["accuracy"][rows], answers[rows], len(items[0].choices))
        most = max(len(s) for s in shares)
        padded = np.array([np.pad(shares[i], (0, most - len(shares[i]))) for i in rows])
        return metrics.calibration_error(padded, answers[rows])

    names = [n for n in task.metrics if n in said or n == "calibration_error"]
    names += ["macro_f1"] if "macro_f1" in task.metrics and alike else []
    details = {}
    if alike:
        classes = items[0].labels or items[0].choices
        table = metrics.confusion(said["accuracy"], answers, len(classes))
        details["confusion"] = {"classes": list(classes), "right_by_said": table.tolist()}
        details["class_f1"] = dict(zip(classes, metrics.class_f1(table).tolist(), strict=True))
    records = [
        {"prompt": item.text or item.prompt, "choices": list(item.choices), "answer": item.answer,
         "said": int(said["accuracy"][i]), "log_probabilities": list(values["accuracy"][i])}
        for i, item in enumerate(items)
    ]  # fmt: skip
    return Answered(_grouped(items, measure, names), records, details)


def _likelihoods(
    task: Task, items: Sequence[Item], model: LanguageModel
) -> dict[str, list[np.ndarray]]:
    """log p of each choice after its prompt: as it is, by tokens and by bytes of the choice."""
    pairs = [(item.prompt, choice) for item in items for choice in item.choices]
    scores = iter(_fitting(model, pairs, task.name))
    by_item = [[next(scores) for _ in item.choices] for item in items]
    return {
        "accuracy": [np.array([s.log_probability for s in row]) for row in by_item],
        "accuracy_per_token": [
            np.array([s.log_probability / s.tokens for s in row]) for row in by_item
        ],
        "accuracy_per_byte": [
            np.array([s.log_probability / s.bytes for s in row]) for row in by_item
        ],
    }


def _labelled(items: Sequence[Item], model: LanguageModel) -> dict[str, list[np.ndarray]]:
    """A classifier's log probability of each choice, by the choices' labels."""
    known = {name: i for i, name in enumerate(model.labels)}
    for i, item in enumerate(items):
        for label in item.labels or item.choices:
            if label not in known:
                raise UserError(
                    f"item {i}: the class {label!r} is not one of the model's:"
                    f" {', '.join(map(repr, model.labels))}"
                )
    logits_bc = model.classify([item.text or item.prompt for item in items])
    rows = [
        logits_bc[i, [known[label] for label in item.labels or item.choices]]
        for i, item in enumerate(items)
    ]
    return {"accuracy": [np.log(_softmax(row)) for row in rows]}


def _softmax(values: np.ndarray) -> np.ndarray:
    e = np.exp(np.asarray(values, np.float64) - np.max(values))
    return e / e.sum()


def _fitting(model: LanguageModel, pairs: Sequence[tuple[str, str]], name: str) -> list[Score]:
    """Scores of (given, text); a pair that is longer than the model's context is told first."""
    for given, text in pairs:
        n = len(model.tokenizer.encode(given + text)) + 1
        if n > model.config.seq_len + 1:
            raise UserError(
                f"task {name}: {n} tokens in {given[:40]!r} … are more than the model's context"
                f" (model.seq_len={model.config.seq_len})"
            )
    return model.score([t for _, t in pairs], [g for g, _ in pairs])


# ------------------------------------------------------------------------- completing and writing


def _complete(task: Task, items: Sequence[Item], model: LanguageModel) -> Answered:
    pairs = [(item.prompt, item.references[0]) for item in items]
    scores = _fitting(model, pairs, task.name)

    def measure(name: str, rows: np.ndarray) -> Scored:
        some = [scores[i] for i in rows]
        if name == "accuracy":
            return mean_of([s.greedy for s in some])
        return metrics.perplexity([-s.log_probability for s in some], [s.tokens for s in some])

    records = [
        {"prompt": g, "reference": t, "greedy": s.greedy, "log_probability": s.log_probability}
        for (g, t), s in zip(pairs, scores, strict=True)
    ]
    return Answered(_grouped(items, measure, task.metrics), records)


def _write(task: Task, items: Sequence[Item], model: LanguageModel) -> Answered:
    """Greedy answers."""
    _check_room(task, items, model)
    texts = model.generate(
        [item.prompt for item in items], max_new_tokens=task.max_new_tokens, temperature=0.0,
        stop=task.stop, return_full_text=False,
    )  # fmt: skip
    said = [text.strip() for [text] in texts]
    said = said if task.extract is None else [task.extract(s) for s in said]

    def measure(name: str, rows: np.ndarray) -> Scored:
        score = metrics.written(name)
        assert score is not None
        return score([said[i] for i in rows], [items[i].references for i in rows])

    records = [
        {"prompt": item.prompt, "references": list(item.references), "said": s}
        for item, s in zip(items, said, strict=True)
    ]
    return Answered(_grouped(items, measure, task.metrics), records)


def _code(task: Task, items: Sequence[Item], model: LanguageModel) -> Answered:
    """Programs, run in a process apart (`sandbox`)."""
    _check_room(task, items, model)
    said = model.generate(
        [item.prompt for item in items], max_new_tokens=task.max_new_tokens,
        num_return_sequences=task.samples, temperature=0.8 if task.samples > 1 else 0.0,
        stop=task.stop, return_full_text=False,
    )  # fmt: skip
    right = [
        sum(sandbox.passes(f"{item.prompt}{s}\n{item.references[0]}") for s in of_item)
        for item, of_item in zip(items, said, strict=True)
    ]

    def measure(name: str, rows: np.ndarray) -> Scored:
        k = int(name.removeprefix("pass@"))
        return mean_of([sandbox.pass_at_k(task.samples, right[i], k) for i in rows])

    names = [name for name in task.metrics if int(name.removeprefix("pass@")) <= task.samples]
    records = [
        {"prompt": item.prompt, "said": s, "passed": r}
        for item, s, r in zip(items, said, right, strict=True)
    ]
    return Answered(_grouped(items, measure, names), records)


def _check_room(task: Task, items: Sequence[Item], model: LanguageModel) -> None:
    """What does not fit beside `max_new_tokens` is told before anything is written."""
    most = model.config.seq_len - task.max_new_tokens
    for i, item in enumerate(items):
        n = len(model.tokenizer.encode(item.prompt))
        if n > most and model.config.architecture == "decoder":
            raise UserError(
                f"task {task.name}: item {i} has {n} tokens; beside {task.max_new_tokens} new ones"
                f" the context (model.seq_len={model.config.seq_len}) has room for {most}"
            )


# ------------------------------------------------------------------------------------------ reading


def _read(task: Task, items: Sequence[Item], model: LanguageModel) -> Answered:
    """Every token of every text once: a text that is longer than the context is read in pieces, of
    which each begins after the last token of the one before."""
    ids, starts, owner = [], [], []
    for i, item in enumerate(items):
        for piece in model.pieces(model.tokenizer.encode(item.references[0])):
            ids.append(piece)
            starts.append(1)
            owner.append(i)
    nats = np.zeros(len(items))
    tokens = np.zeros(len(items), int)
    for i, piece, (log_p, _) in zip(owner, ids, model.score_ids(ids, starts), strict=True):
        nats[i] -= log_p
        tokens[i] += len(piece) - 1
    n_bytes = np.array([len(item.references[0].encode()) for item in items])

    def measure(name: str, rows: np.ndarray) -> Scored:
        if name == "perplexity":
            return metrics.perplexity(nats[rows], tokens[rows])
        return metrics.bits_per_byte(nats[rows], n_bytes[rows])

    records = [
        {"group": item.group, "nats": float(nats[i]), "tokens": int(tokens[i]),
         "bytes": int(n_bytes[i])}
        for i, item in enumerate(items)
    ]  # fmt: skip
    return Answered(_grouped(items, measure, task.metrics), records)
