"""A task: where its items are, what a model is asked, and what is measured.

A task is one small Python file with `get_task() -> Task`; `shipped` has some ready.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from jaxlm import pyfile
from jaxlm.data.units import is_spaceless
from jaxlm.evaluate import metrics
from jaxlm.schema import UserError, hint

HUB = "hub"  # in place of a path: fetch the data from where they are published

KINDS = {
    "choose": ("accuracy", "accuracy_per_token", "accuracy_per_byte", "macro_f1",
               "calibration_error"),
    "complete": ("accuracy", "perplexity"),
    "write": (),  # whatever `metrics.written` knows
    "code": ("pass@1", "pass@10", "pass@100"),
    "read": ("perplexity", "bits_per_byte"),
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One question. Which fields it needs depends on the task's kind."""

    prompt: str = ""
    choices: tuple[str, ...] = ()  # choose: what may follow the prompt
    labels: tuple[str, ...] = ()  # choose: what a classifier calls the choices; (): as they are
    answer: int = -1  # choose: which one is right
    references: tuple[str, ...] = ()  # complete, write: what is right; read: the text; code: tests
    text: str = ""  # choose: what a classifier reads; '': the prompt
    group: str = ""  # language, domain, subject …: scored apart, too


@dataclass(frozen=True)
class Task:
    """How a model is asked.

    choose: the likeliest of an item's choices, or a classifier's label; complete: is the reference
    what greedy decoding writes; write: a text; code: a program that begins with the prompt and ends
    with the reference, its tests; read: how likely the reference is.
    """

    name: str
    kind: Literal["choose", "complete", "write", "code", "read"]
    items: Callable[[str], Iterable[Item]]  # of a path or URL
    metrics: tuple[str, ...]
    home: str = ""  # URL of the data, fetched when asked for as NAME=hub
    licence: str = ""  # of the data
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ("\n",)  # write: an answer ends before one of these
    extract: Callable[[str], str] | None = None  # write: the answer in what was written
    samples: int = 1  # code: programs per item, drawn at temperature 0.8 where more than one


def load(name: str) -> Task:
    """A shipped task, or that of a 'file.py'. Raises UserError."""
    from jaxlm.tasks.shipped import SHIPPED

    if name in SHIPPED:
        return checked(SHIPPED[name])
    if not name.endswith(".py"):
        raise UserError(f"--task: no {name!r}; {hint(name, SHIPPED)}, or a 'file.py' of your own")
    module = pyfile.load(Path(name), "--task")
    make = getattr(module, "get_task", None)
    if make is None:
        raise UserError(f"--task: {name} does not define get_task()")
    with pyfile.told_by_line(module, "--task"):
        task = make()
    if not isinstance(task, Task):
        raise UserError(f"--task: {name} returned {type(task).__name__}, not a Task")
    return checked(task)


def checked(task: Task) -> Task:
    """`task`, if its kind and metrics are known. Raises UserError."""
    if task.kind not in KINDS:
        raise UserError(f"task {task.name}: no kind {task.kind!r}; {hint(task.kind, KINDS)}")
    for name in task.metrics:
        known = KINDS[task.kind]
        if name not in known and not (task.kind == "write" and metrics.written(name)):
            choices = known or ("exact_match", "f1", "bleu", "chrf", "rouge1", "rouge2", "rougeL")
            raise UserError(f"task {task.name}: no metric {name!r}; {hint(name, choices)}")
    return task


def read(task: Task, path: str, limit: int = 0) -> list[Item]:
    """The task's items (the first `limit`, if any). Raises UserError, naming the item, for one that
    is not whole."""
    if path == HUB:
        if not task.home:
            raise UserError(f"task {task.name}: states no address; give a path, as in NAME=PATH")
        path = task.home
    if not path:
        at = f" or --task={task.name}={HUB} to fetch {task.home}" if task.home else ""
        raise UserError(f"task {task.name}: where are its data? --task={task.name}=PATH{at}")
    items: list[Item] = []
    for i, item in enumerate(task.items(path)):
        wrong = _wrong(task, item)
        if wrong:
            raise UserError(f"task {task.name}: item {i} of {path} {wrong}")
        items.append(item)
        if limit and len(items) == limit:
            break
    if not items:
        raise UserError(f"task {task.name}: no items in {path}")
    return items


def with_shots(task: Task, items: list[Item], shots: int, seed: int) -> list[Item]:
    """The items but for `shots` of them, which stand answered before each of the others, an empty
    line between them. Raises UserError where too few are left, or a task has no prompts."""
    if not shots:
        return items
    if task.kind not in ("choose", "complete", "write"):
        raise UserError(f"--shots: task {task.name} has nothing to show how it is answered")
    if shots >= len(items):
        raise UserError(f"--shots: {shots} of the {len(items)} items of task {task.name}")
    drawn = np.random.default_rng(seed).choice(len(items), shots, replace=False).tolist()
    shown = "".join(f"{_answered(items[i])}\n\n" for i in drawn)
    return [
        replace(item, prompt=shown + item.prompt, text=item.text or item.prompt)
        for i, item in enumerate(items)
        if i not in set(drawn)
    ]


def _answered(item: Item) -> str:
    """An item's prompt and what is right; a blank stands between them where the prompt ends in a
    letter or sign and the answer begins with one."""
    right = item.choices[item.answer] if item.choices else item.references[0]
    blank = "" if not item.prompt or right[:1].isspace() or item.prompt[-1].isspace() else " "
    blank = "" if is_spaceless(item.prompt) else blank
    return f"{item.prompt}{blank}{right}".strip()


def _wrong(task: Task, item: Item) -> str:
    """What is missing in an item; '' where nothing is."""
    if task.kind == "choose":
        if len(item.choices) < 2 or not all(item.choices):
            return "has fewer than two choices, or an empty one"
        if not 0 <= item.answer < len(item.choices):
            return f"has no right answer: {item.answer} of {len(item.choices)} choices"
        return ""
    if not item.references or not all(r.strip() for r in item.references):
        return "has an empty reference"
    return "" if item.prompt or task.kind == "read" else "has an empty prompt"
