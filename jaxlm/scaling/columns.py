"""The table that a law of `forms` reads: whatever quantities its formula names, from a CSV, TSV,
JSONL or a folder of runs. Rows may be held out: they are predicted and never fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.files import read_json
from jaxlm.scaling import runs, tables
from jaxlm.scaling.forms import Form
from jaxlm.schema import UserError, hint

_MOST_GROUPS = 12


@dataclass(frozen=True)
class Columns:
    """`values`: quantity → float64 [n], above 0. `group`: the budget of each row, str [n].
    `held`: which rows are held out, bool [n]. `convention`: how N and C were counted."""

    values: dict[str, np.ndarray]
    group: np.ndarray
    name: tuple[str, ...]
    held: np.ndarray
    convention: str
    dropped: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()

    def drop(self, rows: np.ndarray, reason: str) -> Columns:
        """Without these rows, which join `dropped`."""
        keep = np.setdiff1d(np.arange(len(self.name)), rows)
        gone = [{"name": self.name[i], "reason": reason} for i in rows]
        return dataclasses.replace(
            self,
            values={k: v[keep] for k, v in self.values.items()},
            group=self.group[keep],
            name=tuple(self.name[i] for i in keep),
            held=self.held[keep],
            dropped=(*self.dropped, *gone),
        )


def read(
    source: str | Path,
    form: Form,
    columns: Mapping[str, str] | None = None,
    where: Sequence[str] = (),
    holdout: Sequence[str] = (),
    count: runs.Convention = "all",
    flops: runs.Flops = "exact",
) -> Columns:
    """The rows that `form` needs.

    `columns` maps a quantity to the table's own column; `where` keeps the rows, and `holdout` holds
    out those, for which all its conditions hold ('dataset=c4', 'params>1e9', on the table's own
    columns). `count`, `flops`: see `runs.from_csv`. Raises UserError.
    """
    runs.known_count(count, flops)
    raw, dropped = (
        _folder(Path(source), where) if Path(source).is_dir() else (tables.read(source, where), [])
    )
    found = _find(raw, form, dict(columns or {}), count)
    values = {
        q: np.array([raw.number(line, c) for line, _ in raw.rows])
        for q, c in found.items()
        if q not in ("group", "name")
    }
    warnings = [f"read column {c!r} as {q}" for q, c in found.items() if q not in (columns or {})
                and q != c and c != tables.COUNTS[count]]  # fmt: skip
    if flops == "6nd" and {"params", "tokens"} <= values.keys():
        values["flops"] = 6 * values["params"] * values["tokens"]
    warnings += runs.complete(values)
    for quantity in (*form.columns, form.target):
        if quantity not in values:
            raise UserError(
                f"{raw.path}: the law {form.name} needs {quantity}; name its column as"
                f" --columns={quantity}=…; columns: {', '.join(raw.header)}"
            )
    cells = [row for _, row in raw.rows]
    group = [row[found["group"]] for row in cells] if "group" in found else _groups(values, form)
    return Columns(
        values,
        np.array(group, str),
        tuple(row.get(found.get("name", ""), f"line {line}") for line, row in raw.rows),
        np.array([_held(raw.path, row, holdout) for row in cells], bool),
        f"N {count}" + (", C = 6ND" if flops == "6nd" else ""),
        tuple(dropped),
        tuple(warnings),
    )


def _held(path: Path, row: dict[str, str], conditions: Sequence[str]) -> bool:
    if row.get("role") == "holdout":
        return True
    return bool(conditions) and all(tables.holds(path, row, c, "--holdout") for c in conditions)


def _folder(folder: Path, where: Sequence[str]) -> tuple[tables.Raw, list[dict[str, Any]]]:
    """Every record.json below, as rows of text; unfinished runs and copies are dropped."""
    paths = sorted(folder.glob("**/record.json"))
    if not paths:
        raise UserError(f"{folder}: no run (record.json) in or below it")
    rows, dropped = [], []
    seen: set[str] = set()
    for line, path in enumerate(paths, 1):
        record = read_json(path, "record")
        if record["status"] != "finished" or record["fingerprint"] in seen:
            why = record["status"] if record["status"] != "finished" else "a copy of another run"
            dropped.append({"name": record["name"], "reason": why})
            continue
        seen.add(record["fingerprint"])
        row = {k: str(v) for k, v in record.items() if v is not None}
        row["batch_tokens"] = str(record["global_batch_size"] * record["seq_len"])
        row["group"] = f"{record['budget']:g}"
        if (unique := _unique_tokens(path.parent)) is not None:
            row["unique_tokens"] = str(min(unique, record["tokens"]))
        if all(tables.holds(path, row, c, "--where") for c in where):
            rows.append((line, row))
    if not rows:
        raise UserError(f"{folder}: none of its {len(paths)} runs can be fitted")
    return tables.Raw(folder, list(rows[0][1]), rows), dropped


def _unique_tokens(run: Path) -> int | None:
    """Tokens of the text that a run could see, where its folder tells."""
    config, manifest = run / "config.json", run / "data_manifest.json"
    if config.exists():
        part: int | None = read_json(config, "config")["config"]["data"].get("unique_tokens")
        if part is not None:
            return part
    return int(read_json(manifest, "data")["train"]["tokens"]) if manifest.exists() else None


def _find(
    raw: tables.Raw, form: Form, named: dict[str, str], count: runs.Convention
) -> dict[str, str]:
    """Quantity → column, for what the form needs and what groups and names its rows."""
    wanted = list(dict.fromkeys((*form.columns, form.target, "params", "tokens", "flops")))
    for quantity, column in named.items():
        if quantity not in (*wanted, "group", "name"):
            raise UserError(
                f"--columns: {form.name} reads no {quantity!r}; {hint(quantity, wanted)}"
            )
        if column not in raw.header:
            raise UserError(
                f"{raw.path}: no column {column!r} (for {quantity}); {hint(column, raw.header)}"
            )
    rest = [q for q in (*wanted, "group", "name") if q not in named]
    return named | tables.recognised(raw.header, rest, list(named.values()), count)


def _groups(values: Mapping[str, np.ndarray], form: Form) -> list[str]:
    """Budgets within 10 % of compute (of the form's first column where there is no compute); where
    there are too many, neighbours are put together."""
    x = np.log(values.get("flops", values[form.columns[0]]))
    order = np.argsort(x, kind="stable")
    number = np.concatenate([[0], np.cumsum(np.diff(x[order]) > np.log(1.1))])
    if number[-1] >= _MOST_GROUPS:
        number = np.arange(len(x)) * _MOST_GROUPS // len(x)
    labels = np.empty(len(x), int)
    labels[order] = number
    return [f"{np.exp(x[labels == g].mean()):.4g}" for g in labels]
