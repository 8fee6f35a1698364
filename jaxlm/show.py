"""What people see in the terminal: lines with progress and ETA, tables at the end."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

EVERY_S = 5.0  # between progress lines where output is not a terminal


def plain(value: Any) -> Any:
    """A record as JSON values."""
    return dataclasses.asdict(value)


class Lines:
    """Progress as one line that rewrites itself on a terminal, or a line now and then elsewhere."""

    def __init__(self, to_stderr: bool = False, quiet: bool = False) -> None:
        self.file = sys.stderr if to_stderr else sys.stdout
        if quiet:  # another process of the run says it
            self.file = open(os.devnull, "w")  # noqa: SIM115  (as long as the process)
        self.live = self.file.isatty()
        width = None if self.live else 140  # a log is not as narrow as no terminal
        self.console = Console(file=self.file, width=width, highlight=False)
        self.open = False  # a live line stands
        self.last = 0.0
        self.step = ""
        self.began = time.monotonic()
        self.shown: Any = None  # the board whose speed is measured from when it was first seen

    def say(self, text: str) -> None:
        """A line that stays, with the time since the start."""
        self._clear()
        self.file.write(f"[{_clock(time.monotonic() - self.began)}] {text}\n")
        self.file.flush()

    def _clear(self) -> None:
        if self.open:
            self.file.write("\r\x1b[2K")
            self.open = False

    def _progress(self, text: str, now: bool = False) -> None:
        if not now and time.monotonic() - self.last < (0.1 if self.live else EVERY_S):
            return
        self.last = time.monotonic()
        if not self.live:
            self.say(text)
            return
        width = shutil.get_terminal_size().columns - 1
        self._clear()
        self.file.write(text[:width])
        self.file.flush()
        self.open = True

    # ------------------------------------------------------------------------------------- stages

    def data(self, done: int, total: int, step: str) -> None:
        """`data_progress` of the shards: bytes done."""
        if step != self.step:
            self.step, self.step_began = step, time.monotonic()
        share = f" {done / total:4.0%}" if total else ""
        rate = done / max(time.monotonic() - self.step_began, 1e-9)
        left = f", {_clock((total - done) / rate)} left" if total and done else ""
        self._progress(f"{step}:{share} {done / 1e6:.1f} MB{left}")

    def row(self, run: Any, row: dict[str, Any]) -> None:
        """`progress` of a run: every row that it writes."""
        steps = run.config.train.steps
        if "eval/loss" in row:
            more = f"  {row['eval/bpb']:.4f} bits/byte" if "eval/bpb" in row else ""
            more += f"  accuracy {row['eval/accuracy']:.4f}" if "eval/accuracy" in row else ""
            self.say(f"step {row['step']}/{steps} eval loss {row['eval/loss']:.4f}{more}")
        elif "sample/text" in row:
            self.say(f"sample: {(row['sample/prompt'] + row['sample/text'])!r}")
        elif "train/loss" in row:
            rate = row["perf/tokens_per_s"]
            left = (run.config.tokens - row["tokens"]) / max(rate, 1e-9)
            mfu = f"  mfu {row['perf/mfu']:.0%}" if "perf/mfu" in row else ""
            self._progress(
                f"step {row['step']}/{steps} ({row['step'] / steps:.0%})"
                f"  loss {row['train/loss']:.4f}  lr {row['learning_rate']:.2e}"
                f"  {rate / 1e3:.1f}k tok/s{mfu}  {_clock(left)} left",
                now=not self.live,
            )

    def board(self, board: Any) -> None:
        """`progress` of a sweep."""
        now = time.monotonic()
        if self.shown is not board:
            self.shown, self.flops_at_start, self.board_began = board, board.flops, now
        rate = (board.flops - self.flops_at_start) / max(now - self.board_began, 1e-9)
        left = _clock((board.total_flops - board.flops) / rate) if rate else "–"
        running = ", ".join(
            f"{name} {board.losses[name]:.3f}" if name in board.losses else f"{name} compiling"
            for name in board.running
        )
        self._progress(
            f"{board.flops / board.total_flops:4.0%}  {len(board.finished)} runs done"
            f"  {rate / 1e9:.0f} GFLOP/s  {left} left  {running}"
        )

    # -------------------------------------------------------------------------------------- tables

    def record(self, row: Any) -> None:
        bits = "" if row.eval_bpb is None else f", {row.eval_bpb:.4f} bits/byte on held-out text"
        self.say(
            f"{row.name}: {row.status}, {row.tokens:,} tokens, loss {row.loss:.4f}{bits},"
            f" {_clock(row.wall_time_s)}"
        )

    def lint(self, found: Any) -> None:
        self._clear()
        head = ("run", "role", "d_model", "layers", "N effective", "tokens", "D/N", "steps")
        rows = [
            (r.name, r.role, r.d_model, r.n_layers, f"{r.params_effective:,.0f}", f"{r.tokens:,}",
             f"{r.tokens / r.params_effective:.0f}", f"{r.steps:,}", f"{r.epochs:.2f}",
             f"{r.flops:.2e}")
            for r in found.rows
        ]  # fmt: skip
        self._table((*head, "epochs", "FLOPs"), rows)
        for warning in found.warnings:
            self.say(f"lint: {warning}")
        self.say(
            f"{len(found.rows)} runs, {found.flops:.3g} FLOPs,"
            f" {found.checkpoint_bytes / 2**20:,.0f} MiB of checkpoints until it is done;"
            " 'jaxlm plan' tells how long it takes"
        )

    def plan(self, found: dict[str, Any]) -> None:
        from jaxlm.report import plan_table

        self._clear()
        self.console.print(plan_table.table(found))
        for line in plan_table.lines(found):
            self.say(line)

    def tokenizers(self, rows: Sequence[dict[str, Any]]) -> None:
        """What each tokenizer makes of each language, and of one sentence."""
        from jaxlm.data.inspect import SENTENCE

        head = (
            "tokenizer",
            "ids",
            "language",
            "bytes/token",
            "tokens/character",
            "unknown",
            "exact",
        )
        self._table(head, [
            (r["tokenizer"], f"{r['ids']:,}", r["language"], f"{r['bytes_per_token']:.2f}",
             f"{r['tokens_per_character']:.3f}", f"{r['unknown']:.2%}", f"{r['exact']:.1%}")
            for r in rows
        ])  # fmt: skip
        pieces = {r["tokenizer"]: r["pieces"] for r in rows}
        self._table(
            ("tokenizer", "tokens", SENTENCE),
            [(name, len(p), " ".join(x or "·" for x in p)) for name, p in pieces.items()],
        )

    def scores(self, found: dict[str, Any]) -> None:
        """Rows of an evaluation, a confusion matrix where the classes are few."""
        rows = found["rows"]
        compared = any("difference" in r for r in rows)
        head = ("task", "metric", "value", "95 %", "n")
        more = ("against", "difference", "95 %", "p") if compared else ()
        self._table((*head, *more), [
            (r["task"], r["metric"], f"{r['value']:.4g}", _band(r["ci95"]), f"{r['n']:,}")
            + ((f"{r['against']:.4g}", f"{r['difference']:+.3g}", _band(r["difference_ci95"]),
                "–" if r["p"] is None else f"{r['p']:.2g}") if "difference" in r else ())
            for r in rows
        ])  # fmt: skip
        for task, details in found["details"].items():
            table = details.get("confusion")
            if table and len(table["classes"]) <= 12:
                lines = zip(table["classes"], table["right_by_said"], strict=True)
                self._table((f"{task}: right \\ said", *table["classes"]),
                            [(name, *counts) for name, counts in lines])  # fmt: skip

    def judged(self, found: dict[str, Any]) -> None:
        """Bradley–Terry strengths of an evaluation by people."""
        self._table(
            (f"model ({found['votes']} votes)", "strength", "95 %", "wins"),
            [(m["model"], f"{m['strength']:.2f}", _band(m["ci95"]), f"{m['wins']:g}")
             for m in found["models"]],
        )  # fmt: skip

    def tasks(self, tasks: Iterable[Any]) -> None:
        self._table(
            ("task", "kind", "metrics", "licence", "NAME=hub reads"),
            [(t.name, t.kind, ", ".join(t.metrics), t.licence, t.home) for t in tasks],
        )

    def _table(self, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        table = Table(*head)
        for row in rows:
            table.add_row(*map(str, row))
        self.console.print(table)

    def fit(self, found: dict[str, Any]) -> None:
        from jaxlm.report import law_table

        self._clear()
        self.console.print(law_table.table(found))

    def laws(self, found: dict[str, Any]) -> None:
        from jaxlm.report import form_table

        self._clear()
        self.console.print(form_table.table(found["laws"]))

    def compare(self, found: dict[str, Any]) -> None:
        from jaxlm.report import compare_table

        self._clear()
        self.console.print(compare_table.table(found))

    def coordcheck(self, found: dict[str, Any]) -> None:
        for direction, spread in found["spread"].items():
            flat = all(v <= 2 for v in spread.values())
            sizes = ", ".join(f"{q.replace('_', ' ')} {v:.2f} ×" for q, v in spread.items())
            self.say(
                f"{found['parametrization']}, {found['optimizer']}, over {direction}:"
                f" {'flat' if flat else 'NOT flat'} within 2 × ({sizes})"
            )


def _band(bounds: Sequence[float] | None) -> str:
    return "–" if bounds is None else f"{bounds[0]:.4g} … {bounds[1]:.4g}"


def _clock(seconds: float) -> str:
    s = round(max(0.0, seconds))
    return (
        f"{s // 3600}:{s % 3600 // 60:02d}:{s % 60:02d}" if s >= 3600 else f"{s // 60}:{s % 60:02d}"
    )
