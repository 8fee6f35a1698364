"""Documents to fewer and better documents: repair, filters, masking, near-duplicates, on datatrove.

What happens to one document is a pure function (`Steps.apply`); datatrove carries it over files and
machines, one task per group of files, and finds near-duplicates (MinHash; Broder 1997).
Which task reads what does not depend on the workers, so neither does the outcome.

    .clean/1/RANK.jsonl        what each task kept          .clean/counts/RANK.json   and dropped
    .clean/2/RANK.jsonl        without near-duplicates
    clean.json                 the funnel: what each step kept, and why it dropped the rest
    dropped.jsonl              some of what was dropped, by step and reason
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxlm.config import CleanConfig, DataConfig
from jaxlm.data import contamination, documents, masking, quality
from jaxlm.data.documents import Reading, Tally, Unit
from jaxlm.data.extras import library
from jaxlm.data.language import language
from jaxlm.data.record import Document, Unusable
from jaxlm.data.spool import Progress
from jaxlm.data.suffixes import CODE_LANGUAGES
from jaxlm.files import read_json, write_bytes, write_json
from jaxlm.schema import UserError

MAX_TASKS = 16
SAMPLES = 5  # of what was dropped, for each reason and task
SAMPLE_CHARACTERS = 600
STEPS = ("licence", "repair", "language", "quality", "decontaminate", "mask", "near_duplicates")


@dataclass
class Counts:
    """What the steps of one task, or of all, did: documents and bytes."""

    entered: list[int] = field(default_factory=lambda: [0, 0])
    dropped: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # step → reason → …
    changed: Counter[str] = field(default_factory=Counter)  # repaired texts, masked items
    records: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    listed: list[Any] = field(default_factory=list)

    def drop(self, step: str, reason: str, size: int) -> int:
        """Counts it; returns how many this reason has dropped."""
        cell = self.dropped.setdefault(step, {}).setdefault(reason, [0, 0])
        cell[0], cell[1] = cell[0] + 1, cell[1] + size
        return cell[0]

    def add(self, other: Counts) -> None:
        self.entered = [a + b for a, b in zip(self.entered, other.entered, strict=True)]
        for step, reasons in other.dropped.items():
            for reason, (n, size) in reasons.items():
                cell = self.dropped.setdefault(step, {}).setdefault(reason, [0, 0])
                cell[0], cell[1] = cell[0] + n, cell[1] + size
        self.changed += Counter(other.changed)
        self.unusable += Counter(other.unusable)
        self.records += other.records
        self.listed += other.listed


@dataclass(frozen=True)
class Steps:
    """What the config asks for, for one document at a time."""

    config: CleanConfig
    grams: contamination.Grams

    def apply(self, d: Document, counts: Counts) -> Document | tuple[str, str]:
        """The document as the steps leave it, or (step, reason) where one dropped it."""
        c, code = self.config, d.language in CODE_LANGUAGES
        if fault := _licence_fault(d.text_licence, c):
            return "licence", fault
        if c.repair and not code:
            text = library("ftfy").fix_text(d.text, fix_latin_ligatures=False, uncurl_quotes=False)
            counts.changed["repaired"] += text != d.text
            d = replace(d, text=text)
        if c.language_id and not code:
            d = replace(d, language=language(d.text) or d.language)
        if c.languages and d.language not in c.languages:
            return "language", d.language or "unknown"
        if c.quality and (fault := quality.fault(d.text, d.language)):
            return "quality", fault
        if self.grams.by_length and self.grams.found_in(d.text):
            return "decontaminate", "holds a text of an evaluation set"
        if c.mask:
            text, found = masking.mask(d.text)
            counts.changed.update({f"masked {kind}": n for kind, n in found.items()})
            d = replace(d, text=text)
        return d


def _licence_fault(licence: str, c: CleanConfig) -> str:
    if any(fnmatch.fnmatch(licence, pattern) for pattern in c.refused_licences):
        return f"{licence} is refused"
    if c.licences and not any(fnmatch.fnmatch(licence, pattern) for pattern in c.licences):
        return f"{licence} is not allowed"
    return ""


# ---------------------------------------------------------------------------------------- the tasks


def prepare(
    folder: Path, units: list[Unit], reading: Reading, steps: Steps, rank: int, world: int
) -> Iterator[Document]:
    """Cleans every `world`-th unit from number `rank` on; yields and writes what it keeps."""
    counts, samples, tally = Counts(), [], Tally()
    part = folder / "1" / f"{rank:05d}.part"
    with open(part, "w", encoding="utf-8") as out:
        for unit in units[rank::world]:
            for document in documents.tallied(unit, reading, tally):
                size = len(document.text.encode())
                counts.entered = [counts.entered[0] + 1, counts.entered[1] + size]
                kept = steps.apply(document, counts)
                if isinstance(kept, tuple):
                    if counts.drop(*kept, size) <= SAMPLES:
                        samples.append(_sample(document, *kept))
                    continue
                row = {"index": unit.index, **asdict(kept)}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                yield kept
    counts.records, counts.unusable = tally.records, tally.dropped
    counts.listed = tally.listed
    os.replace(part, part.with_suffix(".jsonl"))
    _write_counts(folder / "counts" / f"{rank:05d}.json", counts, samples)


def drop_near(folder: Path, rank: int) -> None:
    """Of what task `rank` kept, writes all but the near-duplicates that MinHash found."""
    import numpy as np

    def found(kind: str) -> np.ndarray:
        path = folder / "remove" / f"{rank:06d}.{kind}"
        return np.fromfile(path, "<u4") if path.exists() else np.zeros(0, "<u4")

    remove = set(found("remove").tolist())
    cluster = dict(found("clusters").reshape(-1, 2).tolist())
    counts = Counts()
    samples: list[dict[str, Any]] = []
    part = folder / "2" / f"{rank:05d}.part"
    with open(part, "w", encoding="utf-8") as out:
        for i, (line, document) in enumerate(_lines(folder / "1" / f"{rank:05d}.jsonl")):
            if i not in remove:
                out.write(line)
            else:
                counts.drop("near_duplicates", "near-duplicate", len(document.text.encode()))
            if i in cluster and len(samples) < 50:
                reason = "near-duplicate" if i in remove else "kept"
                row = _sample(document, "near_duplicates", reason)
                samples.append({**row, "cluster": cluster[i]})
    os.replace(part, part.with_suffix(".jsonl"))
    _write_counts(folder / "counts" / f"near-{rank:05d}.json", counts, samples)


def _sample(d: Document, step: str, reason: str) -> dict[str, Any]:
    text = d.text[:SAMPLE_CHARACTERS] + "…" * (len(d.text) > SAMPLE_CHARACTERS)
    return {"step": step, "reason": reason, "path": d.path, "language": d.language, "text": text}


def _write_counts(path: Path, counts: Counts, samples: list[dict[str, Any]]) -> None:
    write_json(path, {"format": "jaxlm.counts/1", "counts": vars(counts), "samples": samples})


def _lines(path: Path) -> Iterator[tuple[str, Document]]:
    with open(path, encoding="utf-8", newline="\n") as f:
        for line in f:
            fields = json.loads(line)
            fields.pop("index")
            yield line, Document(**fields)


# ---------------------------------------------------------------------------------------- the whole


def run(data: DataConfig, out: Path, request: dict[str, Any], report: Progress) -> None:
    """Cleans all sources into `out/.clean`, and tells in `out/clean.json` what happened.

    A call that was interrupted goes on with the tasks that are missing. Raises UserError: a library
    is not installed, bad sources, too many unusable records; JaxlmError where workers are killed
    again and again.
    """
    from jaxlm.data import tasks

    c, folder = data.clean, out / ".clean"
    library("datatrove.executor.base")
    for module, wanted in (("ftfy", c.repair), ("lingua", c.language_id)):
        if wanted:
            library(module)
    _open(folder, request)
    reading = Reading(data.licence, data.text_field, data.file_urls)
    units = documents.units(data.sources, reading)
    steps = Steps(c, contamination.grams(_texts(c.evaluation_sets, reading)))
    world = min(len(units), MAX_TASKS)
    tasks.run(data, folder, units, reading, steps, world, report)
    _tell(out, folder, c)


def _open(folder: Path, request: dict[str, Any]) -> None:
    """An empty folder for the tasks, or one that a call for the same request left."""
    asked = folder / "request.json"
    with contextlib.suppress(UserError):
        if read_json(asked, "cleaning")["request"] == request:
            return
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("1", "2", "counts"):
        (folder / name).mkdir(parents=True)
    write_json(asked, {"format": "jaxlm.cleaning/1", "request": request})


def _texts(sources: tuple[str, ...], reading: Reading) -> Iterator[str]:
    for unit in documents.units(sources, reading) if sources else ():
        for document in documents.tallied(unit, reading, Tally()):
            yield document.text


def kept(out: Path, tally: Tally) -> Iterator[tuple[int, Document]]:
    """What is left, in order, each with the index of its source; fills `tally`."""
    counts = _totals(out / ".clean")
    tally.records, tally.dropped = counts.records, counts.unusable
    tally.listed = [Unusable(*row) for row in counts.listed]
    tally.check()
    last = "2" if any((out / ".clean" / "2").iterdir()) else "1"
    for path in sorted((out / ".clean" / last).glob("*.jsonl")):
        for line, document in _lines(path):
            yield json.loads(line)["index"], document
    for step, reasons in counts.dropped.items():
        for reason, (n, _) in reasons.items():
            tally.dropped[f"{step}: {reason}"] += n


def _totals(folder: Path) -> Counts:
    total = Counts()
    for path in sorted((folder / "counts").glob("*.json")):
        total.add(Counts(**read_json(path, "counts")["counts"]))
    return total


def _tell(out: Path, folder: Path, c: CleanConfig) -> None:
    total = _totals(folder)
    left, size = total.entered
    rows: list[dict[str, Any]] = [{"step": "read", "documents": left, "bytes": size}]
    for step in (s for s in STEPS if c.has(s)):
        reasons = total.dropped.get(step, {})
        left -= sum(n for n, _ in reasons.values())
        size -= sum(dropped for _, dropped in reasons.values())
        why = dict(sorted(reasons.items(), key=lambda r: (-r[1][0], r[0])))
        rows.append({"step": step, "documents": left, "bytes": size, "dropped": why})
    changed = {kind: n for kind, n in sorted(total.changed.items()) if n}
    write_json(out / "clean.json", {"format": "jaxlm.clean/1", "steps": rows, "changed": changed})
    samples = _samples(sorted((folder / "counts").glob("*.json")))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in samples]
    write_bytes(out / "dropped.jsonl", "".join(lines).encode())


def _samples(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Some of what was dropped; near-duplicates beside what they are near to."""
    rows = [row for path in paths for row in read_json(path, "counts")["samples"]]
    near = sorted((r for r in rows if "cluster" in r), key=lambda r: (r["cluster"], r["path"]))
    return [{"format": "jaxlm.dropped/1"}, *(r for r in rows if "cluster" not in r), *near[:200]]
