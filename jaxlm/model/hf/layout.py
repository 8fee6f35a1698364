"""How a tensor of a checkpoint lies against a parameter of ours, as one line of a table.

    Row("layers.attention.query", "model.layers.{l}.self_attn.q_proj.weight", "(h k) d")

says: for layer l, their matrix has a first axis in which the head counts slowly and the width of
the head fast, and a second of d_model. Letters are those of our logical axes (`LETTERS`); the
same line serves reading a slice of it and writing it. So every storage convention (fused
query/key/value, transposed matrices, one tensor per layer and expert) is data, not code.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxlm.model.transformer import Declared

# Logical axis → letter. A second axis of the same name has the letter in upper case.
LETTERS = {
    "layers": "l",
    "experts": "e",
    "routes": "e",
    "vocab": "v",
    "d_model": "d",
    "heads": "h",
    "kv_heads": "g",
    "d_head": "k",
    "d_ff": "f",
    "d_out": "o",
    "positions": "p",
    "types": "t",
    "buckets": "b",
    "classes": "c",
}

Index = Sequence[slice]
Read = Callable[[str, tuple[slice, ...]], np.ndarray]


@dataclass(frozen=True)
class Row:
    """One parameter of ours and where it lies in theirs.

    `axes` names the axes of their tensor by our letters; letters in brackets share one axis, the
    first counting slowest. Axes l and e of ours may stand in the name instead. An axis `n` is
    theirs alone (several of our parameters in one tensor): ours is `part` = (which, of how many).
    """

    ours: str
    theirs: str
    axes: str
    part: tuple[int, int] = (0, 1)
    add: float = 0.0  # ours = theirs + add (a gain stored as its distance from one)


@dataclass(frozen=True)
class Tensor:
    """One tensor of theirs: what it is called and shaped like."""

    name: str
    shape: tuple[int, ...]
    at: tuple[int, ...]  # index into ours along the axes that stand in the name


@dataclass(frozen=True)
class Layout:
    """A row against a parameter's declared shape."""

    row: Row
    letters: tuple[str, ...]  # of our axes
    sizes: Mapping[str, int]  # of each letter
    groups: tuple[tuple[str, ...], ...]  # letters of each of their axes
    named: tuple[str, ...]  # letters that stand in the name
    declared: Declared

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.sizes[x] for x in self.letters)

    @property
    def their_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[x] for x in g) for g in self.groups)

    @property
    def _inner(self) -> list[str]:
        return [x for x in self.letters if x not in self.named]

    def tensors(self) -> Iterator[Tensor]:
        for at in itertools.product(*(range(self.sizes[x]) for x in self.named)):
            name = self.row.theirs.format(**dict(zip(self.named, at, strict=True)))
            yield Tensor(name, self.their_shape, at)

    def read(self, index: Index, read: Read) -> np.ndarray:
        """Float32 slice `index` of our parameter; `read(name, slices)` gives slices of theirs."""
        want = {
            x: range(*part.indices(self.sizes[x]))
            for x, part in zip(self.letters, index, strict=True)
        }
        which, _ = self.row.part
        want["n"] = range(which, which + 1)
        cuts = [self._cut(group, want) for group in self.groups]
        slices = tuple(cut for cut, _, _ in cuts)
        whole = tuple(n for _, shape, _ in cuts for n in shape)
        inside = tuple(part for _, _, parts in cuts for part in parts)
        order = self._order()
        out = np.empty([len(want[x]) for x in self.letters], np.float32)
        for at in itertools.product(*(enumerate(want[x]) for x in self.named)):
            name = self.row.theirs.format(
                **{x: i for x, (_, i) in zip(self.named, at, strict=True)}
            )
            piece = read(name, slices).reshape(whole)[inside].transpose(order)
            place = tuple(j for j, _ in at)
            target = out[self.place(place)]
            target[...] = piece.reshape(target.shape)
        return out + np.float32(self.row.add) if self.row.add else out

    def write(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Puts our part (a `place` of the parameter) into their tensor, of `their_shape`."""
        letters = [x for group in self.groups for x in group]
        factored = theirs.reshape([self.sizes[x] for x in letters])
        view = factored[tuple(self.row.part[0] if x == "n" else slice(None) for x in letters)]
        order = [self._inner.index(x) for x in letters if x != "n"]
        view[...] = ours.transpose(order) - np.float32(self.row.add)

    def place(self, at: tuple[int, ...]) -> tuple[int | slice, ...]:
        """Index of one tensor's share among ours, from the axes that stand in its name."""
        where = dict(zip(self.named, at, strict=True))
        return tuple(where.get(x, slice(None)) for x in self.letters)

    def _order(self) -> list[int]:
        """Permutation from their factored axes (n, of length one, first) to ours."""
        flat = [x for g in self.groups for x in g]
        return [flat.index(x) for x in flat if x == "n"] + [flat.index(x) for x in self._inner]

    def _cut(
        self, group: Sequence[str], want: Mapping[str, range]
    ) -> tuple[slice, tuple[int, ...], tuple[slice, ...]]:
        """The shortest run of one of their axes that holds what is wanted: as a slice, its shape
        in letters, and what of that is wanted."""
        start, block = 0, math.prod(self.sizes[x] for x in group)
        for i, letter in enumerate(group):
            some, block = want[letter], block // self.sizes[letter]
            start += some.start * block
            if len(some) != 1:
                rest = group[i + 1 :]
                shape = (*[1] * i, len(some), *(self.sizes[x] for x in rest))
                parts = [slice(want[x].start, want[x].stop) for x in rest]
                inside = (*[slice(None)] * (i + 1), *parts)
                return slice(start, start + len(some) * block), shape, inside
        return slice(start, start + 1), (1,) * len(group), (slice(None),) * len(group)


def layout(row: Row, declared: Declared) -> Layout:
    letters: list[str] = []
    for axis in declared.axes:
        letter = LETTERS[axis]
        letters.append(letter.upper() if letter in letters else letter)
    sizes = {**dict(zip(letters, declared.shape, strict=True)), "n": row.part[1]}
    groups = tuple(tuple(a or b) for a, b in _groups(row.axes))
    named = tuple(x for x in letters if f"{{{x}}}" in row.theirs)
    used = sorted([x for g in groups for x in g if x != "n"] + list(named))
    if used != sorted(letters):
        raise ValueError(f"{row}: axes {used}, ours are {sorted(letters)}")
    return Layout(row, tuple(letters), sizes, groups, named, declared)


def _groups(axes: str) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    found = re.findall(r"\(([^)]*)\)|(\S)", axes)
    return [(tuple(many.split()), tuple(one)) for many, one in found]
