"""Checkpoints, ours and others': `jaxlm export|inspect`."""

from __future__ import annotations

import json

from absl import flags

from jaxlm.commands.common import Command, Flags
from jaxlm.schema import UserError


def _flags_export(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "a run, or a checkpoint to convert", flag_values=values)
    flags.DEFINE_string("out", None, "new folder for transformers to load", flag_values=values)
    flags.DEFINE_string("dtype", "float32", "or float16, bfloat16", flag_values=values)
    flags.DEFINE_boolean("verify", False, "read it back, compare logits", flag_values=values)
    flags.DEFINE_list("scores", [], "folders of evaluate --out, for the card", flag_values=values)
    flags.DEFINE_boolean("json", False, "the result as JSON on stdout", flag_values=values)


def _flags_inspect(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "a run, a checkpoint or a hub name", flag_values=values)
    flags.DEFINE_string("prompt", None, "the text to look at", flag_values=values)
    flags.DEFINE_string("out", "inspect.html", "the page", flag_values=values)


def _inspect(values: Flags, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import api

    if not values["workdir"] or not values["prompt"]:
        raise UserError("jaxlm inspect: expected --workdir=RUN and --prompt=TEXT")
    print(api.inspect(values["workdir"], values["prompt"], values["out"]))
    return 0


def _export(values: Flags, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import api

    if not values["workdir"] or not values["out"]:
        raise UserError("jaxlm export: expected --workdir=RUN and --out=DIR")
    if values["dtype"] not in ("float32", "float16", "bfloat16"):
        raise UserError(f"--dtype: expected float32, float16 or bfloat16, got {values['dtype']!r}")
    how = {n: values[n] for n in ("dtype", "verify", "scores")}
    found = api.export(values["workdir"], values["out"], **how)
    print(json.dumps(found) if values["json"] else f"{found['out']}: {found['family']}")
    for by, worst in found.get("verified", {}).items() if not values["json"] else ():
        print(
            f"  read by {by}: "
            + ("not installed" if worst is None else f"max |Δlogit| {worst:.2g}")
        )
    return 0


VERBS = {
    "export": Command(_export, _flags_export, "a run or checkpoint as a folder for transformers"),
    "inspect": Command(_inspect, _flags_inspect, "a page: where each head looks, what may follow"),
}
