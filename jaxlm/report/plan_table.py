"""A plan as tables and lines in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

Json = dict[str, Any]


def table(plan: Json) -> Group:
    """What a search tried, one row per step, and the collectives of a lone step."""
    steps, parts = plan["steps"], []
    if "search" in plan:
        head = ("mesh", "remat", "micro-batches", "reckoned GiB", "compiled GiB", "MFU at most")
        parts.append(_table(head, [_tried(row) for row in plan["search"]]))
    if steps:
        told = ("step", "parameters", "mesh", "fits", "GiB of limit", "bound by", "MFU at most")
        parts.append(_table((*told, "hours", "USD"), [_step(s) for s in steps]))
    if len(steps) == 1 and steps[0]["collectives"]:
        parts.append(
            _table(
                ("collective", "mesh axes", "a step", "MB a step and device"),
                [
                    (c["kind"], " + ".join(c["axes"]), f"{c['count']:,.0f}",
                     f"{c['bytes'] / 1e6:,.2f}")
                    for c in steps[0]["collectives"]
                ],
            )
        )  # fmt: skip
    return Group(*parts)


def lines(plan: Json) -> list[str]:
    """What does not fit and what to change; warnings; wall time; tokens against what there are."""
    found = [f"{s['runs'][0]}: {x}" for s in plan["steps"] for x in (s["refused"], *s["advice"])
             if x]  # fmt: skip
    found += [
        f"{s['runs'][0]}: {m['host']:.2f} GiB of each device's optimizer state lie in its host's"
        " memory; what moving them there and back takes is in no bound"
        for s in plan["steps"]
        if (m := s["memory_gib"]) and m["host"]
    ]
    found += [f"lint: {warning}" for warning in plan.get("warnings", ())]
    if "wall" in plan:
        w = plan["wall"]
        held = f", the held-out run {w['holdout_s']:,.0f} s" if w["holdout_s"] else ""
        found.append(f"about {w['seconds']:,.0f} s here with {w['workers']} workers: the ladder"
                     f" {w['ladder_s']:,.0f} s{held}")  # fmt: skip
    if prices := plan.get("stated", {}).get("prices"):
        found.append(f"USD: {plan['stated']['price_per_chip_hour']:g} per chip and hour,"
                     f" {prices['source']}, {prices['date']}")  # fmt: skip
    if plan["epochs"] is not None:
        found.append(f"{plan['tokens']:,} tokens; the longest run sees the {plan['train_tokens']:,}"
                     f" there are {plan['epochs']:.2f} times")  # fmt: skip
    return found


def mesh(shape: dict[str, int]) -> str:
    return " × ".join(f"{axis} {n}" for axis, n in shape.items() if n > 1) or "1"


def _tried(row: Json) -> tuple[str, ...]:
    return (
        mesh(row["mesh"]),
        row["remat"],
        str(row["accumulation_steps"]),
        f"{row['reckoned_gib']:.2f}",
        f"{row['peak_gib']:.2f}" if row["fits"] else "too much",
        f"{row['mfu_bound']:.0%}",
    )


def _step(step: Json) -> tuple[str, ...]:
    m, bound = step["memory_gib"], step["roofline"]
    more = f" and {len(step['runs']) - 1} more" if len(step["runs"]) > 1 else ""
    return (
        step["runs"][0] + more,
        f"{step['params']:,}",
        mesh(step["mesh"]),
        f"{'yes' if step['fits'] else 'NO'} ({step['told_by']})",
        f"{m['peak']:.2f} of {step['hbm_limit_gib']:.2f}" if m else "–",
        bound["bound_by"] if bound else "–",
        f"{step['mfu_bound']:.0%}" if bound else "–",
        f"{step['hours']:,.4g}",
        "–" if step["price"] is None else f"{step['price']:,.2f}",
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    made = Table(*head)
    for row in rows:
        made.add_row(*row)
    return made
