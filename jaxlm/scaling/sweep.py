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

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import Sweep
from jaxlm.data import shards
from jaxlm.files import read_json, read_jsonl, write_json
from jaxlm.scaling import laws, runs
from jaxlm.scaling.ladder import Member, holdout, members
from jaxlm.scaling.lint import Plan, lint
from jaxlm.scaling.workers import run_members
from jaxlm.schema import JaxlmError, UserError, to_dict
from jaxlm.train import record
from jaxlm.train.record import RunRecord

Say = Callable[[str], None]


def plan(sweep: Sweep, folder: Path, say: Say, progress: Any = None) -> Plan:
    """Builds the data if needed and lints. Raises UserError."""
    lint(sweep)  # what needs no data fails before data is read
    manifest = shards.build(
        sweep.base.data, sweep.base.model.vocab_size, data_dir(sweep, folder), progress
    )
    say(
        f"data: {manifest.train.tokens:,} training tokens from {manifest.train.documents:,}"
        f" documents ({', '.join(sorted({o.text_licence for o in manifest.origins}))})"
    )
    return lint(sweep, manifest.train.tokens)


def data_dir(sweep: Sweep, folder: Path) -> Path:
    return Path(sweep.base.data.dir) if sweep.base.data.dir else folder / "data"


def claim(sweep: Sweep, folder: Path) -> list[Member]:
    """Writes sweep.json, or checks that the folder holds this sweep. Raises UserError."""
    planned, path = members(sweep), folder / "sweep.json"
    resolved = to_dict(sweep)
    if path.exists():
        old = read_json(path, "sweep")["sweep"]
        changed = sorted(k for k in resolved if resolved[k] != old.get(k) and k not in _MAY_CHANGE)
        if changed:
            raise UserError(
                f"--workdir: {folder} holds another sweep (differs in {', '.join(changed)});"
                " choose another"
            )
    _write_sweep(folder, resolved, planned)
    return planned


_MAY_CHANGE = ("name", "workers", "population", "keep_checkpoints")


def _write_sweep(folder: Path, resolved: dict[str, Any], planned: Sequence[Member]) -> None:
    rows = [
        {
            "name": m.name,
            "role": m.role,
            "budget": m.budget,
            "workdir": f"runs/{m.name}",
            "config": to_dict(m.config),
        }
        for m in planned
    ]
    write_json(
        folder / "sweep.json", {"format": "jaxlm.sweep/1", "sweep": resolved, "members": rows}
    )


# ------------------------------------------------------------------------------------------ stages


def run_ladder(sweep: Sweep, folder: Path, planned: Sequence[Member], **how: Any) -> None:
    """Trains what is not there yet. Raises JaxlmError when a member could not be finished."""
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
    result = laws.fit(
        runs.from_folder(folder / "runs"),
        curves=curves,
        bootstrap=sweep.bootstrap,
        seed=sweep.seed,
        for_compute=sweep.holdout_flops or None,
    )
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


def predict(sweep: Sweep, folder: Path, fit: dict[str, Any], say: Say) -> dict[str, Any]:
    """prediction.json: written once, before the held-out run starts."""
    path = folder / "prediction.json"
    if path.exists():
        return read_json(path, "prediction")
    predicted = laws.predict(fit, sweep.estimator, sweep.holdout_flops)
    if "refused" in predicted:
        raise JaxlmError(f"{sweep.estimator} cannot predict: {predicted['refused']}")
    body = {
        "format": "jaxlm.prediction/1",
        "estimator": sweep.estimator,
        "flops": sweep.holdout_flops,
        **predicted,
        "inputs": fit["inputs"],
    }
    body = {**body, "sha256": _digest(body), "made_at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_json(path, body)
    lo, hi = body["ci95"]
    say(
        f"predicted for {sweep.holdout_flops:.2g} FLOPs by {sweep.estimator}:"
        f" loss {body['loss']:.4f} (95 %: {lo:.4f} … {hi:.4f}) at {body['params']:,.0f} parameters"
    )
    return read_json(path, "prediction")


def run_holdout(
    sweep: Sweep, folder: Path, planned: Sequence[Member], prediction: dict[str, Any], **how: Any
) -> Member:
    member = holdout(sweep, prediction["params"])
    _write_sweep(folder, to_dict(sweep), [*planned, member])
    run_members(sweep, folder, [member], **how)
    return member


def score(folder: Path, member: Member, prediction: dict[str, Any], say: Say) -> dict[str, Any]:
    """score.json: the measured loss against the prediction that was made before."""
    row = record.read(folder / "runs" / member.name)
    if row is None or row.loss is None:
        raise JaxlmError(f"{member.name}: the held-out run has no loss to score")
    lo, hi = prediction["ci95"]
    error = row.loss / prediction["loss"] - 1
    inside = lo <= row.loss <= hi
    close = abs(error) <= 0.02
    body = {
        "format": "jaxlm.score/1",
        "run": member.name,
        "measured": row.loss,
        "predicted": prediction["loss"],
        "ci95": [lo, hi],
        "error_relative": error,
        "inside_interval": inside,
        "within_2_percent": close,
        "prediction_sha256": prediction["sha256"],
        "verdict": "predicted" if inside or close else "missed",
    }
    write_json(folder / "score.json", body)
    say(
        f"measured {row.loss:.4f}: {error:+.2%} off the prediction,"
        f" {'inside' if inside else 'outside'} the 95 % interval"
    )
    return body


def best(folder: Path, planned: Sequence[Member]) -> Member:
    """The member with the lowest held-out loss."""
    by_name = {r.name: r.loss for r in records(folder, planned) if r.loss is not None}
    if not by_name:
        raise JaxlmError(f"{folder}: no run has a loss")
    return min((m for m in planned if m.name in by_name), key=lambda m: by_name[m.name])


def drop_checkpoints(sweep: Sweep, folder: Path, planned: Sequence[Member]) -> None:
    """`sweep.keep_checkpoints`: 'best' keeps the best run's, 'none' none. Rows and plots stay."""
    if sweep.keep_checkpoints == "all":
        return
    kept = best(folder, planned).name if sweep.keep_checkpoints == "best" else ""
    for member in planned:
        if member.name != kept:
            shutil.rmtree(folder / "runs" / member.name / "checkpoints", ignore_errors=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def disk_use(planned: Sequence[Member]) -> int:
    """Bytes that the final checkpoints of all members take: parameters and two Adam moments."""
    from jaxlm.model.scale import size

    return sum(size(m.config.model).params * 12 * m.config.train.keep_checkpoints for m in planned)
