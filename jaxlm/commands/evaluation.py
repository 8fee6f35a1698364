"""How good a model is: `jaxlm evaluate|judge`."""

from __future__ import annotations

import json

from absl import flags

from jaxlm.commands.common import Command, Flags
from jaxlm.schema import UserError


def _flags_evaluate(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "a run, a checkpoint or a hub name", flag_values=values)
    flags.DEFINE_multi_string(
        "task", [], "NAME=PATH, or NAME=hub to fetch; repeatable; NAME may be a file.py",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list("lm-eval", [], "tasks of lm-eval by name", flag_values=values)
    flags.DEFINE_string("include", None, "lm-eval: folder of YAML tasks", flag_values=values)
    flags.DEFINE_string("against", None, "a second model on the same items", flag_values=values)
    flags.DEFINE_integer("limit", 0, "items of each task; 0: all", 0, flag_values=values)
    flags.DEFINE_boolean("run-code", False, "run programs that a model writes", flag_values=values)
    flags.DEFINE_integer(
        "shots", 0, "items that stand answered before each of the others", 0, flag_values=values
    )
    flags.DEFINE_boolean("leaks", False, "look for items in the training text", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the resamples, and of shots", flag_values=values)
    flags.DEFINE_string("out", None, "new folder for scores and answers", flag_values=values)
    flags.DEFINE_boolean("list", False, "the tasks that come with jaxlm", flag_values=values)
    flags.DEFINE_boolean("json", False, "one JSON row a line", flag_values=values)


def _evaluate(values: Flags, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import show

    out = show.Lines(to_stderr=values["json"])
    if values["list"]:
        from jaxlm.tasks.shipped import SHIPPED

        out.tasks(SHIPPED.values())
        return 0
    from jaxlm import api

    if not values["workdir"]:
        raise UserError("--workdir: expected a run, a checkpoint or a hub name")
    if values["lm-eval"] and (values["task"] or values["against"] or values["out"]):
        raise UserError("--lm-eval: stands without --task, --against and --out")
    if values["lm-eval"]:
        found = api.lm_eval(
            values["workdir"], values["lm-eval"], include=values["include"], limit=values["limit"]
        )
    else:
        how = {n: values[n] for n in ("against", "limit", "shots", "leaks", "seed", "out")}
        how["run_code"] = values["run-code"]
        found = api.evaluate(values["workdir"], values["task"], say=out.say, **how)
    if values["json"]:
        for row in found["rows"]:
            print(json.dumps(row, ensure_ascii=False))
    else:
        out.scores(found)
    return 0


def _flags_judge(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string(
        "answers", [], "NAME=FILE of a model's answers (evaluate --out)", flag_values=values
    )
    flags.DEFINE_string("workdir", None, "folder of the votes", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of order and sides", flag_values=values)
    flags.DEFINE_integer("port", 0, "0: any that is free", 0, 65535, flag_values=values)
    flags.DEFINE_boolean("json", False, "the result as JSON on stdout", flag_values=values)


def _judge(values: Flags, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import api, show

    out = show.Lines(to_stderr=values["json"])
    if not values["workdir"]:
        raise UserError("--workdir: expected a folder for the votes")
    answers = dict(text.partition("=")[::2] for text in values["answers"])
    found = api.judge(
        answers, values["workdir"], seed=values["seed"], port=values["port"], say=out.say
    )
    print(json.dumps(found)) if values["json"] else out.judged(found)
    return 0


VERBS = {
    "evaluate": Command(_evaluate, _flags_evaluate, "scores of a model, with intervals"),
    "judge": Command(_judge, _flags_judge, "a page where people compare answers, blind"),
}
