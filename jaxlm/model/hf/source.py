"""A checkpoint's tensors, read slice by slice from safetensors files. Nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxlm.files import first_line
from jaxlm.schema import UserError

INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")


class Source(Protocol):
    """Named tensors of a checkpoint."""

    where: str  # for error messages

    def shapes(self) -> dict[str, tuple[Any, ...]]:
        """Name → shape of every tensor; of one that does not hold floats, its type instead."""

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """A slice of one tensor, of any floating type. Raises UserError."""


class Safetensors:
    """The safetensors files of a folder, one or several with an index.

    All headers are checked when it is opened. Raises UserError for a folder without any, for a
    file that is damaged (truncated, oversized or overlapping parts, repeated names), and for an
    index that disagrees with the files.
    """

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[Any, ...]] = {}
        self._open: dict[Path, Any] = {}
        stated = _indexed(folder)
        for path in _files(folder, stated):
            for name, shape in _header(path).items():
                if name in self._files:
                    other = self._files[name].name
                    raise UserError(f"{path}: tensor {name!r} is in {other} too")
                self._files[name], self._shapes[name] = path, shape
        for name, file in stated.items():
            if self._files.get(name) != folder / file:
                raise UserError(f"{folder / INDEX}: says that {name!r} is in {file}; it is not")

    def shapes(self) -> dict[str, tuple[Any, ...]]:
        return self._shapes

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        path = self._files[name]
        with _told(path):
            if path not in self._open:
                self._open[path] = _safe_open(path)
            return self._open[path].get_slice(name)[slices]


def _indexed(folder: Path) -> dict[str, str]:
    """Tensor → file, as the index of a sharded checkpoint says; {} without one."""
    path = folder / INDEX
    if not path.exists():
        return {}
    stated = read_object(path).get("weight_map")
    if not isinstance(stated, dict) or not stated:
        raise UserError(f"{path}: no weight_map in it")
    for file in stated.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{path}: expected names of files beside it, got {file!r}")
    return stated


def _files(folder: Path, stated: dict[str, str]) -> list[Path]:
    if stated:
        return [folder / name for name in sorted(set(stated.values()))]
    found = sorted(folder.glob("*.safetensors"))
    whole = folder / "model.safetensors"
    if whole in found:
        return [whole]
    if len(found) == 1:
        return found
    if found:
        raise UserError(f"{folder}: {len(found)} .safetensors files and no {INDEX}")
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLES]
    if pickles:
        raise UserError(
            f"{folder}: {pickles[0]} can run code when it is opened and is not read; expected"
            " .safetensors (convert it where you trust it)"
        )
    raise UserError(f"{folder}: no .safetensors file in it")


def _header(path: Path) -> dict[str, tuple[Any, ...]]:
    """Name → shape. The library checks sizes, offsets and types; what it lets pass is told here."""
    shapes = {}
    with _told(path):
        file = _safe_open(path)
        for name in file.keys():  # noqa: SIM118 (not a dict)
            part = file.get_slice(name)
            kind = part.get_dtype()
            shapes[name] = tuple(part.get_shape()) if kind in FLOATS else (kind,)
        with open(path, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            json.loads(f.read(length), object_pairs_hook=_unrepeated)
    return shapes


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("the header names a tensor twice")
    return made


def _safe_open(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(str(path), "np")


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the library raises, as one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path}: no readable safetensors file: {first_line(e)}") from e


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that someone else wrote. Raises UserError."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read: {first_line(e)}") from e
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found
