"""Runs and sweeps: `jaxlm quickstart|train|sweep|generate|report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from absl import flags

from jaxlm.commands.common import (
    Command,
    Flags,
    experiment,
    experiment_flags,
    sampling,
    sampling_flags,
)
from jaxlm.config import Config, Sweep
from jaxlm.schema import UserError


def _flags_train(values: flags.FlagValues) -> None:
    experiment_flags(values)
    flags.DEFINE_list("track", None, "tensorboard, wandb, trackio", flag_values=values)
    flags.DEFINE_boolean(
        "distributed", False, "one of several processes that find each other", flag_values=values
    )
    flags.DEFINE_string("profile", None, "START:STOP: trace these steps", flag_values=values)


def _flags_sweep(values: flags.FlagValues) -> None:
    experiment_flags(values)
    flags.DEFINE_boolean("dry-run", False, "lint and cost, nothing is run", flag_values=values)
    flags.DEFINE_string("index", "", "i/n: this share of the members only", flag_values=values)


def _flags_quickstart(values: flags.FlagValues) -> None:
    _flags_sweep(values)
    beside = Path(__file__).resolve().parents[2] / "experiments" / "quickstart.py"
    values["config"].value = str(beside)  # of the clone that is installed, wherever one stands
    values["workdir"].value = "runs/quickstart"


def _flags_generate(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "text to continue; repeatable", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 64, "tokens at most", 1, flag_values=values)
    sampling_flags(values, seed="0 unless given")
    flags.DEFINE_integer("num_beams", 1, "2 or more: beam search", 1, flag_values=values)
    flags.DEFINE_float("length_penalty", None, "of beams; 1 unless given", flag_values=values)
    flags.DEFINE_string("draft", None, "a small model that proposes tokens", flag_values=values)
    flags.DEFINE_string("regex", None, "what the answer must match", flag_values=values)
    flags.DEFINE_string("json_schema", None, "JSON that it must fit", flag_values=values)
    flags.DEFINE_string("weights", "float32", "or int8, int4: in so many bits", flag_values=values)
    flags.DEFINE_boolean("json", False, "the result as JSON on stdout", flag_values=values)


def _flags_workdir(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "folder of the sweep or run", flag_values=values)


def _train(values: Flags, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import show

    if values["track"] is not None:
        overrides.append(("train.track", repr(tuple(values["track"]))))
    if values["profile"] is not None:
        overrides.append(("train.profile", values["profile"]))
    config = experiment(values, overrides, Config)
    from jaxlm import api, hosts
    from jaxlm.train.workdir import StopFlag

    with StopFlag() as stop, hosts.joined(values["distributed"]):
        out = show.Lines(to_stderr=values["json"], quiet=not hosts.is_lead())
        row = api.train(
            config,
            values["workdir"],
            say=out.say,
            progress=out.row,
            data_progress=out.data,
            stop=stop,
        )
    out.record(row)
    if values["json"] and hosts.is_lead():
        print(json.dumps(show.plain(row)))
    return 0


def _finetune(values: Flags, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import show

    config = experiment(values, overrides, Config)
    from jaxlm import api, hosts
    from jaxlm.train.workdir import StopFlag

    out = show.Lines(to_stderr=values["json"])
    with StopFlag() as stop, hosts.joined():
        row = api.finetune(config, values["workdir"], say=out.say, progress=out.row, stop=stop)
    out.record(row)
    if values["json"]:
        print(json.dumps(show.plain(row)))
    return 0


def _sweep(values: Flags, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import show

    sweep = experiment(values, overrides, Sweep)
    from jaxlm import api
    from jaxlm.train.workdir import StopFlag

    out = show.Lines(to_stderr=values["json"])
    if values["dry-run"]:
        found = api.lint(sweep, values["workdir"], say=out.say, data_progress=out.data)
        print(json.dumps(show.plain(found))) if values["json"] else out.lint(found)
        return 0
    if values["index"]:
        i, slash, n = values["index"].partition("/")
        if not (slash and i.isdigit() and n.isdigit()):
            raise UserError(f"--index: expected i/n, as in 0/8, got {values['index']!r}")
        with StopFlag() as stop:
            api.sweep_share(
                sweep, values["workdir"], (int(i), int(n)), say=out.say, progress=out.board,
                stop=stop,
            )  # fmt: skip
        return 0
    with StopFlag() as stop:
        page = api.sweep(
            sweep,
            values["workdir"],
            say=out.say,
            progress=out.board,
            data_progress=out.data,
            stop=stop,
        )
    out.say(f"report: {page}")
    if values["json"]:
        print(json.dumps(api.summary(page.parent)))
    return 0


def _generate(values: Flags, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import api

    if not values["workdir"]:
        raise UserError("--workdir: expected the folder of a run")
    prompts = values["prompt"]
    if not prompts:
        raise UserError("--prompt: expected a text to continue, as in --prompt='The '")
    how: dict[str, Any] = {n: values[n] for n in ("max_new_tokens", "stop", "num_beams", "weights")}
    given = ("length_penalty", "draft", "regex", "json_schema")
    how |= sampling(values) | {n: values[n] for n in given if values[n] is not None}
    if values["length_penalty"] is not None and values["num_beams"] == 1:
        raise UserError("--length_penalty: expected --num_beams=2 or more beside it")
    texts = api.generate(values["workdir"], prompts, **how)
    rows = [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]
    for row in rows:
        print(json.dumps(row) if values["json"] else row["prompt"] + row["text"])
    return 0


def _report(values: Flags, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import api

    if not values["workdir"]:
        raise UserError("--workdir: expected the folder of a sweep or a run")
    print(api.report(values["workdir"]))
    return 0


VERBS = {
    "quickstart": Command(_sweep, _flags_quickstart, "a scaling law measured here, in minutes"),
    "train": Command(_train, _flags_train, "one run from an experiment file"),
    "finetune": Command(_finetune, experiment_flags, "a model fitted to labelled examples"),
    "sweep": Command(_sweep, _flags_sweep, "a ladder of runs, its fit, prediction and report"),
    "generate": Command(_generate, _flags_generate, "text from a trained run"),
    "report": Command(_report, _flags_workdir, "(re)write a sweep's or run's page"),
}
