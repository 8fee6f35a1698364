"""The rows of docs/results/aot.md, compiled. With JAXLM_WRITE_AOT=1 they are written, too:

JAXLM_WRITE_AOT=1 python -m pytest -m slow tests/test_aot_table.py
"""

import json
import os
from pathlib import Path

import pytest
from aot_rows import ROWS

from jaxlm import api

HERE = Path(__file__).parents[1] / "docs" / "results"


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_big_model_compiles_for_chips_that_are_not_here(name):
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'jaxlm[tpu]'")
    config, topology, slices = ROWS[name]
    plan = api.plan(config, topology=topology, slices=slices, say=print)
    [step] = plan["steps"]
    if os.environ.get("JAXLM_WRITE_AOT"):
        keep(name, plan)
    there = json.loads((HERE / "aot.json").read_text())["rows"][name]["steps"][0]
    assert step["fits"] == there["fits"] and step["params"] == there["params"]
    if step["fits"]:
        assert step["memory_gib"]["peak"] == pytest.approx(there["memory_gib"]["peak"], rel=0.1)


def keep(name, plan):
    path = HERE / "aot.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    rows = {n: {**rows, name: plan}[n] for n in ROWS if n in {**rows, name: plan}}
    path.write_text(json.dumps({"format": "jaxlm.aot/1", "rows": rows}, indent=1) + "\n")
    (HERE / "aot.md").write_text(table(rows))


def table(rows):
    head = (
        "# Compiled for absent chips\n\n"
        "`JAXLM_WRITE_AOT=1 python -m pytest -m slow tests/test_aot_table.py` (configs:"
        " `tests/aot_rows.py`), jax 0.10.2, libtpu 0.0.42.1, two cores. bfloat16 with float32 state"
        " and AdamW, full remat but for GPT-2. GiB of one device as its compiler laid them out;"
        " GB moved per step and device, by the whole array of each collective. Nothing here was"
        " run on a chip: MFU is a bound.\n\n"
        "| model | chips | mesh | batch | fits | arguments | temporaries | peak of limit"
        " | GB moved, by mesh axes | bound by | MFU ≤ | compile s |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(line(name, plan) for name, plan in rows.items())


def line(name, plan):
    [step] = plan["steps"]
    config, _, _ = ROWS[name]
    memory, moved = step["memory_gib"], {}
    for c in step["collectives"]:
        axes = " + ".join(c["axes"])
        moved[axes] = moved.get(axes, 0.0) + c["bytes"] / 1e9
    shown = ", ".join(f"{a} {gb:.3g}" for a, gb in moved.items() if gb > 0.01)
    host = f" (+ {memory['host']:.2f} offloaded)" if memory and memory.get("host") else ""
    gib = (
        f"{memory['arguments']:.2f}{host} | {memory['temporaries']:.2f}"
        f" | {memory['peak']:.2f} of {step['hbm_limit_gib']}"
        if memory
        else f"– | – | {step['refused']}"
    )
    mesh = " × ".join(f"{a} {n}" for a, n in step["mesh"].items() if n > 1)
    batch = f"{config.train.global_batch_size} × {config.model.seq_len}"
    return (
        f"| {config.name}, {step['params'] / 1e9:.3g} B | {plan['chips']:,} ({plan['topology']})"
        f" | {mesh} | {batch} | {'yes' if step['fits'] else 'no'} | {gib} | {shown}"
        f" | {step['roofline']['bound_by']} | {step['mfu_bound']:.0%} | {step['compile_s']:.0f} |\n"
    )
