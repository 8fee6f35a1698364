"""Items of tasks in what a run was trained on: the data stage's check, the other way round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxlm import tuning
from jaxlm.data import contamination, examples, shards, tokenizer, windows
from jaxlm.schema import UserError
from jaxlm.tasks.task import Item
from jaxlm.train.run import read_config


def trained_on(folder: Path) -> Iterator[str]:
    """The texts of a run's training half: of its examples, or of its shards, token by token. Raises
    UserError where they are gone."""
    config = read_config(folder)
    if config.tune.examples:
        found = examples.split(tuning.read(config), config.data.eval_fraction)[0]
        yield from (f"{example.input}\n{example.target}" for example in found)
        return
    data_dir = Path(config.data.dir) if config.data.dir else folder / "data"
    if not (data_dir / shards.MANIFEST).exists():
        raise UserError(f"--leaks: the text that {folder} was trained on is not in {data_dir}")
    words = tokenizer.load(data_dir / "tokenizer")
    dataset = windows.Dataset.open(data_dir, "train", config.model.seq_len)
    for segment in dataset.segments:
        for first, end in zip(segment.offsets[:-1], segment.offsets[1:], strict=True):
            yield words.decode(segment.tokens[first:end])


def leaked(items: Sequence[Item], texts: Iterator[str]) -> list[bool]:
    """Of each item, whether one of the texts holds a line of it, or 13 words (26 letters) in a row
    (`contamination`)."""
    return contamination.leaked([_text(item) for item in items], texts)


def _text(item: Item) -> str:
    right = item.choices[item.answer : item.answer + 1] if item.choices else item.references
    return "\n".join([item.text or item.prompt, *right])
