"""Does the best learning rate of a small model hold at 8 × the width and at 4 × the depth?

    python benchmarks/transfer.py [--out=runs/benchmark-transfer] [--cells=narrow,deep,wide,both]

AdamW and Muon, each under CompleteP and under the standard parametrisation (the control), over
learning rates 2 × apart, 250 steps of 512 byte tokens of the standard library, linear decay. A
shape is compiled once for all its rates. Resumable; writes transfer.json and prints the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = 250
CELLS = {"narrow": (32, 2), "deep": (32, 8), "wide": (256, 2), "both": (256, 8)}
RATES = {"adamw": range(-11, -2), "muon": range(-7, 1)}  # log2


def sweep_of(parametrization: str, name: str, cells: list[str]) -> Any:
    """Every cell at every rate, each for `STEPS` steps."""
    from jaxlm.config import Rung, Shape
    from jaxlm.experiment import load
    from jaxlm.model.scale import size
    from jaxlm.scaling.ladder import sized

    sweep = load(ROOT / "experiments" / "quickstart.py")
    model = dataclasses.replace(
        sweep.base.model, n_heads=2, seq_len=64, parametrization=parametrization, base_n_layers=2
    )
    train = dataclasses.replace(
        sweep.base.train, global_batch_size=8, checkpoint_every=0, keep_checkpoints=1
    )
    rungs = []
    for cell in cells:
        shape = Shape(*CELLS[cell])
        per_step = size(sized(model, shape)).flops_per_token * train.global_batch_size * 64
        rungs.append(Rung(float(STEPS * per_step), (shape,)))
    rates_of = dataclasses.replace(sweep.base.optimizer, name=name, warmup_fraction=0.1)
    return dataclasses.replace(
        sweep,
        name=f"{name}-{parametrization}",
        base=dataclasses.replace(sweep.base, model=model, train=train, optimizer=rates_of),
        rungs=tuple(rungs),
        holdout_flops=0.0,
        vary=(("optimizer.learning_rate", tuple(2.0**k for k in RATES[name])),),
    )


def losses(sweep: Any, folder: Path) -> dict[str, dict[float, float | None]]:
    """Held-out loss by cell and rate; None where a run diverged."""
    from jaxlm.scaling import sweep as stages

    stages.check(sweep, folder, print)
    planned = stages.claim(sweep, folder)
    stages.run_ladder(sweep, folder, planned)
    stages.drop_checkpoints(dataclasses.replace(sweep, keep_checkpoints="none"), folder, planned)
    shapes = {shape: cell for cell, shape in CELLS.items()}
    found: dict[str, dict[float, float | None]] = {}
    for m, row in zip(planned, stages.records(folder, planned), strict=True):
        cell = shapes[m.config.model.d_model, m.config.model.n_layers]
        ok = row.status == "finished"
        found.setdefault(cell, {})[m.config.optimizer.learning_rate] = row.loss if ok else None
    return found


def best(row: dict[float, float | None]) -> dict[str, Any]:
    """The best rate of those tried, and the bottom of the parabola through it and its neighbours
    (log2 of the rate); `edge`: it is the first or the last that did not diverge."""
    tried = [(math.log2(rate), loss) for rate, loss in sorted(row.items()) if loss is not None]
    i = min(range(len(tried)), key=lambda k: tried[k][1])
    edge = i in (0, len(tried) - 1)
    bottom = tried[i][0]
    if not edge:
        left, middle, right = (tried[k][1] for k in (i - 1, i, i + 1))
        bottom += 0.5 * (left - right) / (left - 2 * middle + right)
    return {"log2_rate": tried[i][0], "bottom": bottom, "edge": edge, "loss": tried[i][1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-transfer"))
    parser.add_argument("--cells", default="narrow,deep,wide,both")
    asked = parser.parse_args()
    cells = asked.cells.split(",")
    rows: list[dict[str, Any]] = []
    for name in ("adamw", "muon"):
        for parametrization in ("completep", "standard"):
            # One folder per cell, so that more cells can be asked for later.
            found: dict[str, dict[float, float | None]] = {}
            for cell in cells:
                sweep = sweep_of(parametrization, name, [cell])
                found |= losses(sweep, asked.out / f"{name}-{parametrization}-{cell}")
            start = best(found["narrow"])
            for cell in cells:
                at = best(found[cell])
                row = {"optimizer": name, "parametrization": parametrization, "cell": cell}
                moved = at["log2_rate"] - start["log2_rate"]
                rows.append(row | at | {"moved": moved, "losses": list(found[cell].items())})
                print(f"{name} {parametrization} {cell}: best 2^{at['log2_rate']:.0f}"
                      f" (bottom {at['bottom']:.2f}), moved {moved:+.0f}, loss {at['loss']:.4f}"
                      f"{', at the edge' if at['edge'] else ''}", flush=True)  # fmt: skip
    body = {"format": "jaxlm.benchmark/1", "steps": STEPS, "rows": rows}
    (asked.out / "transfer.json").write_text(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
