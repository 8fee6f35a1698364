"""`record.json`: the typed row that a run leaves behind; what sweeps, fits and reports read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxlm import hosts
from jaxlm.config import Config
from jaxlm.files import read_json, write_json
from jaxlm.model.scale import size
from jaxlm.schema import from_dict

FORMAT = "jaxlm.record/1"
Status = Literal["finished", "diverged", "halved"]  # halved: ended early among its like
Role = Literal["fit", "replicate", "holdout", "single", "trunk"]


@dataclass(frozen=True)
class RunRecord:
    """One run. Losses in nats per token; times in seconds; FLOPs of training, counted exactly."""

    name: str
    fingerprint: str
    role: Role
    status: Status
    budget: float  # FLOPs asked for; `flops` is what whole steps made of it
    seed: int
    d_model: int
    n_layers: int
    n_heads: int
    seq_len: int
    vocab_size: int
    params: int
    params_non_embedding: int
    params_effective: float  # flops_per_token / 6
    flops_per_token: int
    tokens: int
    flops: float
    steps: int
    global_batch_size: int
    learning_rate: float
    train_loss: float | None
    loss: float | None  # of the last evaluation, held-out text
    eval_bpb: float | None  # bits per byte, the same
    data_fingerprint: str
    wall_time_s: float  # spent training and evaluating, over all sittings


def make(
    config: Config,
    fingerprint: str,
    status: Status,
    data_fingerprint: str,
    role: Role = "single",
    budget: float = 0.0,
    step: int | None = None,
    train_loss: float | None = None,
    loss: float | None = None,
    eval_bpb: float | None = None,
    wall_time_s: float = 0.0,
) -> RunRecord:
    counts = size(config.model)
    steps = config.train.steps if step is None else step
    tokens = steps * config.batch_tokens
    m = config.model
    return RunRecord(
        name=config.name,
        fingerprint=fingerprint,
        role=role,
        status=status,
        budget=budget or float(counts.flops_per_token * config.tokens),
        seed=config.seed,
        d_model=m.d_model,
        n_layers=m.n_layers,
        n_heads=m.n_heads,
        seq_len=m.seq_len,
        vocab_size=m.vocab_size,
        params=counts.params,
        params_non_embedding=counts.params_non_embedding,
        params_effective=counts.params_effective,
        flops_per_token=counts.flops_per_token,
        tokens=tokens,
        flops=float(counts.flops_per_token * tokens),
        steps=steps,
        global_batch_size=config.train.global_batch_size,
        learning_rate=config.optimizer.learning_rate,
        train_loss=train_loss,
        loss=loss,
        eval_bpb=eval_bpb,
        data_fingerprint=data_fingerprint,
        wall_time_s=wall_time_s,
    )


def write(folder: Path, record: RunRecord) -> None:
    write_json(folder / "record.json", {"format": FORMAT, **dataclasses.asdict(record)})


def read(folder: Path) -> RunRecord | None:
    """The record in a run's folder; None while there is none. Raises JaxlmError if damaged.

    Of several processes all call this, and get what the lead sees: on a network file system the
    others may see it later.
    """
    path = folder / "record.json"
    values = hosts.by_lead(lambda: read_json(path, "record") if path.exists() else None)
    if values is None:
        return None
    values.pop("format")
    return from_dict(RunRecord, values, str(path))
