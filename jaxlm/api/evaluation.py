"""How good a model is: `evaluate`, its rows, and two models compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.api.places import Say, quiet
from jaxlm.api.weights import from_pretrained
from jaxlm.files import append_jsonl, write_json
from jaxlm.schema import UserError

FORMAT = "jaxlm.evaluation/1"
Row = dict[str, Any]


def evaluate(
    source: str | Path,
    tasks: Sequence[str],
    *,
    against: str | Path | None = None,
    limit: int = 0,
    run_code: bool = False,
    seed: int = 0,
    shots: int = 0,
    leaks: bool = False,
    out: str | Path | None = None,
    say: Say = quiet,
) -> dict[str, Any]:
    """Scores what `from_pretrained(source)` gives on tasks, each 'NAME=PATH' (or 'NAME=hub').

    Returns {"format", "model", "tasks", "rows", "details"}: a row is {task, metric, value, ci95,
    n}, and, with a second model `against`, {…, against, difference, difference_ci95, p}: this model
    minus that one on the same items. `limit`: the first items of each task. `shots`: so many items
    of a task, drawn by `seed`, stand answered before each of the others. `leaks`: what share of the
    items stands in what the run was trained on is a score, too. `run_code`: programs that a model
    writes may be run (`tasks.sandbox`). `out`: a new folder for evaluation.json and each task's
    answers. Raises UserError before a model is asked anything.
    """
    from jaxlm.loading import is_run
    from jaxlm.tasks import answers, task

    if not tasks:
        raise UserError("--task: expected a task, as in --task=imdb=reviews.csv")
    if out is not None and Path(out).exists() and any(Path(out).iterdir()):
        raise UserError(f"--out: {out} is not empty")
    if leaks and not is_run(Path(source)):
        raise UserError(f"--leaks: {source} is no run's folder: what it was trained on is unknown")
    read: dict[str, tuple[task.Task, list[task.Item]]] = {}
    for text in tasks:
        label, found, items = _read(text, limit, run_code)
        if label in read:
            raise UserError(f"--task: {label} is there twice")
        read[label] = found, task.with_shots(found, items, shots, seed)
        say(f"{label}: {len(read[label][1]):,} items")
    model = from_pretrained(source)
    other = None if against is None else from_pretrained(against)
    rows: list[Row] = []
    details: dict[str, Any] = {}
    for label, (found, items) in read.items():
        mine = answers.answer(found, items, model)
        theirs = None if other is None else answers.answer(found, items, other)
        details[label] = mine.details
        scores = dict(mine.scores)
        if leaks:
            scores["", "leaked"] = _leaked(label, items, Path(source), say)
        rows += _rows(label, scores, theirs.scores if theirs else {}, seed)
        if out is not None:
            for record in mine.records:
                append_jsonl(Path(out) / f"{_file(label)}.jsonl", record)
    result = {"format": FORMAT, "model": str(source), "tasks": list(tasks), "rows": rows,
              "details": details}  # fmt: skip
    if out is not None:
        write_json(Path(out) / "evaluation.json", result)
    return result


def _read(text: str, limit: int, run_code: bool) -> tuple[str, Any, Any]:
    """What a task 'NAME=PATH' is called, itself, and its items. Raises UserError."""
    from jaxlm.tasks import task

    name, _, path = text.partition("=")
    found = task.load(name)
    label = f"text/{Path(path).name}" if found.name == "text" else found.name
    if found.kind == "code" and not run_code:
        raise UserError(f"task {label}: runs what the model writes; allow it by --run-code")
    return label, found, task.read(found, path, limit)


def _leaked(label: str, items: Any, folder: Path, say: Say) -> Any:
    """The share of the items that stand in what the run was trained on."""
    from jaxlm.evaluate import intervals
    from jaxlm.tasks import leaks

    found = leaks.leaked(items, leaks.trained_on(folder))
    if any(found):
        first = found.index(True)
        say(f"{label}: {sum(found):,} of {len(found):,} items stand in the training text, the first"
            f" is number {first}: its scores are not to be trusted")  # fmt: skip
    return intervals.mean_of(found)


def _rows(label: str, mine: Any, theirs: Any, seed: int) -> list[Row]:
    """What is shown of a task's scores, and of their difference from another model's."""
    from jaxlm.evaluate import intervals

    rows = []
    for (group, metric), scored in mine.items():
        row = {
            "task": f"{label}/{group}" if group else label,
            "metric": metric,
            "value": scored.value,
            "ci95": intervals.interval(scored, seed),
            "n": scored.n,
        }
        if (group, metric) in theirs:
            other = theirs[group, metric]
            pair = intervals.paired(other, scored, seed)
            row |= {"against": other.value, "difference": pair["difference"],
                    "difference_ci95": pair["ci95"], "p": pair["p"]}  # fmt: skip
        rows.append(row)
    return rows


def lm_eval(
    source: str | Path,
    tasks: Sequence[str],
    *,
    include: str | None = None,
    limit: int = 0,
) -> dict[str, Any]:
    """lm-eval's tasks by their names, and those of YAML files in the folder `include`; rows as
    `evaluate` gives them, their interval ± 1.96 standard errors as lm-eval states these."""
    from jaxlm.api.harness import JaxlmLM
    from jaxlm.data.extras import library

    harness = library("lm_eval", "eval")
    manager = library("lm_eval.tasks", "eval").TaskManager(include_path=include)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"--lm-eval: lm-eval has no task {unknown[0]!r}")
    found = harness.simple_evaluate(
        model=JaxlmLM(from_pretrained(source)), tasks=list(tasks), task_manager=manager,
        limit=limit or None, bootstrap_iters=1000, log_samples=False,
    )  # fmt: skip
    rows = []
    for name, values in found["results"].items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            error = values.get(f"{metric}_stderr,{filtered}")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            half = 1.96 * error if isinstance(error, float) else None
            rows.append({
                "task": name, "metric": metric if filtered == "none" else key, "value": value,
                "ci95": None if half is None else [value - half, value + half],
                "n": found["n-samples"].get(name, {}).get("effective"),
            })  # fmt: skip
    return {"format": FORMAT, "model": str(source), "tasks": list(tasks), "rows": rows,
            "details": {}}  # fmt: skip


def _file(label: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in label)
