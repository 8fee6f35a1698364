"""The quickstart ladder as jaxlm runs it, against the same members the plain way.

Plain: a fresh process per member, one after another, XLA's default threading, a Python loop with
one step per dispatch, no compilation cache. Both train the same configs on the same shards.

    python benchmarks/sweep.py [--share=1.0] [--out=runs/benchmark-sweep]

`--share` trains that share of every member's steps (compilation then weighs more). Prints the
wall times, their ratio, and where each spends them; writes sweep.json. Run on a quiet machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def ladder(share: float) -> Any:
    from jaxlm.experiment import load

    sweep = load(ROOT / "experiments" / "quickstart.py")
    rungs = tuple(dataclasses.replace(r, flops=r.flops * share) for r in sweep.rungs)
    return dataclasses.replace(sweep, rungs=rungs)


def with_jaxlm(sweep: Any, folder: Path) -> dict[str, float]:
    from jaxlm.scaling import sweep as stages

    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")  # cold
    began = time.perf_counter()
    stages.check(sweep, folder, print)
    members = stages.claim(sweep, folder)
    stages.run_ladder(sweep, folder, members)
    return {"wall_s": time.perf_counter() - began}


def plainly(sweep: Any, folder: Path, data: Path) -> dict[str, Any]:
    """Wall time, where it went, and the loss of every member; members done before are not run."""
    from jaxlm.scaling.ladder import members

    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS",)}
    env["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    parts: dict[str, float] = {"start_s": 0.0, "compile_s": 0.0, "steps_s": 0.0, "eval_s": 0.0}
    losses = []
    for i, member in enumerate(members(sweep)):
        job, kept = folder / f"{i}.json", folder / f"{i}.done.json"
        from jaxlm.schema import to_dict

        job.write_text(json.dumps(to_dict(member.config)))
        if not kept.exists():
            t0 = time.perf_counter()
            done = subprocess.run(
                [sys.executable, __file__, "--member", str(job), str(data)],
                env=env, capture_output=True, text=True, check=True,
            )  # fmt: skip
            row = json.loads(done.stdout.splitlines()[-1])
            row["start_s"] = time.perf_counter() - t0 - sum(row[k] for k in row if k.endswith("_s"))
            kept.write_text(json.dumps(row))
            print(f"plain {member.name}: {time.perf_counter() - t0:.1f} s", flush=True)
        row = json.loads(kept.read_text())
        losses.append(row["loss"])
        for name in parts:
            parts[name] += row[name]
    return {"wall_s": sum(parts.values()), **parts, "losses": losses}


def member(job: Path, data: Path) -> None:
    """One member in this process, as one would write it first: a jitted step in a Python loop."""
    import jax

    from jaxlm import mesh
    from jaxlm.config import Config
    from jaxlm.data import loader
    from jaxlm.evaluate import likelihood
    from jaxlm.schema import from_dict
    from jaxlm.train.optimizer import hyper
    from jaxlm.train.step import init_state, train_step

    config = from_dict(Config, json.loads(job.read_text()))
    train = loader.Dataset.open(data, "train", config.model.seq_len)
    held = loader.Dataset.open(data, "eval", config.model.seq_len)
    h, batch_size = hyper(config), config.train.global_batch_size
    with jax.set_mesh(mesh.make(config)):
        devices = jax.sharding.get_mesh()
        step = jax.jit(lambda s, b: train_step(config, h, s, b), donate_argnums=0)
        t0 = time.perf_counter()
        state = jax.jit(lambda: init_state(config, h))()

        def at(i: int) -> Any:
            rows = loader.chunk(train, config.seed, i * batch_size, 1, batch_size)
            return mesh.put_batch(jax.tree.map(lambda x: x[0], rows), devices)

        state, metrics = step(state, at(0))
        float(metrics["train/loss"])
        t1 = time.perf_counter()
        for i in range(1, config.train.steps):
            state, metrics = step(state, at(i))
            if i % config.train.log_every == 0:
                float(metrics["train/loss"])
        jax.block_until_ready(state)
        t2 = time.perf_counter()
        observe = likelihood.heldout(held, config.data.eval_sequences)
        loss = observe(config, state.params, config.train.steps)[0]["eval/loss"]
        t3 = time.perf_counter()
    print(json.dumps({"compile_s": t1 - t0, "steps_s": t2 - t1, "eval_s": t3 - t2, "loss": loss}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    folder = Path(options.out or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    sweep = ladder(options.share)
    ours = with_jaxlm(sweep, folder / "jaxlm")
    rows = [json.loads(p.read_text()) for p in (folder / "jaxlm" / "runs").glob("*/record.json")]
    ours["trained_s"] = sum(r["wall_time_s"] for r in rows)
    (folder / "plain").mkdir(exist_ok=True)
    plain = plainly(sweep, folder / "plain", folder / "jaxlm" / "data")
    result = {
        "format": "jaxlm.benchmark/1",
        "members": len(rows),
        "share": options.share,
        "jaxlm": ours,
        "plain": plain,
        "ratio": plain["wall_s"] / ours["wall_s"],
    }
    (folder / "sweep.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "--member":
        member(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
