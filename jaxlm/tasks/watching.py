"""Tasks that are scored while a model trains, beside its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from jaxlm.config import Config
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.language_model import LanguageModel
from jaxlm.schema import UserError
from jaxlm.tasks import answers, task
from jaxlm.tasks.task import Item, Task
from jaxlm.train.loop import Observer


def read(config: Config) -> dict[str, tuple[Task, list[Item]]]:
    """The tasks of `train.tasks` by name. Raises UserError."""
    found: dict[str, tuple[Task, list[Item]]] = {}
    for text in config.train.tasks:
        name, _, path = text.partition("=")
        one = task.load(name)
        if one.kind == "code":
            raise UserError(f"config.train.tasks: {one.name} runs what a model writes")
        if one.name in found:
            raise UserError(f"config.train.tasks: {one.name} is there twice")
        found[one.name] = one, task.read(one, path, config.train.task_items)
    return found


def observers(
    asked: dict[str, tuple[Task, list[Item]]],
    words: Tokenizer,
    labels: Sequence[str] = (),
    bos_id: int | None = None,
) -> list[Observer]:
    """One for each task: it logs a row of task/NAME/METRIC. The model is that which `words`, a
    classifier's `labels` and a decoder's `bos_id` belong to."""
    return [_observer(*one, words, tuple(labels), bos_id) for one in asked.values()]


def _observer(
    one: Task, items: list[Item], words: Tokenizer, labels: tuple[str, ...], bos_id: int | None
) -> Observer:
    def observe(config: Config, params: Any, step: int) -> list[dict[str, Any]]:
        devices = jax.sharding.get_mesh()
        model = LanguageModel(words, config.model, params, devices, bos_id=bos_id, labels=labels)
        scores = answers.answer(one, items, model).scores
        whole = {metric: s.value for (group, metric), s in scores.items() if not group}
        return [{"step": step, **{f"task/{one.name}/{m}": x for m, x in whole.items()}}]

    return observe
