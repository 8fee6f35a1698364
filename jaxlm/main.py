"""The command line: `jaxlm VERB …`, the same as `python -m jaxlm VERB …`. No logic lives here.

Exit codes: 0 done; 1 something failed; 2 a mistake in what was asked for; 75 a run that hung;
76 another process of the run is gone; 128 + n after signal n.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags

from jaxlm.commands import data, evaluation, jobs, laws, machine, plans, runs, serving, weights
from jaxlm.config import Config, Sweep
from jaxlm.schema import JaxlmError, UserError, describe, hint
from jaxlm.train.pulse import start_heartbeat

_GROUPS = (runs, plans, data, weights, serving, evaluation, laws, jobs, machine)
VERBS = {name: command for group in _GROUPS for name, command in group.VERBS.items()}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    start_heartbeat()
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
    command = VERBS[name]
    values = flags.FlagValues()
    command.define(values)
    if "command" in values and "--" in rest:
        cut = rest.index("--")
        rest, values["command"].value = rest[:cut], rest[cut + 1 :]
    if any(a in ("-h", "--help") for a in rest):
        print(_help(name, command.about, values))
        return 0
    overrides = _parse(name, values, rest)
    return command.run(values.flag_values_dict(), overrides)


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
    if "command" in values:
        lines[0] = f"jaxlm {name} -- COMMAND: {about}"
    for flag in sorted(values):
        if flag not in ("source", "other", "command"):
            lines.append(f"  --{flag}={values[flag].value!r}\n      {values[flag].help}")
    if "config" in values:
        kind = Sweep if name in ("sweep", "quickstart") else Config
        lines += ["", f"Every field of a {kind.__name__} (defaults before the experiment file):"]
        lines += [f"  {flag}={value}\n      {text}" for flag, value, text in describe(kind)]
    return "\n".join(lines)
