"""What a run and a sweep leave on disk, read as plain values for the pages that show them.

A page is also written while a sweep is running or after it failed, so nothing here raises over a
file that is missing, half written or unreadable: it is left empty, and `notices` says so.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxlm.files import read_jsonl
from jaxlm.schema import JaxlmError, UserError

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run's folder; `record` and `config` are empty until the run has written them."""

    name: str
    dir: Path
    role: str = ""
    budget: float | None = None
    config: Json = field(default_factory=dict)
    record: Json = field(default_factory=dict)
    rows: tuple[Json, ...] = ()
    started: float | None = None  # seconds since 1970, of its first sitting
    manifest: Json = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """'finished' or 'diverged' from the record; else 'running' or 'waiting'."""
        return str(self.record.get("status") or ("running" if self.rows else "waiting"))

    def number(self, key: str) -> float | None:
        return number(self.record.get(key))

    def curve(self, y: str, x: str = "flops") -> tuple[list[float], list[float]]:
        """(x, y) of the metric rows that hold both, as two lists in file order."""
        pairs = [(number(row.get(x)), number(row.get(y))) for row in self.rows]
        kept = [(a, b) for a, b in pairs if a is not None and b is not None]
        return [a for a, _ in kept], [b for _, b in kept]


@dataclass(frozen=True)
class SweepFolder:
    """A sweep's folder; each part is empty until it has been written."""

    name: str
    dir: Path
    sweep: Json
    fit: Json
    prediction: Json
    score: Json
    samples: Json
    manifest: Json
    runs: tuple[Run, ...]
    notices: tuple[str, ...]


def number(value: Any) -> float | None:
    """A finite float, or None for everything else (also for bool, NaN and infinities)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def numbers(values: Any, length: int | None = None) -> list[float] | None:
    """A list of finite floats (of `length`), or None."""
    if not isinstance(values, (list, tuple)) or (length is not None and len(values) != length):
        return None
    found = [number(v) for v in values]
    return None if any(v is None for v in found) else [v for v in found if v is not None]


def dicts(value: Any) -> list[Json]:
    """The dicts of a list; [] when it is no list."""
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def part(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def read_json(path: Path, notices: list[str]) -> Json:
    """The object in `path`; {} and, unless it is merely absent, a notice when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        notices.append(f"{path.name} cannot be read: {e}")
        return {}
    if not isinstance(value, dict):
        notices.append(f"{path.name} holds a {type(value).__name__}, not an object")
        return {}
    return value


def read_rows(path: Path, notices: list[str]) -> tuple[Json, ...]:
    """The rows of a .jsonl file; none and a notice when it is damaged."""
    try:
        return tuple(read_jsonl(path))
    except JaxlmError as e:
        notices.append(str(e))
        return ()


def read_run(run_dir: str | Path, name: str = "", role: str = "", budget: Any = None) -> Run:
    """The run in `run_dir`; `name`, `role` and `budget` stand in until there is a record."""
    folder = Path(run_dir)
    notices: list[str] = []
    config = part(read_json(folder / "config.json", notices).get("config"))
    record = read_json(folder / "record.json", notices)
    rows = read_rows(folder / "metrics.jsonl", notices)
    events = read_rows(folder / "events.jsonl", notices)
    shards = str(part(config.get("data")).get("dir") or "")
    # Its own copy, or that of the shards: its own, those it was told to use, the sweep's around it.
    folders = [folder / "data", *([Path(shards)] if shards else []), folder / "../../data"]
    manifests = [folder / "data_manifest.json", *(p / "manifest.json" for p in folders)]
    return Run(
        name=str(name or record.get("name") or config.get("name") or folder.name),
        dir=folder,
        role=str(role or record.get("role") or ""),
        budget=number(record.get("budget")) or number(budget),
        config=config,
        record=record,
        rows=rows,
        started=next((t for e in events if (t := number(e.get("time")))), None),
        manifest=read_json(next((p for p in manifests if p.is_file()), manifests[0]), notices),
        notices=tuple(f"{folder.name}/{n}" for n in notices),
    )


def read_sweep(sweep_dir: str | Path) -> SweepFolder:
    """The sweep in `sweep_dir`. Raises UserError when it is no folder."""
    folder = Path(sweep_dir)
    if not folder.is_dir():
        raise UserError(f"report: expected a sweep's folder, got {str(folder)!r}: no such folder")
    notices: list[str] = []
    parts = {
        name: read_json(folder / f"{name}.json", notices)
        for name in ("sweep", "fit", "prediction", "score", "samples")
    }
    manifest = read_json(folder / "data" / "manifest.json", notices)
    runs = _read_members(folder, parts["sweep"])
    name = part(parts["sweep"].get("sweep")).get("name") or folder.resolve().name
    return SweepFolder(
        name=str(name),
        dir=folder,
        manifest=manifest,
        runs=runs,
        notices=(*notices, *(n for run in runs for n in run.notices)),
        **parts,
    )


def _read_members(folder: Path, sweep: Json) -> tuple[Run, ...]:
    """The planned members in their order, then any other folder below runs/."""
    runs = {}
    for member in dicts(sweep.get("members")):
        name = str(member.get("name", ""))
        if name:
            workdir = _workdir(folder, name, str(member.get("workdir") or ""))
            role = str(member.get("role") or "")
            runs[workdir.resolve()] = read_run(workdir, name, role, member.get("budget"))
    for path in sorted((folder / "runs").glob("*/")):
        if path.resolve() not in runs:
            runs[path.resolve()] = read_run(path)
    return tuple(runs.values())


def _workdir(folder: Path, name: str, workdir: str) -> Path:
    """Where a member lies. A sweep's folder may have been moved since, so runs/NAME comes first."""
    tried = [folder / "runs" / name, folder / workdir, Path(workdir)]
    return next((path for path in tried[: 3 if workdir else 1] if path.is_dir()), tried[0])
