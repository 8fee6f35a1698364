"""Parameters of ours as a folder that `transformers` loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.files import cannot_write, fsync_tree
from jaxlm.model.hf.families import FAMILIES
from jaxlm.model.hf.family import Family, flat
from jaxlm.model.hf.layout import Layout
from jaxlm.model.hf.source import INDEX
from jaxlm.model.transformer import Params
from jaxlm.schema import UserError

SHARD_BYTES = 5_000_000_000


def family_of(config: ModelConfig) -> Family:
    """The first family whose checkpoints can say all that `config` computes. Raises UserError."""
    if config.layer:
        raise UserError(f"config.model.layer: {config.layer} is nobody else's, so not exported")
    for family in FAMILIES:
        if family.speaks(config):
            return family
    names = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(f"config.model: no family of transformers computes this; looked at {names}")


def export(
    config: ModelConfig,
    params: Params,
    out: Path,
    *,
    files: dict[str, str] | None = None,
    ids: dict[str, int | None] | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> Family:
    """Writes config.json, generation_config.json and the tensors, in several files with an index
    where they are more than `shard_bytes`. `files` (name → text) go beside them: its tokenizer.
    `ids` are special ids: eos_token_id, ….

    The folder appears whole or not at all. Raises UserError if it is there already, or if no
    family says what `config` computes; JaxlmError if it cannot be written.
    """
    config, params = _standard(config, params)
    family = family_of(config)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out: {out} is not empty")
    part = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    special = {k: v for k, v in (ids or {}).items() if v is not None}
    try:
        part.mkdir(parents=True)
        _write_json(part / "config.json", {**family.config_json(config), **special, "dtype": dtype})
        _write_json(part / "generation_config.json", special)
        for name, text in (files or {}).items():
            (part / name).write_text(text, "utf-8")
        _write_tensors(family, config, params, part, dtype, shard_bytes)
        fsync_tree(part)
        if out.exists():
            out.rmdir()
        os.replace(part, out)
    except OSError as e:
        raise cannot_write(out, e) from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return family


def _standard(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same function without muP's output scale, which goes into the last norm."""
    if config.parametrization == "mup" and config.tie_embeddings:
        scale = config.base_d_model / config.d_model
        params = {**params, "norm": jax.tree.map(lambda x: x * scale, params["norm"])}
    return replace(config, parametrization="standard"), params


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def _write_tensors(
    family: Family, config: ModelConfig, params: Params, folder: Path, dtype: str, most: int
) -> None:
    from safetensors.numpy import save_file

    layouts = family.layouts(config)
    places: dict[str, list[tuple[tuple[str, ...], tuple[int, ...]]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path, one in layouts.items():
        for tensor in one.tensors():
            places.setdefault(tensor.name, []).append((path, tensor.at))
            shapes[tensor.name] = tensor.shape
    width = np.dtype(jax.numpy.dtype(dtype)).itemsize
    groups = list(_groups({n: width * int(np.prod(s)) for n, s in shapes.items()}, most))
    arrays = flat(params)
    index: dict[str, str] = {}
    for i, names in enumerate(groups, 1):
        file = "model.safetensors"
        if len(groups) > 1:
            file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        made = {n: _gathered(layouts, arrays, places[n], shapes[n], dtype) for n in names}
        save_file(made, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    if len(groups) > 1:
        total = sum(width * int(np.prod(s)) for s in shapes.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _groups(sizes: dict[str, int], most: int) -> Iterator[list[str]]:
    """Names in order, as many together as fit into `most` bytes."""
    names: list[str] = []
    held = 0
    for name, n in sizes.items():
        if names and held + n > most:
            yield names
            names, held = [], 0
        names.append(name)
        held += n
    yield names


def _gathered(
    layouts: dict[tuple[str, ...], Layout],
    arrays: dict[tuple[str, ...], jax.Array],
    places: list[tuple[tuple[str, ...], tuple[int, ...]]],
    shape: tuple[int, ...],
    dtype: str,
) -> np.ndarray:
    """One tensor of theirs, from the parameters of ours that lie in it."""
    theirs = np.empty(shape, np.float32)
    for path, at in places:
        one = layouts[path]
        one.write(np.asarray(arrays[path][one.place(at)], np.float32), theirs)
    return theirs.astype(jax.numpy.dtype(dtype))
