"""Public data of scaling studies as CSVs for `jaxlm fit` (docs/results/published.md).

    python benchmarks/published.py --gadre=CLONE --muennighoff=CLONE --out=DIR

CLONE: a checkout of github.com/mlfoundations/scaling (exp_data/), of
github.com/huggingface/datablations (utils/parametric_fit.ipynb). Nothing is fetched here.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
from pathlib import Path

SMALL, LARGE = "d=96_l=8_h=4", ("open_lm_1b", "open_lm_7b")


def gadre(clone: Path) -> list[dict]:
    """Runs with their C4 loss and mean top-1 error on the 17-task split. `used`: "loss" for the
    five runs of the paper's fit of the loss, "error" for the sixth of the fit of the error,
    "target" for the largest, "no" for the others."""
    tasks = _list((clone / "scaling" / "constants.py").read_text(), "SUBSET")
    rows = []
    for path in sorted((clone / "exp_data" / "models").glob("*.json")):
        run = json.loads(path.read_text())
        how = run["hyperparameters"]
        evaluation = clone / "exp_data" / "evals" / f"evaluation_{path.stem}_heavy.json"
        scores = json.loads(evaluation.read_text())["eval_metrics"]["icl"]
        model, times = Path(how["model"]).stem, how["chinchilla_multiplier"]
        if model in LARGE:
            used = "error" if (model, times) == (LARGE[0], 1.0) else "target"
        else:
            used = "loss" if times == 1.0 or (model, times) == (SMALL, 16.0) else "no"
        rows.append({
            "name": path.stem, "dataset": run["dataset_name"], "params": how["params"],
            "tokens": how["tokens"], "used": used,
            "loss": next(r["loss"] for r in run["results"]
                         if Path(r["val_data"][0]).parent.name == "c4_val"),
            "error": sum(1 - scores[t] for t in tasks) / len(tasks),
        })  # fmt: skip
    return rows


def _list(source: str, name: str) -> list[str]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    raise SystemExit(f"no list {name}")


def muennighoff(clone: Path) -> list[dict]:
    """The 182 runs of the paper's fit, as the notebook prints them (in billions)."""
    notebook = json.loads((clone / "utils" / "parametric_fit.ipynb").read_text())
    printed = []
    for cell in notebook["cells"]:
        text = "".join("".join(o.get("text", "")) for o in cell.get("outputs", []))
        rows = [line.split() for line in text.splitlines()]
        rows = [r for r in rows if len(r) == 5 and r[0][0].isdigit()]
        if len(rows) == 182 and float(rows[0][1]) < 1e3 and not printed:
            printed = rows
    if not printed:
        raise SystemExit("no cell of the notebook prints 182 runs")
    names = ("params", "tokens", "unique_tokens")
    return [
        {"name": r[0], **{n: float(v) * 1e9 for n, v in zip(names, r[1:4], strict=True)},
         "loss": float(r[4])}
        for r in printed
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gadre", type=Path)
    parser.add_argument("--muennighoff", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    for name, read in (("gadre", gadre), ("muennighoff", muennighoff)):
        clone = getattr(asked, name)
        if clone is not None:
            rows = read(clone)
            path = asked.out / f"{name}.csv"
            with open(path, "w", newline="") as f:
                writer = csv.DictWriter(f, rows[0])
                writer.writeheader()
                writer.writerows(rows)
            print(f"{path}: {len(rows)} runs")


if __name__ == "__main__":
    main()
