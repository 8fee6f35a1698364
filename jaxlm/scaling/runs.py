"""The table that fits read: one row per run, from any CSV or from a folder of runs.

N (`params`), D (`tokens`, seen in training), C (`flops`, of training) and the loss in nats per
token. Where a table gives only two of N, D and C, the third follows from C = 6ND, and the table's
`warnings` say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxlm.files import read_json
from jaxlm.scaling import tables
from jaxlm.schema import UserError, hint

Convention = Literal["all", "non_embedding", "effective"]
Flops = Literal["exact", "6nd"]

FIELDS = ("params", "tokens", "flops", "loss", "group", "name", "seed")
FEW_STEPS = 1000  # below it a small run is still in the steep start of its loss curve


@dataclass(frozen=True)
class Points:
    """Runs, one per row; what was left out and why; what the reader must know.

    `params`, `tokens`, `flops`, `loss`: float64 [n], finite and above 0. `group`: str [n], the
    compute budget that a row belongs to, or None where budgets are to be found from `flops`.
    `name`: n names for messages. `seed`: float64 [n] or None. `convention`: how N was counted.
    Raises UserError where lengths differ or a value is not finite and above 0.
    """

    params: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    group: np.ndarray | None = None
    name: tuple[str, ...] = ()
    seed: np.ndarray | None = None
    convention: str = "as given"
    dropped: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.loss)
        for key in ("params", "tokens", "flops", "loss"):
            values = np.asarray(getattr(self, key), np.float64)
            object.__setattr__(self, key, values)
            if values.shape != (n,):
                raise UserError(f"points.{key}: expected {n} values like loss, got {values.shape}")
            bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
            if len(bad):
                raise UserError(
                    f"points.{key}[{bad[0]}]: expected a number above 0, got {values[bad[0]]}"
                )
        for key in ("group", "name", "seed"):
            given = getattr(self, key)
            if given is not None and len(given) not in (n, 0 if key == "name" else n):
                raise UserError(f"points.{key}: expected {n} values like loss, got {len(given)}")
        if not self.name:
            object.__setattr__(self, "name", tuple(f"point {i}" for i in range(n)))

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def flops_per_param_token(self) -> float:
        """C / (N D), geometric mean: 6 where C = 6ND."""
        return float(np.exp(np.mean(np.log(self.flops / self.params / self.tokens))))

    def drop(self, rows: Sequence[int] | np.ndarray, reason: str) -> Points:
        """Without these rows, which join `dropped`."""
        gone = [
            {"name": self.name[i], "index": int(i), "loss": float(self.loss[i]), "reason": reason}
            for i in rows
        ]
        keep = np.setdiff1d(np.arange(len(self)), rows)
        columns = {k: getattr(self, k)[keep] for k in ("params", "tokens", "flops", "loss")}
        return dataclasses.replace(
            self,
            **columns,
            group=None if self.group is None else self.group[keep],
            seed=None if self.seed is None else self.seed[keep],
            name=tuple(self.name[i] for i in keep),
            dropped=(*self.dropped, *gone),
        )


class Curve(NamedTuple):
    """A training curve: loss after so many FLOPs. `name`: the run's, as in `Points.name`."""

    params: float
    flops: Sequence[float]
    loss: Sequence[float]
    name: str = ""


# -------------------------------------------------------------------------------------------- CSV


def from_csv(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    where: Sequence[str] = (),
    count: Convention = "all",
    flops: Flops = "exact",
) -> Points:
    """The rows of a CSV, TSV (with a header) or JSONL.

    `columns` names the column of a quantity, as in {"params": "Model Size", "flops": "Training
    FLOP", "loss": "loss"} (quantities: `FIELDS`); the others are recognised by usual headings.
    `where`: conditions on the rows, 'column=value' or 'column<1e9'. `count` other than "all" takes
    N from that count's own column (`tables.COUNTS`); `flops` "6nd" puts 6ND in place of C.
    Raises UserError naming the file, the column, the line and the nearest column.
    """
    known_count(count, flops)
    raw = tables.read(path, where)
    named = dict(columns or {})
    found = _find_columns(raw, named, count)
    values: dict[str, Any] = {}
    for key, column in found.items():
        if key in ("group", "name"):
            values[key] = [cells[column] for _, cells in raw.rows]
        else:
            values[key] = np.array(
                [raw.number(line, column, signed=key == "seed") for line, _ in raw.rows]
            )
    warnings = [f"read column {c!r} as {k}" for k, c in found.items() if k not in named and k != c]
    if flops == "6nd" and "tokens" in values and "params" in values:
        values["flops"] = 6 * values["params"] * values["tokens"]
    warnings += complete(values)
    return Points(
        **{k: values[k] for k in ("params", "tokens", "flops", "loss")},
        group=np.array(values["group"], str) if "group" in values else None,
        name=tuple(values.get("name", [f"line {line}" for line, _ in raw.rows])),
        seed=values.get("seed"),
        convention="as given" if count == "all" else count,
        warnings=tuple(warnings),
    )


def known_count(count: str, flops: str) -> None:
    if count not in tables.COUNTS:
        raise UserError(f"convention: {count!r}; {hint(count, tables.COUNTS)}")
    if flops not in ("exact", "6nd"):
        raise UserError(f"flops: {flops!r}; {hint(flops, ('exact', '6nd'))}")


def _find_columns(raw: tables.Raw, named: dict[str, str], count: str) -> dict[str, str]:
    """Quantity → column; those not named are recognised by their heading."""
    for key, column in named.items():
        if key not in FIELDS:
            raise UserError(f"--columns: no such quantity: {key!r}; {hint(key, FIELDS)}")
        if column not in raw.header:
            raise UserError(
                f"{raw.path}: no column {column!r} (for {key}); {hint(column, raw.header)}"
            )
    rest = [key for key in FIELDS if key not in named]
    found = named | tables.recognised(raw.header, rest, list(named.values()), count)
    if "loss" not in found:
        raise UserError(
            f"{raw.path}: no column for loss; name one of {', '.join(raw.header)} as loss=…"
        )
    sizes = [k for k in ("params", "tokens", "flops") if k in found]
    if len(sizes) < 2:
        raise UserError(
            f"{raw.path}: expected columns for two of params, tokens, flops,"
            f" got {' and '.join(sizes) or 'none'} of the columns {', '.join(raw.header)}"
        )
    return found


def complete(values: dict[str, np.ndarray]) -> list[str]:
    """Adds the one of N, D, C that is not there, by C = 6ND; gives what is to be said."""
    for gone, (one, two), formula, said in (
        ("tokens", ("flops", "params"), lambda c, n: c / (6 * n), "no tokens given: D = C/(6N)"),
        ("flops", ("params", "tokens"), lambda n, d: 6 * n * d, "no FLOPs given: C = 6ND"),
        (
            "params",
            ("flops", "tokens"),
            lambda c, d: c / (6 * d),
            "no parameters given: N = C/(6D)",
        ),
    ):
        if gone not in values and one in values and two in values:
            values[gone] = formula(values[one], values[two])
            return [f"{said} assumed"]
    return []


# ------------------------------------------------------------------------------------ a run folder


def from_folder(
    folder: str | Path, convention: Convention = "effective", flops: Flops = "exact"
) -> Points:
    """Every `record.json` below `folder`.

    Held-out runs are never fitted; they, runs that did not finish and copies of a run are listed
    in `dropped`. Replicates enter like any run. `convention` says which N is meant: "effective"
    (training FLOPs per token / 6, so that C = 6ND holds exactly), "all" or "non_embedding";
    `flops` "6nd" puts 6ND with that N in place of the counted C.
    Raises UserError where there is no record to fit, JaxlmError where one is damaged.
    """
    known_count(convention, flops)
    paths = sorted(Path(folder).glob("**/record.json"))
    if not paths:
        raise UserError(f"{folder}: no run (record.json) in or below it")
    rows, dropped, count = [], [], tables.COUNTS[convention]
    seen: dict[str, str] = {}  # fingerprint → name
    for path in paths:
        row = _record(path, count)
        reason = _reason_to_drop(row, seen)
        if reason:
            dropped.append({"name": row["name"], "loss": row["loss"], "reason": reason})
        else:
            seen[row["fingerprint"]] = row["name"]
            rows.append(row)
    if not rows:
        raise UserError(
            f"{folder}: none of its {len(paths)} runs can be fitted;"
            f" {dropped[0]['name']}: {dropped[0]['reason']}"
        )
    columns = {k: np.array([row[k] for row in rows], np.float64) for k in ("tokens", "flops")}
    if flops == "6nd":
        columns["flops"] = 6 * np.array([row[count] for row in rows], float) * columns["tokens"]
    ladder = all(row["role"] != "single" and row["budget"] for row in rows)
    return Points(
        **columns,
        params=np.array([row[count] for row in rows], np.float64),
        loss=np.array([row["loss"] for row in rows], np.float64),
        group=np.array([f"{row['budget']:g}" for row in rows]) if ladder else None,
        name=tuple(row["name"] for row in rows),
        seed=np.array([row["seed"] for row in rows], np.float64),
        convention=convention,
        dropped=tuple(dropped),
        warnings=tuple(_short_runs(rows)),
    )


def _record(path: Path, count: str) -> dict[str, Any]:
    """A run's row with the fields that a fit needs, checked. Raises UserError, JaxlmError."""
    row = read_json(path, "record")
    for key in ("name", "fingerprint", "role", "status", "loss", "seed", "budget"):
        if key not in row:
            raise UserError(f"{path}: no field {key!r}; {hint(key, row)}")
    fitted = row["status"] == "finished" and row["role"] != "holdout"
    for key in (count, "tokens", "flops", "loss") if fitted else ():
        value = row.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise UserError(f"{path}: {key}: expected a number above 0, got {value!r}")
    return row


def _reason_to_drop(row: dict[str, Any], seen: dict[str, str]) -> str | None:
    if row["role"] == "holdout":
        return "held out: never fitted"
    if row["status"] != "finished":
        return f"not finished ({row['status']})"
    if row["fingerprint"] in seen:
        return f"the same run as {seen[row['fingerprint']]}"
    return None


def _short_runs(rows: list[dict[str, Any]]) -> list[str]:
    short = [row["name"] for row in rows if row.get("steps", FEW_STEPS) < FEW_STEPS]
    if not short:
        return []
    return [
        f"{len(short)} of {len(rows)} runs took fewer than {FEW_STEPS} steps (first: {short[0]});"
        " loss still falls steeply there and the laws may not hold beyond"
    ]
