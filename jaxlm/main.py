"""The command line: `jaxlm VERB …`, the same as `python -m jaxlm VERB …`. No logic lives here.

Exit codes: 0 done; 1 something failed; 2 a mistake in what was asked for; 128 + n after signal n.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from jaxlm import experiment as experiments
from jaxlm import main_data
from jaxlm.config import Config, Sweep
from jaxlm.schema import JaxlmError, UserError, describe, hint, parse_literal

Flags = dict[str, Any]
Verb = Callable[[Flags, list[tuple[str, str]]], int]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = run(arguments)
    except JaxlmError as e:
        print(f"jaxlm: {e}", file=sys.stderr)
        code = e.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 141
    sys.exit(code)


def run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        from jaxlm import __version__

        print(__version__)
        return 0
    if name not in VERBS:
        raise UserError(f"no such command: {name!r}; {hint(name, VERBS)}")
    verb, define, about = VERBS[name]
    values = flags.FlagValues()
    define(values)
    if any(a in ("-h", "--help") for a in rest):
        print(_help(name, about, values))
        return 0
    overrides = _parse(name, values, rest)
    return verb(values.flag_values_dict(), overrides)


def _parse(name: str, values: flags.FlagValues, rest: list[str]) -> list[tuple[str, str]]:
    """Sets `values`; returns the `--config.a.b=text` overrides in order."""
    overrides, plain = [], []
    i = 0
    while i < len(rest):
        argument = rest[i]
        if argument.startswith("--config."):
            dotted, equals, text = argument.removeprefix("--config.").partition("=")
            if not equals:
                i += 1
                if i == len(rest):
                    raise UserError(f"{argument}: expected a value, as in {argument}=…")
                text = rest[i]
            overrides.append((dotted, text))
        else:
            plain.append(argument)
        i += 1
    try:
        left = values([name, *plain])[1:]
    except flags.Error as e:
        raise UserError(str(e).splitlines()[0]) from e
    for positional in ("source", "other"):
        if positional in values and left:
            values[positional].value = left.pop(0)
    if left:
        raise UserError(f"jaxlm {name}: what is {left[0]!r}? expected --flag=value")
    if overrides and "config" not in values:
        raise UserError(f"jaxlm {name}: takes no --config.{overrides[0][0]}")
    return overrides


def _usage() -> str:
    rows = "\n".join(f"  {name:<11} {about}" for name, (_, _, about) in VERBS.items())
    return (
        f"usage: jaxlm COMMAND [--flag=value …]\n\n{rows}\n\njaxlm COMMAND --help lists its flags."
    )


def _help(name: str, about: str, values: flags.FlagValues) -> str:
    lines = [f"jaxlm {name}: {about}", ""]
    if "source" in values:
        lines[0] = f"jaxlm {name} {'A B' if 'other' in values else 'SOURCE'}: {about}"
    for flag in sorted(values):
        if flag not in ("source", "other"):
            lines.append(f"  --{flag}={values[flag].value!r}\n      {values[flag].help}")
    if "config" in values:
        kind = Sweep if name in ("sweep", "quickstart") else Config
        lines += ["", f"Every field of a {kind.__name__} (defaults before the experiment file):"]
        lines += [f"  {flag}={value}\n      {text}" for flag, value, text in describe(kind)]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ flags


def _flags_experiment(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "experiment file", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder or URL of the run", flag_values=values)
    flags.DEFINE_boolean("json", False, "the result as JSON on stdout", flag_values=values)


def _flags_train(values: flags.FlagValues) -> None:
    _flags_experiment(values)
    flags.DEFINE_list("track", None, "tensorboard, wandb, trackio", flag_values=values)
    flags.DEFINE_string("profile", None, "START:STOP: trace these steps", flag_values=values)


def _flags_sweep(values: flags.FlagValues) -> None:
    _flags_experiment(values)
    flags.DEFINE_boolean("dry-run", False, "lint and cost, nothing is run", flag_values=values)


def _flags_quickstart(values: flags.FlagValues) -> None:
    _flags_sweep(values)
    beside = Path(__file__).resolve().parents[1] / "experiments" / "quickstart.py"
    values["config"].value = str(beside)  # of the clone that is installed, wherever one stands
    values["workdir"].value = "runs/quickstart"


def _flags_generate(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "text to continue; repeatable", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 64, "tokens at most", 1, flag_values=values)
    flags.DEFINE_float("temperature", 0.8, "0: greedy", 0.0, flag_values=values)
    flags.DEFINE_integer("top_k", 0, "0: all", 0, flag_values=values)
    flags.DEFINE_float("top_p", 1.0, "nucleus", 0.0, 1.0, flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the sampling", flag_values=values)
    flags.DEFINE_boolean("json", False, "the result as JSON on stdout", flag_values=values)


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


def _flags_export(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "a run, or a checkpoint to convert", flag_values=values)
    flags.DEFINE_string("out", None, "new folder for transformers to load", flag_values=values)
    flags.DEFINE_string("dtype", "float32", "or float16, bfloat16", flag_values=values)
    flags.DEFINE_boolean("verify", False, "read it back, compare logits", flag_values=values)
    flags.DEFINE_boolean("json", False, "the result as JSON on stdout", flag_values=values)


def _flags_coordcheck(values: flags.FlagValues) -> None:
    _flags_experiment(values)
    widths, depths = ["32", "64", "128", "256", "512", "1024"], ["2", "4", "8", "16", "32"]
    flags.DEFINE_list("widths", widths, "d_model, at the experiment's depth", flag_values=values)
    flags.DEFINE_list("depths", depths, "n_layers, at its width", flag_values=values)
    flags.DEFINE_integer("steps", 5, "of training before the sizes are read", 1, flag_values=values)


def _flags_inspect(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "a run, a checkpoint or a hub name", flag_values=values)
    flags.DEFINE_string("prompt", None, "the text to look at", flag_values=values)
    flags.DEFINE_string("out", "inspect.html", "the page", flag_values=values)


def _flags_workdir(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "folder of the sweep or run", flag_values=values)


def _flags_doctor(values: flags.FlagValues) -> None:
    flags.DEFINE_boolean("json", False, "the result as JSON on stdout", flag_values=values)


# ------------------------------------------------------------------------------------------ verbs


def _experiment(values: Flags, overrides: list[tuple[str, str]], kind: type) -> Any:
    if not values["config"]:
        raise UserError("--config: expected an experiment file, as in --config=experiments/x.py")
    if not values["workdir"]:
        raise UserError("--workdir: expected a folder, as in --workdir=runs/x")
    experiment = experiments.load(values["config"], overrides)
    if not isinstance(experiment, kind):
        verb = "sweep" if isinstance(experiment, Sweep) else "train"
        raise UserError(
            f"--config: {values['config']} holds a {type(experiment).__name__}; use 'jaxlm {verb}'"
        )
    return experiment


def _train(values: Flags, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import show

    if values["track"] is not None:
        overrides.append(("train.track", repr(tuple(values["track"]))))
    if values["profile"] is not None:
        overrides.append(("train.profile", values["profile"]))
    config = _experiment(values, overrides, Config)
    from jaxlm import api
    from jaxlm.train.workdir import StopFlag

    out = show.Lines(to_stderr=values["json"])
    with StopFlag() as stop:
        row = api.train(
            config,
            values["workdir"],
            say=out.say,
            progress=out.row,
            data_progress=out.data,
            stop=stop,
        )
    out.record(row)
    if values["json"]:
        print(json.dumps(show.plain(row)))
    return 0


def _sweep(values: Flags, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import show

    sweep = _experiment(values, overrides, Sweep)
    from jaxlm import api
    from jaxlm.train.workdir import StopFlag

    out = show.Lines(to_stderr=values["json"])
    if values["dry-run"]:
        plan = api.plan(sweep, values["workdir"], say=out.say, data_progress=out.data)
        print(json.dumps(show.plain(plan))) if values["json"] else out.plan(plan)
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
    texts = api.generate(
        values["workdir"],
        prompts,
        **{n: values[n] for n in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")},
    )
    rows = [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]
    for row in rows:
        print(json.dumps(row) if values["json"] else row["prompt"] + row["text"])
    return 0


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
    config = _experiment(values, overrides, Config)
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


def _report(values: Flags, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import api

    if not values["workdir"]:
        raise UserError("--workdir: expected the folder of a sweep or a run")
    print(api.report(values["workdir"]))
    return 0


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
    how = {n: values[n] for n in ("dtype", "verify")}
    found = api.export(values["workdir"], values["out"], **how)
    print(json.dumps(found) if values["json"] else f"{found['out']}: {found['family']}")
    for by, worst in found.get("verified", {}).items() if not values["json"] else ():
        print(
            f"  read by {by}: "
            + ("not installed" if worst is None else f"max |Δlogit| {worst:.2g}")
        )
    return 0


def _doctor(values: Flags, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import doctor

    found = doctor.examine()
    print(json.dumps(found) if values["json"] else doctor.text(found))
    return 0 if not found["problems"] else 1


VERBS: dict[str, tuple[Verb, Callable[[flags.FlagValues], None], str]] = {
    "quickstart": (_sweep, _flags_quickstart, "a scaling law measured on this machine, in minutes"),
    "train": (_train, _flags_train, "one run from an experiment file"),
    "sweep": (_sweep, _flags_sweep, "a ladder of runs, its fit, prediction and report"),
    "data": (main_data.data, main_data.define, "build, report, inspect, tokenizer: text to shards"),
    "generate": (_generate, _flags_generate, "text from a trained run"),
    "inspect": (_inspect, _flags_inspect, "a page: where each head looks, what may follow"),
    "export": (_export, _flags_export, "a run or checkpoint as a folder for transformers"),
    "fit": (_fit, _flags_fit, "scaling laws from a folder of runs or a CSV"),
    "compare": (_compare, _flags_compare, "did a change help? paired seeds, as few as decide it"),
    "coordcheck": (
        _coordcheck,
        _flags_coordcheck,
        "do activations keep their size as models grow?",
    ),
    "report": (_report, _flags_workdir, "(re)write a sweep's or run's page"),
    "doctor": (_doctor, _flags_doctor, "devices, versions, threads, disk, what is missing"),
}
