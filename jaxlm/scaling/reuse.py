"""Runs that are there already: the same fingerprint on the same data is the same run."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from jaxlm.experiment import fingerprint
from jaxlm.scaling.ladder import Member
from jaxlm.schema import UserError
from jaxlm.train import record
from jaxlm.train.record import RunRecord


def copy(
    folders: Sequence[str], folder: Path, planned: Sequence[Member], data_fingerprint: str
) -> list[str]:
    """Copies into runs/NAME every member that one of `folders` holds finished; gives their names.

    The record takes the member's name, role and budget; weights, rows and samples are those of the
    run. Raises UserError for a folder that is not there.
    """
    there: dict[tuple[str, str], tuple[Path, RunRecord]] = {}
    for place in folders:
        if not Path(place).is_dir():
            raise UserError(f"config.reuse: no such folder: {place}")
        for path in sorted(Path(place).glob("**/record.json")):
            row = record.read(path.parent)
            if row is not None and row.status == "finished":
                there.setdefault((row.fingerprint, row.data_fingerprint), (path.parent, row))
    copied = []
    for member in planned:
        run = folder / "runs" / member.name
        found = there.get((fingerprint(member.config), data_fingerprint))
        if found is None or run.exists() or found[0].resolve() == run.resolve():
            continue
        part = run.with_name(f"{run.name}.tmp")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(found[0], part, ignore=shutil.ignore_patterns(".lock", "*.tmp"))
        row = dataclasses.replace(found[1], name=member.name, role=member.role,
                                  budget=member.budget or found[1].budget)  # fmt: skip
        record.write(part, row)
        part.rename(run)
        copied.append(member.name)
    return copied
