"""The science of a sweep: `jaxlm fit|compare|coordcheck`."""

from __future__ import annotations

import json
from typing import Any

from absl import flags

from jaxlm.commands.common import Command, Flags, experiment, experiment_flags
from jaxlm.config import Config
from jaxlm.schema import UserError, parse_literal


def _flags_fit(values: flags.FlagValues) -> None:
    flags.DEFINE_string("source", None, "folder of runs or CSV", flag_values=values)
    flags.DEFINE_list("columns", [], "params=…,flops=…,loss=… (or tokens=…)", flag_values=values)
    flags.DEFINE_integer("drop-largest-loss", 0, "points left out", 0, flag_values=values)
    flags.DEFINE_list("approach", ["1", "2", "3"], "which fits", flag_values=values)
    flags.DEFINE_string("minimum", "parabola", "approach 2: or akima", flag_values=values)
    flags.DEFINE_float("huber-delta", 1e-3, "of approach 3's loss", 0.0, flag_values=values)
    flags.DEFINE_integer("bootstrap", 4000, "resamples", 0, flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the resamples", flag_values=values)
    flags.DEFINE_float("for-compute", None, "FLOPs to predict for", flag_values=values)
    flags.DEFINE_list("law", [], "laws by name, instead of the approaches", flag_values=values)
    flags.DEFINE_list("where", [], "rows kept: column=value, column<1e9", flag_values=values)
    flags.DEFINE_list("holdout", [], "law: rows predicted, never fitted", flag_values=values)
    flags.DEFINE_string("count", None, "N: all, non_embedding, effective", flag_values=values)
    flags.DEFINE_string("flops", "exact", "C: exact or 6nd", flag_values=values)
    flags.DEFINE_list("fix", [], "law: parameters given, E=0,alpha=0.35", flag_values=values)
    flags.DEFINE_list("at", [], "law: a point to predict, tokens=1e12", flag_values=values)
    flags.DEFINE_string("config-out", None, "law: file to train the optimum", flag_values=values)
    flags.DEFINE_string("base", None, "experiment that --config-out scales", flag_values=values)
    flags.DEFINE_integer("starts", 300, "law: of the search", 1, flag_values=values)
    flags.DEFINE_string("resample", "runs", "law: runs or residuals", flag_values=values)
    flags.DEFINE_string("residual", None, "law: of the log or the value", flag_values=values)
    flags.DEFINE_string("out", None, "folder for the plots", flag_values=values)
    flags.DEFINE_boolean("json", False, "the result as JSON on stdout", flag_values=values)


def _flags_compare(values: flags.FlagValues) -> None:
    flags.DEFINE_string("source", None, "A: folder of runs or experiment file", flag_values=values)
    flags.DEFINE_string("other", None, "B, the same", flag_values=values)
    flags.DEFINE_string("workdir", None, "where A and B are run", flag_values=values)
    flags.DEFINE_integer("most", 12, "seeds at most", 4, flag_values=values)
    flags.DEFINE_float("smallest", None, "gain worth finding, 0.01 = 1 %", flag_values=values)
    flags.DEFINE_boolean("json", False, "the result as JSON on stdout", flag_values=values)


def _flags_coordcheck(values: flags.FlagValues) -> None:
    experiment_flags(values)
    widths, depths = ["32", "64", "128", "256", "512", "1024"], ["2", "4", "8", "16", "32"]
    flags.DEFINE_list("widths", widths, "d_model, at the experiment's depth", flag_values=values)
    flags.DEFINE_list("depths", depths, "n_layers, at its width", flag_values=values)
    flags.DEFINE_integer("steps", 5, "of training before the sizes are read", 1, flag_values=values)


def _fit(values: Flags, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import api, show

    if not values["source"]:
        raise UserError("jaxlm fit: expected SOURCE, a folder of runs or a CSV")
    out = show.Lines(to_stderr=values["json"])
    table = {name: values[name] for name in ("where", "count", "flops")}
    table["columns"] = dict(_pairs("columns", values["columns"]))
    how = {
        "huber_delta": values["huber-delta"],
        "bootstrap": values["bootstrap"],
        "seed": values["seed"],
        "for_compute": values["for-compute"],
    }
    if values["law"]:
        return _fit_laws(values, table | how, out)
    found = api.fit(
        values["source"],
        approaches=tuple(parse_literal(a, int, "--approach") for a in values["approach"]),
        drop_largest_loss=values["drop-largest-loss"],
        minimum=values["minimum"],
        **table,
        **how,
    )
    if values["out"]:
        for path in api.plot_fit(found, values["out"]):
            out.say(f"plot: {path}")
    print(json.dumps(found)) if values["json"] else out.fit(found)
    return 0


def _fit_laws(values: Flags, options: dict[str, Any], out: Any) -> int:
    from jaxlm import api

    numbers: dict[str, Any] = {
        name: {k: parse_literal(v, float, f"--{flag}.{k}") for k, v in _pairs(flag, values[flag])}
        for name, flag in (("fixed", "fix"), ("at", "at"))
    }
    plain = ("holdout", "starts", "resample", "residual")
    found = api.fit_laws(
        values["source"],
        values["law"],
        drop_largest=values["drop-largest-loss"],
        base=values["base"],
        config_out=values["config-out"],
        **options,
        **numbers,
        **{n: values[n] for n in plain},
    )
    if values["out"]:
        for path in api.plot_laws(found, values["out"]):
            out.say(f"plot: {path}")
    print(json.dumps(found)) if values["json"] else out.laws(found)
    return 0


def _pairs(flag: str, items: list[str]) -> list[tuple[str, str]]:
    """name=value of a list flag. Raises UserError."""
    found = []
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--{flag}: expected name=value, got {item!r}")
        found.append((name, value))
    return found


def _compare(values: Flags, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import api, show

    if not values["source"] or not values["other"]:
        raise UserError("jaxlm compare: expected A and B, two folders of runs or experiment files")
    out = show.Lines(to_stderr=values["json"])
    found = api.compare(
        values["source"],
        values["other"],
        values["workdir"],
        say=out.say,
        progress=out.board,
        data_progress=out.data,
        most=values["most"],
        smallest=values["smallest"],
    )
    print(json.dumps(found)) if values["json"] else out.compare(found)
    return 0


def _coordcheck(values: Flags, overrides: list[tuple[str, str]]) -> int:
    config = experiment(values, overrides, Config)
    from jaxlm import api, show

    out = show.Lines(to_stderr=values["json"])
    widths, depths = (
        [parse_literal(v, int, f"--{name}") for v in values[name]] for name in ("widths", "depths")
    )
    found = api.coordcheck(
        config, values["workdir"], widths=widths, depths=depths, steps=values["steps"], say=out.say,
        data_progress=out.data,
    )  # fmt: skip
    print(json.dumps(found)) if values["json"] else out.coordcheck(found)
    return 0


VERBS = {
    "fit": Command(_fit, _flags_fit, "scaling laws from a folder of runs or a CSV"),
    "compare": Command(
        _compare, _flags_compare, "did a change help? as few paired seeds as decide it"
    ),
    "coordcheck": Command(
        _coordcheck, _flags_coordcheck, "do activations keep their size in wider models?"
    ),
}
