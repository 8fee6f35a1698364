"""`jaxlm compare A B`: pairs from two folders of runs, or from two experiments that are run seed by
seed until the sequential test (`paired`) ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import Config, Sweep, validate
from jaxlm.data import shards
from jaxlm.experiment import fingerprint
from jaxlm.files import read_json, write_json
from jaxlm.scaling import paired
from jaxlm.scaling import sweep as stages
from jaxlm.scaling.ladder import Member, members
from jaxlm.scaling.paired import Pair
from jaxlm.scaling.workers import run_members
from jaxlm.schema import JaxlmError, UserError, to_dict
from jaxlm.train import record
from jaxlm.train.record import RunRecord

Json = dict[str, Any]
Say = Callable[[str], None]


def of_folders(a: Path, b: Path, **how: Any) -> Json:
    """Runs of two folders, paired by seed, data, shape and budget (tokens, for single runs). Raises
    UserError where there are no pairs."""
    found = [_records(folder) for folder in (a, b)]
    shared = sorted(set(found[0]) & set(found[1]))
    if not shared:
        raise UserError(
            f"jaxlm compare: no run of {a} and {b} shares seed, data, shape and budget:"
            " there are no pairs"
        )
    pairs = [_pair(found[0][k], found[1][k]) for k in shared]
    alone = [r.name for one, other in (found, found[::-1]) for k, r in one.items()
             if k not in other]  # fmt: skip
    return {**_head(str(a), str(b)), **paired.compare(pairs, **how), "unpaired": sorted(alone)}


def _records(folder: Path) -> dict[tuple[Any, ...], RunRecord]:
    rows = [record.read(path.parent) for path in sorted(folder.glob("**/record.json"))]
    if not rows:
        raise UserError(f"{folder}: no run (record.json) in or below it")
    return {_key(r): r for r in rows if r and r.status == "finished" and r.role != "holdout"}


def _key(r: RunRecord) -> tuple[Any, ...]:
    size = r.tokens if r.role == "single" else r.budget
    return (r.d_model, r.n_layers, size, r.seed, r.data_fingerprint)


def _pair(a: RunRecord, b: RunRecord) -> Pair:
    if a.loss is None or b.loss is None:
        raise JaxlmError(f"{(a if a.loss is None else b).name}: finished without a loss")
    scale = f"d{a.d_model}-l{a.n_layers}-{a.budget:.3g}"
    return Pair(a.seed, scale, a.flops, a.loss, b.loss)


def _head(a: str, b: str) -> Json:
    return {"format": "jaxlm.compare/1", "a": a, "b": b}


# ------------------------------------------------------------------------------- running them


def of_experiments(
    a: Config | Sweep,
    b: Config | Sweep,
    names: tuple[str, str],
    folder: Path,
    most: int = paired.MOST,
    smallest: float | None = None,
    say: Say = print,
    data_progress: Any = None,
    **how: Any,
) -> Json:
    """Runs A and B at seeds 0, 1, … in `folder`, both on one data order per seed, and stops at the
    pair that decides. Leaves comparison.json; what is there is not run again. `how`: of
    `run_members`. Raises UserError, JaxlmError."""
    arms = [_scales(a, "A"), _scales(b, "B")]
    _comparable(arms)
    sweep = Sweep(name="compare", base=arms[0][0].config)
    data = sweep.base.data
    shards.build(data, sweep.base.model.vocab_size, stages.data_dir(sweep, folder), data_progress)
    planned: list[tuple[Member, Member]] = []
    for seed in range(most):
        planned += [
            (_seeded(m, "A", seed), _seeded(n, "B", seed)) for m, n in zip(*arms, strict=True)
        ]
        if seed + 1 < min(paired.FIRST, most):
            continue  # nothing is decided before that, so these run side by side
        everyone = [m for pair in planned for m in pair]
        _claim(sweep, folder, everyone)
        run_members(sweep, folder, everyone, **how)
        pairs = [_pair(_read(folder, m), _read(folder, n)) for m, n in planned]
        result = {**_head(*names), **paired.compare(pairs, most, smallest), "unpaired": []}
        stages.keep(folder / "comparison.json", result)
        effect = result["effect"]
        say(f"{seed + 1} seeds: B gains {effect['gain']:+.2%} on average; {effect['verdict']}")
        if effect["verdict"] != "open":
            break
    return result


def _claim(sweep: Sweep, folder: Path, planned: Sequence[Member]) -> None:
    """sweep.json for the workers, or UserError where the folder holds something else."""
    path, rows = folder / "sweep.json", [stages.member_row(m) for m in planned]
    if (folder / "config.json").exists():
        raise UserError(f"--workdir: {folder} holds a run, not a comparison; choose another")
    old = read_json(path, "sweep")["members"] if path.exists() else []
    if any(o["fingerprint"] != r["fingerprint"] for o, r in zip(old, rows, strict=False)):
        raise UserError(f"--workdir: {folder} holds other runs; choose another")
    if len(old) < len(rows):
        body = {"format": "jaxlm.sweep/1", "sweep": to_dict(sweep), "members": rows}
        write_json(path, body)


def _read(folder: Path, member: Member) -> RunRecord:
    row = record.read(folder / "runs" / member.name)
    if row is None or row.status != "finished":
        state = row.status if row else "has no record"
        raise JaxlmError(f"{folder}: {member.name} {state}: no pair")
    return row


def _scales(experiment: Config | Sweep, arm: str) -> list[Member]:
    if isinstance(experiment, Sweep):
        return [m for m in members(experiment) if m.role == "fit"]
    return [Member(validate(experiment, arm), "fit", 0.0)]


def _comparable(arms: Sequence[Sequence[Member]]) -> None:
    """Raises UserError where A and B would not see the same tokens in the same order."""
    if len(arms[0]) != len(arms[1]):
        raise UserError(f"jaxlm compare: A has {len(arms[0])} scales, B {len(arms[1])}")
    for one, other in zip(*arms, strict=True):
        a, b = one.config, other.config
        for name in ("data", "model.seq_len", "model.vocab_size", "train.global_batch_size"):
            group, _, key = name.partition(".")
            values = [getattr(getattr(c, group), key) if key else getattr(c, group)
                      for c in (a, b)]  # fmt: skip
            if values[0] != values[1]:
                raise UserError(f"jaxlm compare: {name} differs between A and B: no pairs")
        if fingerprint(a) == fingerprint(b):
            raise UserError("jaxlm compare: A and B are the same computation")


def _seeded(member: Member, arm: str, seed: int) -> Member:
    c = member.config
    config = dataclasses.replace(
        c,
        name=f"{arm}-{c.name}-seed{seed}",
        seed=seed,
        data=dataclasses.replace(c.data, seed=seed),
    )
    return Member(validate(config, config.name), "fit", member.budget)
