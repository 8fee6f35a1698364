"""One run's directory: identity, rows, checkpoints. The only interface between stages."""

from __future__ import annotations

import json
import platform
import shutil
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jaxlm.config import Config, fingerprint, identity, references
from jaxlm.files import append_jsonl, filter_jsonl, read_json, write_json
from jaxlm.schema import UserError, from_dict, to_dict
from jaxlm.train import record
from jaxlm.train.checkpoint import Checkpoints

FORMAT = "jaxlm.config/1"
_LIBRARIES = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclass
class Run:
    """A config at work in a folder. `role` and `budget` are its part in a sweep."""

    config: Config
    folder: Path
    data_fingerprint: str
    role: record.Role = "single"
    budget: float = 0.0

    def __post_init__(self) -> None:
        self.fingerprint = fingerprint(self.config)
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", keep=self.config.train.keep_checkpoints
        )

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def record(self) -> record.RunRecord | None:
        """The finished row of exactly this computation, if it is there."""
        found = record.read(self.folder)
        return found if found is not None and found.fingerprint == self.fingerprint else None

    def claim(self) -> None:
        """Makes the folder this run's. Raises UserError if it is another's, or saw other data."""
        path = self.folder / "config.json"
        if path.exists():
            found = read_json(path, "config")
            if found["fingerprint"] != self.fingerprint:
                mine = identity(to_dict(self.config))
                what = _difference(identity(found["config"]), mine)
                raise UserError(
                    f"--workdir: {self.folder} holds another run ({what}); choose another"
                )
            if found["data_fingerprint"] != self.data_fingerprint:
                raise UserError(
                    f"--workdir: {self.folder} saw data {found['data_fingerprint']}, the shards"
                    f" hold {self.data_fingerprint}; restore them or choose another"
                )
            return
        write_json(
            path,
            {
                "format": FORMAT,
                "fingerprint": self.fingerprint,
                "data_fingerprint": self.data_fingerprint,
                "config": to_dict(self.config),
                "versions": {
                    "python": platform.python_version(),
                    **{name: metadata.version(name) for name in _LIBRARIES},
                },
                "devices": [d.device_kind for d in jax.devices()],
            },
        )
        for reference in references(self.config).values():
            source = Path(reference.rpartition(":")[0])
            if source.is_file():  # what a run did can be told from its directory
                (self.folder / "code").mkdir(exist_ok=True)
                shutil.copy2(source, self.folder / "code" / source.name)

    def event(self, what: str, **values: Any) -> None:
        row = {"time": time.time(), "event": what, **values}
        append_jsonl(self.folder / "events.jsonl", row)

    def log(self, row: dict[str, Any]) -> None:
        append_jsonl(self.metrics, row)

    def rewind(self, step: int) -> None:
        """Forgets what was logged after the checkpoint of `step` was saved.

        So the file becomes an uninterrupted run's. What was observed at `step` is observed again:
        evaluation comes after saving, so that a failure in it costs no trained step.
        """
        filter_jsonl(
            self.metrics,
            lambda row: row["step"] < step or (row["step"] == step and "train/loss" in row),
        )


def read_config(folder: Path) -> Config:
    """The config of the run in `folder`. Own code is taken from the run's `code/`."""
    values = read_json(folder / "config.json", "config")
    config = from_dict(Config, values["config"])
    text = json.dumps(to_dict(config))
    for reference in references(config).values():
        target = reference.rpartition(":")[0]
        kept = folder / "code" / Path(target).name
        if kept.is_file():
            text = text.replace(json.dumps(target)[1:-1] + ":", json.dumps(str(kept))[1:-1] + ":")
    return from_dict(Config, json.loads(text))


def _difference(old: dict[str, Any], new: dict[str, Any], where: str = "") -> str:
    """The first field in which two config trees differ, in words."""
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = _difference(a, b, f"{where}{name}.")
            if inner:
                return inner
        elif a != b:
            return f"{where}{name} was {a!r}, is {b!r}"
    return "" if where else "its own code changed"
