"""One grid of (N, D), horizons 2 × apart: trunks with cool-down branches against cosine runs alone.

    python benchmarks/horizons.py [--share=1.0] [--out=runs/benchmark-horizons]

Cosine: every point its own run with its own schedule, in a process of its own, one by one (as
`benchmarks/sweep.py` runs members plainly). jaxlm: WSD branches from one trunk per size, one
compilation per shape, workers side by side; and, to tell where the saving comes from, the same WSD
runs without trunks. Fits approach 3 to both grids. `--share` trains that share of every run's
steps. Writes horizons.json. Run on a quiet machine; stopped (SIGTERM, as `timeout` sends it), the
same command goes on, and the times of its sittings add up.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sweep import ROOT, plainly


def grid(share: float, schedule: str) -> Any:
    """Four sizes x four horizons, as one rung per horizon; D from 1e6 to 8e6 tokens."""
    from jaxlm.config import Rung, Shape
    from jaxlm.experiment import load
    from jaxlm.model.scale import size
    from jaxlm.scaling.ladder import sized

    base = load(ROOT / "experiments" / "quickstart.py").base
    rates = dataclasses.replace(base.optimizer, schedule=schedule, decay_fraction=0.2)
    base = dataclasses.replace(base, optimizer=rates)
    rungs = []
    for tokens in (1e6, 2e6, 4e6, 8e6):
        for shape in (Shape(w, 2) for w in (32, 48, 64, 96)):
            per_token = size(sized(base.model, shape)).flops_per_token
            rungs.append(Rung(share * tokens * per_token, (shape,)))
    sweep = load(ROOT / "experiments" / "quickstart.py")
    return dataclasses.replace(
        sweep, base=base, rungs=tuple(rungs), holdout_flops=0.0, branches=schedule == "wsd"
    )


@contextlib.contextmanager
def sitting(path: Path) -> Iterator[None]:
    """Adds the seconds spent inside to those in the file."""
    before = json.loads(path.read_text()) if path.exists() else 0.0
    began = time.perf_counter()
    try:
        yield
    finally:
        path.write_text(json.dumps(before + time.perf_counter() - began))


def with_jaxlm(sweep: Any, folder: Path, data: Path) -> dict[str, Any]:
    from jaxlm.scaling import sweep as stages
    from jaxlm.train.workdir import StopFlag

    kept = folder / "result.json"
    if kept.exists():
        done: dict[str, Any] = json.loads(kept.read_text())
        return done
    base = dataclasses.replace(
        sweep.base, data=dataclasses.replace(sweep.base.data, dir=str(data.resolve()))
    )
    sweep = dataclasses.replace(sweep, base=base, keep_checkpoints="all")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder.resolve() / "cache")  # cold
    with sitting(folder / "seconds.json"), StopFlag(grace_s=None) as stop:
        planned = stages.claim(sweep, folder)
        stages.run_ladder(sweep, folder, planned, stop=stop)
    seconds = json.loads((folder / "seconds.json").read_text())
    members, trunks = stages.plan_members(sweep)
    from jaxlm.scaling import trunk

    saved = trunk.saved(members, trunks) if trunks else 0.0
    result = {"wall_s": seconds, "steps_saved": saved, "fit": fitted_folder(folder / "runs")}
    kept.write_text(json.dumps(result))
    return result


def fitted_folder(folder: Path) -> dict[str, Any]:
    from jaxlm.scaling import laws, runs

    return _exponents(laws.fit(runs.from_folder(folder), approaches=(3,), bootstrap=1000))


def _points(sweep: Any, losses: list[float]) -> Any:
    from jaxlm.model.scale import size
    from jaxlm.scaling import runs
    from jaxlm.scaling.ladder import members

    configs = [m.config for m in members(sweep)]
    n = [size(c.model).params_effective for c in configs]
    d = [float(c.tokens) for c in configs]
    return runs.Points(n, d, [6 * a * b for a, b in zip(n, d, strict=True)], losses)


def _exponents(found: dict[str, Any]) -> dict[str, Any]:
    law = found["approach3"]
    return (
        law if "refused" in law else {k: [law[k], law["ci95"][k]] for k in ("alpha", "beta", "a")}
    )


def main() -> None:
    from jaxlm.data import shards
    from jaxlm.scaling import laws

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-horizons"))
    asked = parser.parse_args()
    wsd, cosine = grid(asked.share, "wsd"), grid(asked.share, "cosine")
    data = asked.out / "data"
    asked.out.mkdir(parents=True, exist_ok=True)
    shards.build(wsd.base.data, wsd.base.model.vocab_size, data)
    (asked.out / "cosine").mkdir(exist_ok=True)
    result: dict[str, Any] = {"share": asked.share}
    result["branches"] = with_jaxlm(wsd, asked.out / "branches", data)
    result["without_trunks"] = with_jaxlm(
        dataclasses.replace(wsd, branches=False), asked.out / "whole", data
    )
    plain = plainly(cosine, asked.out / "cosine", data)
    found = laws.fit(_points(cosine, plain["losses"]), approaches=(3,), bootstrap=1000)
    result["cosine_alone"] = plain | {"fit": _exponents(found)}
    walls = {k: result[k]["wall_s"] for k in ("cosine_alone", "without_trunks", "branches")}
    result["ratio"] = walls["cosine_alone"] / walls["branches"]
    result["ratio_of_workers"] = walls["cosine_alone"] / walls["without_trunks"]
    result["ratio_of_trunks"] = walls["without_trunks"] / walls["branches"]
    (asked.out / "horizons.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
