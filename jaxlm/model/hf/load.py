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
from jaxlm.model.hf.family import Family, find
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
    theirs: dict[str, Any]  # config.json
    source: Source
    layouts: Layouts


def open_folder(folder: Path) -> Checkpoint:
    """Raises UserError: no or another config, damaged files, missing or other tensors (all are
    named)."""
    theirs = read_object(folder / "config.json")
    family = find(FAMILIES, theirs.get("model_type"), str(folder / "config.json"))
    config = family.config(theirs, str(folder / "config.json"))
    return matched(family, config, theirs, Safetensors(folder))


def of_gguf(file: Gguf) -> Checkpoint:
    """A GGUF file of the Llama family. Raises UserError as `open_folder`."""
    family = find(FAMILIES, file.config["model_type"], file.where)
    return matched(family, family.config(file.config, file.where), file.config, file)


def matched(
    family: Family, config: ModelConfig, theirs: dict[str, Any], source: Source
) -> Checkpoint:
    """The checkpoint, if `source` holds exactly its tensors. Raises UserError listing all that
    are missing, misshapen or left over (`Family.ties` and `buffers` may be there)."""
    layouts, found = family.layouts(config), source.shapes()
    bare = not any(name.startswith(family.prefix) for name in found)
    expected: dict[str, tuple[int, ...]] = {}
    for one in layouts.values():
        expected |= {t.name: t.shape for t in one.tensors()}
    if bare:
        source = _Prefixed(source, family.prefix, expected)
        found = source.shapes()
    ties = family.ties if config.tie_embeddings else ()
    missing = [f"{n} {list(s)}" for n, s in expected.items() if n not in found]
    misshapen = [
        f"{n} is {list(found[n])}, expected {list(s)}"
        for n, s in expected.items()
        if n in found and found[n] != s
    ]
    extra = [n for n in found if n not in expected and n not in ties and not family.is_buffer(n)]
    wrong = [
        f"{len(names)} {what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("misshapen", misshapen), ("unexpected", extra))
        if names
    ]
    if wrong:
        raise UserError(
            f"{source.where}: not the tensors of {family.model_type}: {'; '.join(wrong)}"
        )
    return Checkpoint(family, config, theirs, source, layouts)


class _Prefixed:
    """A bare base model's tensors under the names they have in the whole model."""

    def __init__(self, inner: Source, prefix: str, expected: dict[str, Any]) -> None:
        self.where, self._inner = inner.where, inner
        self._names = {
            prefix + n if prefix + n in expected or n not in expected else n: n
            for n in inner.shapes()
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self._inner.shapes()
        return {name: shapes[n] for name, n in self._names.items()}

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        return self._inner.read(self._names[name], slices)


def load(checkpoint: Checkpoint) -> Params:
    """Float32 parameters on the mesh that is set. Each device's part of a parameter is read from
    the files by itself: at no time is there a second copy of more than one parameter."""
    devices = jax.sharding.get_mesh()
    params: Params = {}
    for path, one in checkpoint.layouts.items():
        sharding = jax.NamedSharding(devices, one.spec)
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        read = functools.partial(one.read, read=checkpoint.source.read)
        node[path[-1]] = jax.make_array_from_callback(one.shape, sharding, read)
    return params
