"""A data set told to people: what was read, from when, under which licences, in which languages."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from jaxlm.data.shards import Manifest, read_manifest
from jaxlm.files import write_bytes

CARD = "DATA_CARD.md"


def summary(out: Path) -> dict[str, Any]:
    """What the folder of shards holds, for machines (format jaxlm.data_summary/1)."""
    manifest = read_manifest(out)
    n = manifest.train.documents + manifest.eval.documents
    return {
        "format": "jaxlm.data_summary/1",
        "documents": n,
        "bytes": manifest.train.bytes + manifest.eval.bytes,
        "tokens": manifest.train.tokens + manifest.eval.tokens,
        "held_out_documents": manifest.eval.documents,
        "records": manifest.records,
        "dropped": manifest.dropped,
        **terms(manifest),
        "tokenizer": manifest.tokenizer,
        "fingerprint": manifest.fingerprint,
        "clean": _clean(out),
    }


def shares(manifest: Manifest, name: str) -> dict[str, int]:
    """Bytes of text by what a field of the ledger says, the largest first."""
    found: Counter[str] = Counter()
    for origin in manifest.origins:
        found[getattr(origin, name) or "unknown"] += origin.bytes
    return {k: v for k, v in found.most_common() if v}


def dates(manifest: Manifest) -> list[str]:
    """The first and the last date that a document states; [] where none does."""
    stated = [d for o in manifest.origins for d in (o.first_date, o.last_date) if d]
    return [min(stated), max(stated)] if stated else []


def _clean(out: Path) -> dict[str, Any]:
    path = out / "clean.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def terms(manifest: Manifest) -> dict[str, Any]:
    """What a checkpoint says of the data it was trained on."""
    return {
        "sources": list(manifest.request["sources"]),
        "licences": shares(manifest, "text_licence"),
        "package_licences": shares(manifest, "package_licence"),
        "languages": shares(manifest, "language"),
        "dates": dates(manifest),
    }


def write(out: Path) -> Path:
    """Writes DATA_CARD.md beside the manifest; returns its path."""
    write_bytes(out / CARD, text(out).encode())
    return out / CARD


def text(out: Path) -> str:
    """The card of a folder of shards, in Markdown."""
    found, manifest = summary(out), read_manifest(out)
    lines = [
        "# Data card",
        "",
        f"{found['documents']:,} documents, {found['bytes']:,} bytes of text, "
        f"{found['tokens']:,} tokens; {found['held_out_documents']:,} documents are held out. "
        f"Fingerprint `{found['fingerprint']}`.",
        "",
        f"Dates stated by documents: {' … '.join(found['dates']) or 'none'}. "
        f"Tokenizer: {manifest.tokenizer['name']}, {manifest.tokenizer['vocab_size']:,} ids"
        f"{'' if manifest.tokenizer['lossless'] else ', which loses some text'}.",
    ]
    for title, name in (
        ("Licences of the text", "licences"),
        ("Licences of the packages that carried it", "package_licences"),
        ("Languages", "languages"),
    ):
        rows = [f"| {k} | {v:,} | {v / found['bytes']:.1%} |" for k, v in found[name].items()]
        lines += ["", f"## {title}", "", "| | bytes | share |", "|---|---|---|", *rows]
    lines += ["", "## Sources", "", "| source | where it lay | attribution |", "|---|---|---|"]
    by_source = {o.index: o for o in manifest.origins}
    for i, source in enumerate(manifest.request["sources"]):
        said = by_source[i].attribution if i in by_source else ""
        lines.append(f"| {source} | {manifest.locations.get(source, '')} | {said} |")
    lines += ["", "## Left out", ""]
    lines += [f"- {n:,} {reason}" for reason, n in manifest.dropped.items()] or ["Nothing."]
    return "\n".join(lines) + "\n"
