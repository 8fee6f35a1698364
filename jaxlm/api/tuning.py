"""Fine-tuning: `finetune`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from jaxlm.api.places import Say, quiet, workdir_of
from jaxlm.api.runs import banner, checked_row, sending, started
from jaxlm.config import Config
from jaxlm.experiment import located
from jaxlm.train.record import RunRecord
from jaxlm.train.workdir import StopFlag


def finetune(
    config: Config,
    workdir: str | Path,
    *,
    say: Say = quiet,
    progress: Any = None,
    stop: Any = None,
) -> RunRecord:
    """Train a model on `config.tune.examples` in `workdir`, from wherever it is; the same call
    again goes on or does nothing. What is there then is a run like any other.

    Raises UserError; JaxlmError if the run diverged; Stopped after SIGTERM or Ctrl-C (all saved).
    """
    from jaxlm import hosts, tuning
    from jaxlm.tasks import watching
    from jaxlm.train.step import check_names
    from jaxlm.train.trackers import need

    hosts.need_one("jaxlm finetune")
    config = started(located(config))
    check_names(config)
    for tracker in config.train.track:
        need(tracker)
    with contextlib.ExitStack() as held:
        stop = held.enter_context(StopFlag(grace_s=None)) if stop is None else stop
        folder, mirror = held.enter_context(workdir_of(workdir))
        asked = watching.read(config)
        made = tuning.material(config)
        n, m = len(made.training.ids), len(made.held_out.ids)
        what = f", {len(made.labels)} classes" if made.labels else ""
        rows = f" in {len(made.training):,} rows" if len(made.training) != n else ""
        say(f"examples: {n:,} to learn from{rows}, {m:,} held out{what}")
        say(banner(made.config))
        begins = None if made.start is None else made.start.bos_id
        watch = watching.observers(asked, made.reads.tokenizer, made.labels, begins)
        row = tuning.tune(made, folder, stop, sending(mirror, progress), watch)
        return checked_row(row, folder)
