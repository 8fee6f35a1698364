"""A checkpoint of others as our parameters, straight onto the mesh, shard by shard."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.model.hf.families import FAMILIES
from jaxlm.model.hf.family import Family, Json, find
from jaxlm.model.hf.gguf import Gguf
from jaxlm.model.hf.layout import Layout
from jaxlm.model.hf.source import Safetensors, Source, read_object
from jaxlm.model.transformer import Params
from jaxlm.schema import UserError

Layouts = dict[tuple[str, ...], Layout]


@dataclass(frozen=True)
class Checkpoint:
    """A folder's checkpoint, its config read and its tensors checked; no weight is read yet."""

    family: Family
    config: ModelConfig
    theirs: Json  # config.json
    source: Source
    layouts: Layouts


def open_folder(folder: Path) -> Checkpoint:
    """Raises UserError: no or another config, damaged files, missing or other tensors (all are
    named)."""
    theirs = read_object(folder / "config.json")
    family = find(FAMILIES, theirs, str(folder / "config.json"))
    config = family.config(theirs, str(folder / "config.json"))
    return matched(family, config, theirs, Safetensors(folder))


def of_gguf(file: Gguf) -> Checkpoint:
    """A GGUF file of the Llama family. Raises UserError as `open_folder`."""
    family = find(FAMILIES, file.config, file.where)
    return matched(family, family.config(file.config, file.where), file.config, file)


def matched(family: Family, config: ModelConfig, theirs: Json, source: Source) -> Checkpoint:
    """The checkpoint, if `source` holds exactly its tensors. Raises UserError listing all that
    are missing, misshapen or left over (`Family.ties` and `buffers` may be there)."""
    layouts = family.layouts(config)
    expected: dict[str, tuple[int, ...]] = {}
    for one in layouts.values():
        expected |= {t.name: t.shape for t in one.tensors()}
    source = _Renamed(source, family, expected)
    found = source.shapes()
    ties = [n for n in family.ties if n in found and n not in expected]
    missing = [f"{n} {list(s)}" for n, s in expected.items() if n not in found]
    misshapen = [
        f"{n} is {list(found[n])}, expected {list(s)}"
        for n, s in expected.items()
        if n in found and found[n] != s
    ]
    known = {*expected, *ties}
    extra = [n for n in found if n not in known and not family.is_buffer(n)]
    wrong = [
        f"{len(names)} {what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("misshapen", misshapen), ("unexpected", extra))
        if names
    ]
    if wrong:
        kind = f"not the tensors of a {family.architecture}"
        raise UserError(f"{source.where}: {kind}: {'; '.join(wrong)}")
    embedding = next(iter(layouts["embedding",].tensors())).name
    for name in ties:
        if found[name] == found[embedding] and not _equal(source, name, embedding):
            raise UserError(
                f"{source.where}: {name} is not {embedding}; expected so, or tie_word_embeddings"
                " false in config.json"
            )
    return Checkpoint(family, config, theirs, source, layouts)


def _equal(source: Source, a: str, b: str) -> bool:
    """Whether two tensors hold the same numbers, compared some rows at a time."""
    rows = source.shapes()[a][0]
    parts = [(slice(i, min(i + 4096, rows)), slice(None)) for i in range(0, rows, 4096)]
    return all(np.array_equal(source.read(a, part), source.read(b, part)) for part in parts)


class _Renamed:
    """A source under the names that its family has now: the prefix that a bare base model leaves
    out, and what was called otherwise once."""

    def __init__(self, inner: Source, family: Family, expected: dict[str, Any]) -> None:
        self.where, self._inner = inner.where, inner
        names = {name: name for name in inner.shapes()}
        for old, new in family.older:
            names = {name.replace(old, new): n for name, n in names.items()}
        prefix = family.prefix
        if not any(name.startswith(prefix) for name in names):
            names = {
                prefix + name if prefix + name in expected or name not in expected else name: n
                for name, n in names.items()
            }
        self._names = names

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self._inner.shapes()
        return {name: shapes[n] for name, n in self._names.items()}

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        return self._inner.read(self._names[name], slices)


def load(checkpoint: Checkpoint) -> Params:
    """Float32 parameters on the mesh that is set. Each device's part of a parameter is read from
    the files by itself, one after the other: the checkpoint is never in memory twice."""
    devices = jax.sharding.get_mesh()
    params: Params = {}
    for path, one in checkpoint.layouts.items():
        sharding = jax.NamedSharding(devices, one.declared.spec)
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        read = functools.partial(one.read, read=checkpoint.source.read)
        node[path[-1]] = jax.make_array_from_callback(one.shape, sharding, read)
    return params
