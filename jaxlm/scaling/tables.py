"""Tables of others as rows of text: CSV, TSV and JSONL (also as W&B exports it), and conditions
on their rows."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.schema import UserError, hint

# How tables head the usual quantities, in lower case without blanks and signs.
HEADINGS = {
    "params": ("params", "parameters", "numparams", "modelsize", "n"),
    "tokens": ("tokens", "numtokens", "trainingtokens", "d"),
    "flops": ("flops", "flop", "trainingflop", "trainingflops", "compute", "c"),
    "loss": ("loss", "finalloss", "evalloss"),
    "group": ("group", "budget"),
    "name": ("name", "run"),
    "seed": ("seed",),
}
# Which N is meant → what its column is called in our own records.
COUNTS = {
    "all": "params",
    "non_embedding": "params_non_embedding",
    "effective": "params_effective",
}
_CONDITION = re.compile(r"(.+?)(<=|>=|!=|<|>|=)(.*)")


@dataclass(frozen=True)
class Raw:
    """`rows`: (line in the file, cell by column)."""

    path: Path
    header: list[str]
    rows: list[tuple[int, dict[str, str]]]

    def number(self, line: int, column: str, signed: bool = False) -> float:
        """The finite number in a cell, above 0 unless `signed`. Raises UserError."""
        text = next(cells for at, cells in self.rows if at == line).get(column, "")
        return number(f"{self.path}:{line}", column, text, signed)


def read(path: str | Path, where: Sequence[str] = ()) -> Raw:
    """The rows for which every condition of `where` ('column=value', 'column<1e9', …) holds.
    Raises UserError naming the file and the line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a CSV or a folder of runs") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read as a CSV: {e}") from e
    raw = _jsonl(path, text) if path.suffix == ".jsonl" else _csv(path, text)
    if where:
        kept = [(line, r) for line, r in raw.rows
                if all(holds(path, r, c, "--where") for c in where)]  # fmt: skip
        if not kept:
            raise UserError(f"--where={','.join(where)}: leaves none of the rows of {path}")
        raw = Raw(path, raw.header, kept)
    return raw


def _csv(path: Path, text: str) -> Raw:
    try:
        reader = csv.reader(
            text.splitlines(keepends=True), delimiter="\t" if path.suffix == ".tsv" else ","
        )
        table = [(reader.line_num, row) for row in reader if any(c.strip() for c in row)]
    except csv.Error as e:
        raise UserError(f"{path}: cannot be read as a CSV: {e}") from e
    if len(table) < 2:
        raise UserError(f"{path}: expected a header and at least one row, got {len(table)} lines")
    header = [name.strip() for name in table[0][1]]
    for line, cells in table[1:]:
        if len(cells) != len(header):
            raise UserError(f"{path}:{line}: expected {len(header)} cells, got {len(cells)}")
    return Raw(path, header, [(line, dict(zip(header, c, strict=True))) for line, c in table[1:]])


def _jsonl(path: Path, text: str) -> Raw:
    """One object a line, its nested names joined by dots."""
    rows = []
    for line, one in enumerate(text.splitlines(), 1):
        if one.strip():
            try:
                value = json.loads(one)
            except ValueError as e:
                raise UserError(f"{path}:{line}: not JSON: {e}") from e
            if not isinstance(value, dict):
                raise UserError(f"{path}:{line}: expected an object, got {one[:40]!r}")
            rows.append((line, dict(_flat("", value))))
    if not rows:
        raise UserError(f"{path}: expected at least one row, got none")
    return Raw(path, list(dict.fromkeys(k for _, r in rows for k in r)), rows)


def _flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        parts = [_flat(f"{prefix}.{k}" if prefix else str(k), v) for k, v in value.items()]
        return [pair for part in parts for pair in part]
    return [] if value is None else [(prefix, str(value))]


def number(where: str, column: str, text: str, signed: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (value <= 0 and not signed):
        kind = "a number" if signed else "a number above 0"
        raise UserError(
            f"{where}: column {column!r}: expected {kind}, got {text!r};"
            " --where=COLUMN=VALUE leaves rows out"
        )
    return value


def holds(path: Path, row: dict[str, str], condition: str, flag: str) -> bool:
    """Numbers are compared as numbers where both sides are some. Raises UserError."""
    match = _CONDITION.fullmatch(condition)
    if match is None:
        raise UserError(f"{flag}: expected column=value, column<value, …, got {condition!r}")
    column, sign, text = match[1].strip(), match[2], match[3].strip()
    if column not in row:
        raise UserError(f"{flag}: {path}: no column {column!r}; {hint(column, row)}")
    cell = row[column].strip()
    try:
        at, value = float(cell), float(text)
    except ValueError:
        if sign in ("=", "!="):
            return (cell == text) == (sign == "=")
        raise UserError(f"{flag}: {condition}: {cell!r} and {text!r} are no numbers") from None
    if sign in ("=", "!="):
        return math.isclose(at, value, rel_tol=1e-9) == (sign == "=")
    return {"<": at < value, "<=": at <= value, ">": at > value, ">=": at >= value}[sign]


def recognised(header: Sequence[str], quantities: Sequence[str], taken: Sequence[str],
               count: str = "all") -> dict[str, str]:  # fmt: skip
    """Quantity → column, for those headed as usual and not `taken`. With another `count` than
    "all", `params` is the column of that count."""
    plain = {"".join(ch for ch in h.lower() if ch.isalnum()): h for h in reversed(header)}
    found: dict[str, str] = {}
    for quantity in quantities:
        own = COUNTS[count] if quantity == "params" else quantity
        usual = () if quantity == "params" and count != "all" else HEADINGS.get(quantity, ())
        known = [own] if own in header else [plain[h] for h in usual if h in plain]
        free = [c for c in known if c not in taken and c not in found.values()]
        if free:
            found[quantity] = free[0]
    return found
