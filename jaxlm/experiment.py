"""Experiments: loading one, what it refers to, and its fingerprint.

An experiment is a Python file with `get_config() -> Config` or `get_sweep() -> Sweep`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from jaxlm import pyfile
from jaxlm.config import Config, Sweep, validate
from jaxlm.pyfile import is_reference
from jaxlm.schema import UserError, checked, override, to_dict

# ------------------------------------------------------------------------ experiment files


def load(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Config | Sweep:
    """The Config or Sweep of an experiment file, with `(dotted field, text)` overrides applied.

    What it refers to as 'file.py:name' is `located` beside the experiment file first.
    """
    module = pyfile.load(Path(path), "--config")
    make = getattr(module, "get_sweep", None) or getattr(module, "get_config", None)
    if make is None:
        raise UserError(f"--config: {path} defines neither get_config() nor get_sweep()")
    with pyfile.told_by_line(module, "--config"):
        experiment = make()
    if not isinstance(experiment, (Config, Sweep)):
        raise UserError(f"--config: {path} returned {type(experiment).__name__}, not a Config")
    for dotted, text in overrides:
        experiment = override(experiment, dotted, text)
    return located(experiment, Path(path).parent)


def located(experiment: Config | Sweep, folder: str | Path = ".") -> Any:
    """`experiment`, valid, with absolute files in its references: they then hold in every process
    and working directory.

    A relative one is looked for in `folder` (the experiment file's), then in the working directory.
    Raises UserError where it is in neither.
    """
    if isinstance(experiment, Sweep):
        sweep = checked(experiment, "config")
        for name in ("holdout_flops", "workers", "bootstrap", "horizon.tokens"):
            if (value := attrgetter(name)(sweep)) < 0:
                raise UserError(f"config.{name}: expected at least 0, got {value:g}")
        base = _located(validate(sweep.base, "config.base"), Path(folder), "config.base")
        return dataclasses.replace(sweep, base=base)
    return _located(validate(experiment), Path(folder), "config")


def _located(config: Config, folder: Path, where: str) -> Config:
    def find(target: str) -> str:
        places = dict.fromkeys([Path(folder, target).resolve(), Path(target).resolve()])
        for place in places:
            if place.is_file():
                return str(place)
        field = next(k for k, v in references(config).items() if v.startswith(f"{target}:"))
        raise UserError(f"{where}.{field}: no such file: {' or '.join(map(str, places))}")

    return with_files(config, find)


# ------------------------------------------------------------------------- references and identity


def references(config: Config) -> dict[str, str]:
    """Field → 'file.py:name' for what a run brings from outside the package."""
    found = {
        "model.layer": config.model.layer,
        "optimizer.name": config.optimizer.name,
        "optimizer.schedule": config.optimizer.schedule,
        "train.objective": config.train.objective,
        **{f"data.sources[{i}]": s for i, s in enumerate(config.data.sources)},
        **{f"tune.examples[{i}]": s for i, s in enumerate(config.tune.examples)},
    }
    return {k: v for k, v in found.items() if is_reference(v)}


def with_files(config: Config, change: Callable[[str], str]) -> Config:
    """`config` with `change(file)` for each 'file.py' of its references."""

    def new(text: str) -> str:
        target, _, name = text.rpartition(":")
        is_file = is_reference(text) and target.endswith(".py")
        return f"{change(target)}:{name}" if is_file else text

    m, d, o, t = config.model, config.data, config.optimizer, config.train
    tuned = dataclasses.replace(config.tune, examples=tuple(map(new, config.tune.examples)))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(m, layer=new(m.layer)),
        data=dataclasses.replace(d, sources=tuple(new(s) for s in d.sources)),
        optimizer=dataclasses.replace(o, name=new(o.name), schedule=new(o.schedule)),
        train=dataclasses.replace(t, objective=new(t.objective)),
        tune=tuned,
    )


# What is watched, where things lie and how the work is spread over devices does not change what is
# computed, but for the last bits of sums: a run goes on on another mesh.
_NOT_IDENTITY = {
    "": ("name", "mesh"),
    "model": ("remat", "scan_layers", "pipeline_repeats", "pipeline_microbatches"),
    "data": ("dir", "licence", "file_urls", "engine", "workers"),
    "optimizer": ("offload",),
    "train": (
        "log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "probes",
        "sample_prompts", "sample_tokens", "tasks", "task_items", "track", "profile", "xla_preset",
    ),
    "tune": ("start", "examples"),  # what they hold is: `Run.data_fingerprint`
}  # fmt: skip


def identity(values: dict[str, Any]) -> dict[str, Any]:
    """Of a config's plain values (`to_dict`), those that decide what is computed."""
    left_out = dict(_NOT_IDENTITY)
    if values["model"].get("dropout"):  # which a pipeline draws for each micro-batch
        left_out["model"] = tuple(n for n in left_out["model"] if n != "pipeline_microbatches")
    return {
        name: {k: v for k, v in value.items() if k not in left_out.get(name, ())}
        if isinstance(value, dict)
        else value
        for name, value in values.items()
        if name not in left_out[""]
    }


def fingerprint(config: Config) -> str:
    """16 hex digits that two configs share exactly when they describe the same computation.

    The text of every file that the config refers to is part of it; where the file lies is not.
    """
    values = identity(to_dict(with_files(config, lambda target: Path(target).name)))
    for where, reference in references(config).items():
        target = Path(reference.rpartition(":")[0])
        if target.suffix == ".py" and target.is_file():
            values[f"source of {where}"] = hashlib.sha256(target.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
