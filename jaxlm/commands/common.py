"""What commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from jaxlm import experiment as experiments
from jaxlm.config import Sweep
from jaxlm.schema import UserError

Flags = dict[str, Any]


class Command(NamedTuple):
    """`run(flags, overrides)` gives the exit code; overrides are `--config.a.b=text` in order."""

    run: Callable[[Flags, list[tuple[str, str]]], int]
    define: Callable[[flags.FlagValues], None]  # its flags
    about: str


def experiment_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, "experiment file", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder or URL of the run", flag_values=values)
    flags.DEFINE_boolean("json", False, "the result as JSON on stdout", flag_values=values)


def experiment(values: Flags, overrides: list[tuple[str, str]], kind: type) -> Any:
    """The experiment that `--config` and its overrides name. Raises UserError unless a `kind`."""
    if not values["config"]:
        raise UserError("--config: expected an experiment file, as in --config=experiments/x.py")
    if not values["workdir"]:
        raise UserError("--workdir: expected a folder, as in --workdir=runs/x")
    found = experiments.load(values["config"], overrides)
    if not isinstance(found, kind):
        verb = "sweep" if isinstance(found, Sweep) else "train"
        raise UserError(
            f"--config: {values['config']} holds a {type(found).__name__}; use 'jaxlm {verb}'"
        )
    return found
