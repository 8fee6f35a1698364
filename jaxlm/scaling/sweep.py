"""The sweep as one object: lint → ladder → fit → predict → held-out run → score → report.

Every stage leaves a file in the sweep's folder and is skipped when its file is there and was made
from the same inputs, so the same command, run again, goes on where it was:

    sweep.json        the resolved sweep and its members
    data/             token shards and their manifest
    runs/NAME/        one folder per run
    fit.json          the laws, with intervals
    prediction.json   of the held-out run; written before it runs and never after
    score.json        of the prediction
    samples.json      text from the best model
    report.html       and the plots as PNG
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import Sweep
from jaxlm.data import shards
from jaxlm.experiment import fingerprint
from jaxlm.files import plain, read_json, read_jsonl, write_json
from jaxlm.model.scale import size as model_size
from jaxlm.scaling import foresight, halving, laws, reuse, runs, trunk
from jaxlm.scaling.ladder import Member, holdout, members
from jaxlm.scaling.lint import Found, after, lint
from jaxlm.scaling.workers import run_members
from jaxlm.schema import JaxlmError, UserError, to_dict
from jaxlm.train import record
from jaxlm.train.record import RunRecord

Say = Callable[[str], None]


def check(sweep: Sweep, folder: Path, say: Say, progress: Any = None) -> Found:
    """Builds the data if needed and lints. Raises UserError."""
    lint(sweep)  # what needs no data fails before data is read
    manifest = shards.build(sweep.base.data, sweep.base.text_ids, data_dir(sweep, folder), progress)
    say(
        f"data: {manifest.train.tokens:,} training tokens from {manifest.train.documents:,}"
        f" documents ({', '.join(sorted({o.text_licence for o in manifest.origins}))})"
    )
    return lint(sweep, manifest.train.tokens)


def data_dir(sweep: Sweep, folder: Path) -> Path:
    return Path(sweep.base.data.dir) if sweep.base.data.dir else folder / "data"


def plan_members(sweep: Sweep) -> tuple[list[Member], list[trunk.Trunk]]:
    """The members, and the trunks that they branch from where `sweep.branches` asks for some."""
    planned = members(sweep)
    return trunk.branched(planned) if sweep.branches else (planned, [])


def claim(sweep: Sweep, folder: Path) -> list[Member]:
    """Writes sweep.json, or checks that the folder holds this sweep. Raises UserError."""
    if (folder / "config.json").exists():
        raise UserError(f"--workdir: {folder} holds a run, not a sweep; choose another")
    planned, path, resolved = plan_members(sweep)[0], folder / "sweep.json", to_dict(sweep)
    rows = [member_row(m) for m in planned]
    if path.exists():
        old = read_json(path, "sweep")
        changed = [k for k in resolved if resolved[k] != old["sweep"].get(k)]
        changed = [k for k in changed if k not in _MAY_CHANGE]
        was = {r["name"]: r["fingerprint"] for r in old["members"]}
        if not changed and any(was[r["name"]] != r["fingerprint"] for r in rows):
            changed = ["the code that it refers to"]
        if changed:
            raise UserError(
                f"--workdir: {folder} holds another sweep (differs in {', '.join(changed)});"
                " choose another"
            )
        rows += [r for r in old["members"] if r["role"] == "holdout"]
    keep(path, {"format": "jaxlm.sweep/1", "sweep": resolved, "members": rows})
    return planned


_MAY_CHANGE = (
    "name",
    "workers",
    "engine",
    "resources",
    "population",
    "keep_checkpoints",
    "sample_prompts",
    "reuse",
)


def member_row(m: Member) -> dict[str, Any]:
    return {
        "name": m.name,
        "role": m.role,
        "budget": m.budget,
        "workdir": f"runs/{m.name}",
        "fingerprint": fingerprint(m.config),
        "config": to_dict(m.config),
    }


def keep(path: Path, body: dict[str, Any]) -> None:
    """Writes a file unless it holds this already."""
    with contextlib.suppress(OSError, ValueError):
        if json.loads(path.read_text()) == plain(body):
            return
    write_json(path, body)


# ------------------------------------------------------------------------------------------ stages


def run_ladder(sweep: Sweep, folder: Path, planned: Sequence[Member], **how: Any) -> None:
    """Trains what is not there yet. Raises JaxlmError when a member could not be finished."""
    there = data_dir(sweep, folder)
    if sweep.reuse:
        reuse.copy(sweep.reuse, folder, planned, shards.read_manifest(there).fingerprint)
    trunk.grow(sweep, folder, plan_members(sweep)[1], there, **how)
    if sweep.halve:
        saw = shards.read_manifest(there).fingerprint
        halving.thin(sweep, folder, planned, saw, **how)
    run_members(sweep, folder, planned, **how)


def records(folder: Path, planned: Sequence[Member]) -> list[RunRecord]:
    found = [record.read(folder / "runs" / m.name) for m in planned]
    return [r for r in found if r is not None]


def fit_ladder(sweep: Sweep, folder: Path, planned: Sequence[Member], say: Say) -> dict[str, Any]:
    """fit.json: all approaches, from the ladder's records."""
    rows = records(folder, planned)
    inputs = _digest([[r.fingerprint, r.loss, r.status] for r in rows])
    path = folder / "fit.json"
    if path.exists() and read_json(path, "fit").get("inputs") == inputs:
        return read_json(path, "fit")
    say(f"fitting {len(rows)} runs, {sweep.bootstrap} resamples")
    curves = [_curve(folder, r) for r in rows if r.status == "finished"]
    curves = [c for c in curves if len(c.flops) >= 3]  # fewer are no curve
    points = runs.from_folder(folder / "runs")
    result = laws.fit(
        points,
        curves=curves,
        bootstrap=sweep.bootstrap,
        seed=sweep.seed,
        for_compute=sweep.holdout_flops or None,
    )
    result["left_out"] = foresight.left_out(points, curves)
    result["warnings"] += after(sweep, rows, result)
    write_json(path, {**result, "inputs": inputs})
    return read_json(path, "fit")


def _curve(folder: Path, row: RunRecord) -> runs.Curve:
    metrics = [m for m in read_jsonl(folder / "runs" / row.name / "metrics.jsonl") if "flops" in m]
    return runs.Curve(
        row.params_effective,
        [m["flops"] for m in metrics],
        [m["train/loss"] for m in metrics],
        row.name,
    )


class Unscored(JaxlmError):
    """The sweep ends without a score."""


def predict(sweep: Sweep, folder: Path, fit: dict[str, Any], say: Say) -> dict[str, Any]:
    """prediction.json: written once, before the held-out run starts. Raises Unscored.

    `params` and `tokens` are the predicted optimum; `run` is the member nearest to it, and `loss`
    is what this member is predicted to measure.
    """
    path = folder / "prediction.json"
    if path.exists():
        return read_json(path, "prediction")
    optimum = laws.predict(fit, sweep.estimator, sweep.holdout_flops)
    if "refused" in optimum:
        raise Unscored(f"{folder}: {sweep.estimator} cannot predict: {optimum['refused']}")
    member = holdout(sweep, optimum["params"])
    size = model_size(member.config.model).params_effective
    body = {
        "format": "jaxlm.prediction/1",
        **laws.predict(fit, sweep.estimator, sweep.holdout_flops, size),
        "run": member.name,
        "run_params": size,
        "inputs": fit["inputs"],
    }
    body = {**body, "sha256": _digest(body), "made_at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_json(path, body)
    within = "95 %: {:.4f} … {:.4f}".format(*body["ci95"]) if body["ci95"] else "no interval"
    say(
        f"predicted for {sweep.holdout_flops:.2g} FLOPs by {sweep.estimator}:"
        f" loss {body['loss']:.4f} ({within}) at {size:,.0f} parameters"
    )
    return read_json(path, "prediction")


def run_holdout(sweep: Sweep, folder: Path, prediction: dict[str, Any], **how: Any) -> Member:
    """Trains the held-out run that the prediction chose."""
    member, path = holdout(sweep, prediction["params"]), folder / "sweep.json"
    body = read_json(path, "sweep")
    others = [r for r in body["members"] if r["role"] != "holdout"]
    keep(path, {**body, "members": [*others, member_row(member)]})
    run_members(sweep, folder, [member], **how)
    return member


def score(folder: Path, member: Member, prediction: dict[str, Any], say: Say) -> dict[str, Any]:
    """score.json: the measured loss against what was predicted before. Raises Unscored."""
    row = record.read(folder / "runs" / member.name)
    if row is None or row.loss is None or row.status != "finished":
        state = "has no loss" if row is None else row.status
        raise Unscored(f"{folder}: the held-out run {member.name} {state}: nothing to score")
    error, ci95 = row.loss / prediction["loss"] - 1, prediction["ci95"]
    inside = ci95 is not None and ci95[0] <= row.loss <= ci95[1]
    close = abs(error) <= 0.02
    narrow = ci95 is not None and prediction["half_width"] <= 0.05
    verdict = "predicted" if close or (inside and narrow) else "too wide" if inside else "missed"
    body = {
        "format": "jaxlm.score/1",
        "run": member.name,
        "measured": row.loss,
        "predicted": prediction["loss"],
        "ci95": ci95,
        "error_relative": error,
        "inside_interval": inside,
        "within_2_percent": close,
        "prediction_sha256": prediction["sha256"],
        "verdict": verdict,
    }
    keep(folder / "score.json", body)
    say(
        f"measured {row.loss:.4f}: {error:+.2%} off the prediction,"
        f" {'inside' if inside else 'outside'} the 95 % interval"
    )
    return body


def best(folder: Path) -> str:
    """The name of the finished run with the lowest held-out loss. Raises JaxlmError."""
    rows = [record.read(path.parent) for path in folder.glob("runs/*/record.json")]
    losses = {r.name: r.loss for r in rows if r and r.status == "finished" and r.loss is not None}
    if not losses:
        raise JaxlmError(f"{folder}: no run has finished")
    return min(losses, key=lambda name: losses[name])


def drop_checkpoints(sweep: Sweep, folder: Path, planned: Sequence[Member]) -> None:
    """`sweep.keep_checkpoints`: 'best' keeps the best run's, 'none' none. Rows and plots stay."""
    if sweep.keep_checkpoints == "all":
        return
    shutil.rmtree(folder / "trunks", ignore_errors=True)
    kept = best(folder) if sweep.keep_checkpoints == "best" else ""
    for member in planned:
        if member.name != kept:
            shutil.rmtree(folder / "runs" / member.name / "checkpoints", ignore_errors=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
