"""Before anything is spent: `jaxlm plan`."""

from __future__ import annotations

import json

from absl import flags

from jaxlm import experiment as experiments
from jaxlm.commands.common import Command, Flags, experiment_flags
from jaxlm.schema import UserError


def _flags_plan(values: flags.FlagValues) -> None:
    experiment_flags(values)
    flags.DEFINE_string("topology", "", "'v5p:8x8x16', 'h100:8'; '': this machine", values)
    flags.DEFINE_integer("slices", 1, "slices (or nodes) of the topology", 1, flag_values=values)
    flags.DEFINE_float("mfu", 0.4, "share of the chips' peak that is reached", flag_values=values)
    flags.DEFINE_boolean("search", False, "rank meshes, remat, micro-batches", flag_values=values)
    flags.DEFINE_float("price", None, "USD per chip and hour", flag_values=values)
    flags.DEFINE_string("prices", "", "a list of prices (docs/pods.md) for it", flag_values=values)


def _plan(values: Flags, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import api, show

    if not values["config"]:
        raise UserError("--config: expected an experiment file, as in --config=experiments/x.py")
    experiment = experiments.load(values["config"], overrides)
    out = show.Lines(to_stderr=values["json"])
    found = api.plan(
        experiment,
        values["workdir"] or "",
        **{n: values[n] for n in ("topology", "slices", "mfu", "price", "prices", "search")},
        say=out.say,
        data_progress=out.data,
    )
    print(json.dumps(found)) if values["json"] else out.plan(found)
    return 0 if all(step["fits"] for step in found["steps"]) else 1


VERBS = {
    "plan": Command(_plan, _flags_plan, "memory, time and price, before anything is spent"),
}
