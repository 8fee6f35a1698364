"""The sequential test of `jaxlm compare` on real runs: six A/A pairs of arms, six changes.

    python benchmarks/compare.py [--out=runs/benchmark-compare]

Twelve data orders. A/A: arms that differ in their initial weights alone, so that nothing is to be
found; A/B: one field of the config changed. All twelve pairs of each are run, the test is told them
one by one, and where it stopped stands beside the mean of all twelve. 156 runs of 400 steps of a
model of 49 thousand parameters. Resumable; writes compare.json and prints the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
STEPS = 400
CHANGES = {
    "learning_rate 0.012 → 0.006": ("optimizer", "learning_rate", 0.006),
    "learning_rate 0.012 → 0.014": ("optimizer", "learning_rate", 0.014),
    "name adamw → muon": ("optimizer", "name", "muon"),
    "b2 0.95 → 0.99": ("optimizer", "b2", 0.99),
    "weight_decay 0.1 → 0": ("optimizer", "weight_decay", 0.0),
    "qk_norm on → off": ("model", "qk_norm", False),
}
TWINS = 6  # arms like A, each with initial weights of its own


def arms(most: int) -> dict[str, list[Any]]:
    """Arm → its members by data order. 'A' is the arm that the others are held to."""
    from jaxlm.config import validate
    from jaxlm.experiment import load
    from jaxlm.scaling.ladder import Member

    base = load(ROOT / "experiments" / "quickstart.py").base
    train = dataclasses.replace(base.train, steps=STEPS, checkpoint_every=0, keep_checkpoints=1)
    base = dataclasses.replace(base, train=train)

    def member(config: Any, arm: str, order: int, weights: int) -> Any:
        data = dataclasses.replace(config.data, seed=order)
        name = f"{arm}-{order}".replace(" ", "_").replace("/", "_")
        config = dataclasses.replace(config, name=name, seed=weights, data=data)
        return Member(validate(config, name), "fit", 0.0)

    found = {"A": [member(base, "A", i, i) for i in range(most)]}
    for twin in range(1, TWINS + 1):
        arm = f"A/A {twin}"
        found[arm] = [member(base, arm, i, 1000 * twin + i) for i in range(most)]
    for i, (arm, (part, field, value)) in enumerate(CHANGES.items()):
        group = dataclasses.replace(getattr(base, part), **{field: value})
        changed = dataclasses.replace(base, **{part: group})
        found[arm] = [member(changed, f"change{i}", k, k) for k in range(most)]
    return found


def tested(a: list[float], b: list[float]) -> dict[str, Any]:
    """Where the sequential test stops on these losses, and the mean of all pairs."""
    from jaxlm.scaling import paired

    pairs = [paired.Pair(i, "one", 1.0, x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    for n in range(paired.FIRST, len(pairs) + 1):
        found = paired.compare(pairs[:n])
        if found["effect"]["verdict"] != "open":
            break
    gains = np.array([p.gain for p in pairs])
    every = {"mean": float(gains.mean()), "se": float(gains.std(ddof=1) / len(gains) ** 0.5)}
    return {**found["effect"], "noise_floor": found["noise_floor"], "all": every}


def main() -> None:
    from jaxlm.config import Sweep
    from jaxlm.data import shards
    from jaxlm.scaling import paired
    from jaxlm.scaling import sweep as stages
    from jaxlm.scaling.workers import run_apart

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-compare"))
    out = parser.parse_args().out
    planned = arms(paired.MOST)
    members = [m for arm in planned.values() for m in arm]
    base = members[0].config
    shards.build(base.data, base.text_ids, out / "data")
    run_apart(Sweep(name="compare", base=base), out, members, out / "data")
    losses = {
        arm: [r.loss for r in stages.records(out, ms) if r.loss is not None]
        for arm, ms in planned.items()
    }
    rows = []
    for arm in planned:
        if arm != "A":
            found = tested(losses["A"], losses[arm])
            rows.append({"change": arm, **found})
            low, high = found["ci95"]
            print(f"| {arm} | {found['verdict']} | {found['pairs']} | {found['gain']:+.2%} | "
                  f"{low:+.2%} … {high:+.2%} | {found['all']['mean']:+.2%} ± "
                  f"{found['all']['se']:.2%} |")  # fmt: skip
    body = {"format": "jaxlm.benchmark/1", "steps": STEPS, "losses": losses, "rows": rows}
    (out / "compare.json").write_text(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
