"""One run's directory: identity, rows, checkpoints. The only interface between stages."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jaxlm import hosts
from jaxlm.config import Config
from jaxlm.experiment import fingerprint, identity, references, with_files
from jaxlm.files import append_jsonl, filter_jsonl, read_json, write_bytes, write_json
from jaxlm.schema import JaxlmError, UserError, from_dict, to_dict
from jaxlm.train import record
from jaxlm.train.checkpoint import Checkpoints

FORMAT = "jaxlm.config/1"
_LIBRARIES = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclass
class Run:
    """A config at work in a folder. `role` and `budget` are its part in a sweep.

    Of several processes the lead alone writes rows; all save checkpoints together.
    """

    config: Config
    folder: Path
    data_fingerprint: str
    role: record.Role = "single"
    budget: float = 0.0
    data_card: dict[str, Any] = field(default_factory=dict)  # carried by each checkpoint

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
        if (self.folder / "config.json").exists():
            found = _read(self.folder)
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
            self.folder / "config.json",
            {
                "format": FORMAT,
                "fingerprint": self.fingerprint,
                "data_fingerprint": self.data_fingerprint,
                "config": to_dict(self.config),
                "code": self._keep_code(),
                "versions": {
                    "python": platform.python_version(),
                    **{name: metadata.version(name) for name in _LIBRARIES},
                },
                "devices": [d.device_kind for d in jax.devices()],
            },
        )

    def _keep_code(self) -> dict[str, str]:
        """Copies the files that the config refers to into code/: file → its copy."""
        kept: dict[str, str] = {}
        for reference in references(self.config).values():
            source = reference.rpartition(":")[0]
            if source.endswith(".py") and source not in kept:
                copy = f"code/{Path(source).name}"
                if copy in kept.values():  # of the same name, from another folder
                    copy = f"code/{len(kept)}_{Path(source).name}"
                write_bytes(self.folder / copy, Path(source).read_bytes())
                kept[source] = copy
        return kept

    def event(self, what: str, **values: Any) -> None:
        if not hosts.is_lead():
            return
        row = {"time": time.time(), "event": what, **values}
        append_jsonl(self.folder / "events.jsonl", row)

    def log(self, row: dict[str, Any]) -> None:
        if hosts.is_lead():
            append_jsonl(self.metrics, row)

    def rewind(self, step: int) -> None:
        """Forgets what was logged after the checkpoint of `step` was saved.

        So the file becomes an uninterrupted run's. What was observed at `step` is observed again:
        evaluation comes after saving, so that a failure in it costs no trained step.
        """
        if not hosts.is_lead():
            return
        filter_jsonl(
            self.metrics,
            lambda row: row["step"] < step or (row["step"] == step and "train/loss" in row),
        )


def read_config(folder: Path) -> Config:
    """The config of the run in `folder`; its own code is the copy in the run's `code/`."""
    values = _read(folder)
    config = from_dict(Config, values["config"], str(folder / "config.json"))
    copies = {source: folder.resolve() / copy for source, copy in values.get("code", {}).items()}
    return with_files(config, lambda source: str(copies.get(source, source)))


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    values = read_json(path, "config")
    for name in ("fingerprint", "data_fingerprint", "config"):
        if name not in values:
            raise JaxlmError(f"{path}: damaged, no field {name!r}")
    return values


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
