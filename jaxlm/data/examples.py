"""Labelled examples as batches: records to token ids, held-out ones by hash of their text.

Equal inputs stand on one side, whatever their labels, and which side that is follows from the text
alone. Order and prefetching are the loader's, as for windows of text.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm.data.rows import Row, field, rows
from jaxlm.data.windows import Batch, PairBatch, TaughtBatch, best_fit
from jaxlm.files import first_line
from jaxlm.pyfile import is_reference, resolve
from jaxlm.schema import JaxlmError, UserError

WHERE = "tune.examples"
MAX_CLASSES = 1000


@dataclass(frozen=True)
class Labelled:
    """One example: its input, and what is to be said of it."""

    input: str
    target: Any  # a class's name, a number, a text; several texts; a conversation's messages; each
    # word of the input with its class, as a tuple of pairs


def read(sources: Sequence[str], input_field: str, targets: Sequence[str]) -> list[Labelled]:
    """All examples, in order; `targets` names the fields of what is to be said (one: its value,
    several: a list). Raises UserError for a record without input or target."""
    found = []
    for i, row in enumerate(_records(sources)):
        if "messages" in row:
            found.append(_conversation(row["messages"], i))
            continue
        text = field(row, input_field, i, WHERE)
        said = [field(row, name, i, WHERE) for name in targets]
        if isinstance(text, list):
            found.append(_tagged(text, said[0] if said else None, i))
            continue
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{WHERE}: record {i} has an empty {input_field!r}")
        for name, target in zip(targets, said, strict=True):
            if target is None or (isinstance(target, str) and not target.strip()):
                raise UserError(f"{WHERE}: record {i} has no {name!r}")
        found.append(Labelled(text, said[0] if len(said) == 1 else said))
    if not found:
        raise UserError(f"{WHERE}: no examples in {', '.join(sources)}")
    return found


def _records(sources: Sequence[str]) -> Iterable[Row]:
    for source in sources:
        if not is_reference(source):
            yield from rows(source, WHERE)
            continue
        try:
            yield from resolve(source, WHERE)()
        except JaxlmError:
            raise
        except Exception as e:
            raise UserError(f"{WHERE}: {source} failed: {first_line(e)}") from e


def _conversation(messages: Any, i: int) -> Labelled:
    """Its input is what the assistant did not say."""
    where, turns = f"{WHERE}: record {i}", {"assistant": [], "other": []}  # type: ignore[var-annotated]
    for message in messages if isinstance(messages, list) else [None]:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f"{where} has messages that are not role and content")
        who = "assistant" if message.get("role") == "assistant" else "other"
        turns[who].append(message["content"])
    if not turns["assistant"] or not all(map(str.strip, turns["assistant"])):
        raise UserError(f"{where} has no answer, or an empty one")
    return Labelled("\n".join(turns["other"]), messages)


def _tagged(words: Any, tags: Any, i: int) -> Labelled:
    """Words and a class of each."""
    known = isinstance(tags, list) and len(tags) == len(words) > 0
    if not known or not all(isinstance(x, str) and x.strip() for x in (*words, *tags)):
        raise UserError(f"{WHERE}: record {i} needs as many classes as words, and none empty")
    return Labelled(" ".join(words), tuple(zip(words, tags, strict=True)))


def is_held_out(text: str, fraction: float) -> bool:
    """Whether an example of this input is for evaluation: by the first 8 bytes of its sha256."""
    return int.from_bytes(_digest(text)[:8], "big") < fraction * 2**64


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def split(examples: Sequence[Labelled], fraction: float) -> tuple[list[Labelled], list[Labelled]]:
    """(training, held-out). Raises UserError where one of them would be empty."""
    sides: tuple[list[Labelled], list[Labelled]] = ([], [])
    for example in examples:
        sides[is_held_out(example.input, fraction)].append(example)
    if not sides[0] or not sides[1]:
        raise UserError(
            f"data.eval_fraction: of {len(examples)} examples {len(sides[1])} are held out; both"
            " sides need some"
        )
    return sides


def fingerprint(examples: Sequence[Labelled], beside: Sequence[np.ndarray] = ()) -> str:
    """16 hex digits of the examples and their order, and of what stands beside them."""
    total = hashlib.sha256()
    for example in examples:
        total.update(_digest(f"{example.input}\0{example.target}"))
    for array in beside:
        total.update(array.tobytes())
    return total.hexdigest()[:16]


def classes(training: Sequence[Labelled], held_out: Sequence[Labelled]) -> tuple[str, ...]:
    """The classes' names, sorted. Raises UserError for fewer than two, too many, and for one that
    occurs in held-out examples alone."""
    counts = Counter(name for e in training for name in _names(e))
    if not 2 <= len(counts) <= MAX_CLASSES:
        raise UserError(
            f"{WHERE}: expected 2 to {MAX_CLASSES} classes, got {len(counts)}:"
            f" {', '.join(sorted(counts)[:5])}"
        )
    for name in (name for example in held_out for name in _names(example)):
        if name not in counts:
            raise UserError(f"{WHERE}: the class {name!r} is in held-out examples alone")
    return tuple(sorted(counts))


def _names(example: Labelled) -> list[str]:
    """The classes of an example: its own, or of each word."""
    tagged = isinstance(example.target, tuple)
    return [tag for _, tag in example.target] if tagged else [str(example.target)]


# ------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True)
class Examples:
    """Examples as rows of a batch, numbered; what `loader.chunk` asks of a dataset."""

    ids: list[np.ndarray]  # what a model reads, int32 [at most seq_len]
    said: list[np.ndarray]  # what it says: targets [t] …
    weights: list[np.ndarray]  # … and float32 [t], where they count
    seq_len: int
    target_len: int  # places for targets
    rows: Sequence[Sequence[int]]  # which examples stand in a row
    targets_type: Any = np.int32
    beside: list[np.ndarray] | None = None  # float32 [t, k], as in TaughtBatch
    two_stacks: bool = False  # what is read and what is said stand in rows of their own
    sources: tuple[str, ...] = ("examples",)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def windows_of(self) -> dict[int, range]:
        return {0: range(len(self))}

    def windows(self, numbers: np.ndarray) -> Batch | TaughtBatch | PairBatch:
        """The rows of these numbers (int, any shape), as [*shape, t]; a segment is an example."""
        flat = np.asarray(numbers, np.int64).reshape(-1)
        tokens, segments, positions = np.zeros((3, len(flat), self.seq_len), np.int32)
        targets = np.zeros((len(flat), self.target_len), self.targets_type)
        weights, said_of = np.zeros(targets.shape, np.float32), np.zeros(targets.shape, np.int32)
        for row, number in enumerate(flat.tolist()):
            at = to = 0
            for segment, i in enumerate(self.rows[number], 1):
                n, t = len(self.ids[i]), len(self.said[i])
                tokens[row, at : at + n], segments[row, at : at + n] = self.ids[i], segment
                positions[row, at : at + n] = np.arange(n)
                targets[row, to : to + t], weights[row, to : to + t] = self.said[i], self.weights[i]
                said_of[row, to : to + t] = segment
                at, to = at + n, to + t
        leaves = tokens, targets, weights, segments, positions, said_of
        shaped = [x.reshape(*np.shape(numbers), x.shape[-1]) for x in leaves]
        if self.two_stacks:
            return PairBatch(*shaped)
        batch = Batch(*shaped[:5])
        return batch if self.beside is None else TaughtBatch(*batch, self._beside(numbers))

    def _beside(self, numbers: np.ndarray) -> np.ndarray:
        assert self.beside is not None
        flat, k = np.asarray(numbers).reshape(-1), self.beside[0].shape[-1]
        out = np.zeros((len(flat), self.seq_len, k), np.float32)
        for row, number in enumerate(flat.tolist()):
            at = 0
            for i in self.rows[number]:
                out[row, at : at + len(self.ids[i])] = self.beside[i]
                at += len(self.ids[i])
        return out.reshape(*np.shape(numbers), self.seq_len, k)


def alone(n: int) -> list[tuple[int]]:
    """Each example in a row of its own."""
    return [(i,) for i in range(n)]


def packed(sizes: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of examples of these sizes, none longer than `capacity` (`windows.best_fit`)."""
    bins = best_fit(sizes, capacity)
    rows: list[list[int]] = [[] for _ in range(int(bins.max()) + 1)]
    for i, where in enumerate(bins.tolist()):
        rows[where].append(i)
    return rows


def of_classes(
    ids: list[np.ndarray], examples: Sequence[Labelled], names: Sequence[str], seq_len: int
) -> Examples:
    """Each text's class stands at its first place."""
    number = {name: i for i, name in enumerate(names)}
    said = [np.array([number[str(e.target)]], np.int32) for e in examples]
    one = np.ones(1, np.float32)
    return Examples(ids, said, [one] * len(ids), seq_len, seq_len, alone(len(ids)))


def of_tags(
    ids: list[list[np.ndarray]], examples: Sequence[Labelled], names: Sequence[str], seq_len: int
) -> Examples:
    """The class of each word stands at its first token. `ids` has each text's tokens by word, with
    what stands before the first of them and after the last; a word without tokens says nothing."""
    number = {name: i for i, name in enumerate(names)}
    whole, said, weights = [], [], []
    for pieces, example in zip(ids, examples, strict=True):
        row, target = np.concatenate(pieces), np.zeros(sum(map(len, pieces)), np.int32)
        weight, at = np.zeros(len(target), np.float32), len(pieces[0])
        for piece, tag in zip(pieces[1:-1], _names(example), strict=True):
            if len(piece):
                target[at], weight[at] = number[tag], 1.0
            at += len(piece)
        whole.append(row[:seq_len].astype(np.int32))
        said.append(target[:seq_len])
        weights.append(weight[:seq_len])
    rows = packed(np.array([len(row) for row in whole]), seq_len)
    return Examples(whole, said, weights, seq_len, seq_len, rows)


def of_numbers(ids: list[np.ndarray], examples: Sequence[Labelled], seq_len: int) -> Examples:
    """Each text's number stands at its first place. Raises UserError for what is none."""
    try:
        said = [np.array([float(e.target)], np.float32) for e in examples]
    except (TypeError, ValueError) as e:
        raise UserError(f"{WHERE}: a target is no number: {e}") from e
    one = np.ones(1, np.float32)
    rows = alone(len(ids))
    return Examples(ids, said, [one] * len(ids), seq_len, seq_len, rows, np.float32)


def of_answers(pairs: Sequence[tuple[np.ndarray, np.ndarray]], seq_len: int) -> Examples:
    """Next tokens, of which those count that an answer says: (ids [n], bool [n]) each. They are
    packed into rows (`windows.best_fit`); what is longer than a row and a target loses its end.
    Raises UserError where that leaves no answer."""
    for i, (_, says) in enumerate(pairs):
        if not says[1 : seq_len + 1].any():
            raise UserError(
                f"{WHERE}: example {i}: the prompt fills the context of {seq_len} tokens"
                " (tune.max_tokens), so that no answer is left"
            )
    cut = [(ids[: seq_len + 1], says[: seq_len + 1]) for ids, says in pairs]
    ids, said = [i[:-1] for i, _ in cut], [i[1:] for i, _ in cut]
    weights = [s[1:].astype(np.float32) for _, s in cut]
    rows = packed(np.array([len(i) for i in ids]), seq_len)
    return Examples(ids, said, weights, seq_len, seq_len, rows)


def of_pairs(
    sources: list[np.ndarray], targets: list[np.ndarray], seq_len: int, target_len: int
) -> Examples:
    """A source for an encoder and a target, its end included, for a decoder; both are cut, and
    several pairs stand in a row, which do not see each other."""
    ids, said = [s[:seq_len] for s in sources], [t[:target_len] for t in targets]
    weights = [np.ones(len(t), np.float32) for t in said]
    # The larger share of its row that a half of a pair takes, counted in places for targets.
    shares = [
        max(-(-len(s) * target_len // seq_len), len(t)) for s, t in zip(ids, said, strict=True)
    ]
    rows = packed(np.array(shares), target_len)
    return Examples(ids, said, weights, seq_len, target_len, rows, two_stacks=True)


def of_preferences(answers: Sequence[tuple[np.ndarray, np.ndarray]], seq_len: int) -> Examples:
    """Pairs in a row: `answers` has each pair's chosen text and then its other one, as (ids, bool)
    each. A pair weighs 1; `beside` has a place for the reference's log p, and where the answer is.
    Raises UserError where a pair does not fit into a row."""
    ids = [i[:-1] for i, _ in answers]
    for i in range(0, len(ids), 2):
        n = len(ids[i]) + len(ids[i + 1])
        if n > seq_len:
            raise UserError(
                f"{WHERE}: pair {i // 2} has {n} tokens, more than the {seq_len} of a row"
                " (tune.max_tokens)"
            )
    weights = [np.zeros(len(i), np.float32) for i in ids]
    for chosen in weights[::2]:
        chosen[0] = 1.0
    beside = [np.stack([np.zeros(len(s) - 1), s[1:]], axis=1) for _, s in answers]
    rows = [(i, i + 1) for i in range(0, len(ids), 2)]
    said = [i[1:] for i, _ in answers]
    return Examples(ids, said, weights, seq_len, seq_len, rows,
                    beside=[b.astype(np.float32) for b in beside])  # fmt: skip
