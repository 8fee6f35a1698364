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


def sampling_flags(values: flags.FlagValues, seed: str) -> None:
    """What the next token is drawn from, and what ends a text; `seed` tells what it is else."""
    flags.DEFINE_float("temperature", None, "0: greedy; 0.8 unless given", 0.0, flag_values=values)
    flags.DEFINE_integer("top_k", None, "0: all", 0, flag_values=values)
    flags.DEFINE_float("top_p", None, "nucleus", 0.0, 1.0, flag_values=values)
    flags.DEFINE_float("min_p", None, "least share of the best's", 0.0, 1.0, flag_values=values)
    flags.DEFINE_float("typical_p", None, "typical sampling", 0.0, 1.0, flag_values=values)
    flags.DEFINE_float("repetition_penalty", None, "1: none", 0.0, flag_values=values)
    flags.DEFINE_float("frequency_penalty", None, "0: none", flag_values=values)
    flags.DEFINE_float("presence_penalty", None, "0: none", flag_values=values)
    flags.DEFINE_multi_string(
        "logit_bias", [], "ID=NUMBER: added to a token's logit; repeatable", flag_values=values
    )
    flags.DEFINE_integer("seed", None, f"of the sampling; {seed}", flag_values=values)
    flags.DEFINE_multi_string("stop", [], "text to end before; repeatable", flag_values=values)


def sampling(values: Flags) -> dict[str, Any]:
    """Fields of `Sampling` that were given. Raises UserError."""
    given = (
        *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"),
        *("frequency_penalty", "presence_penalty", "seed"),
    )
    how = {n: values[n] for n in given if values[n] is not None}
    if values["logit_bias"]:
        how["logit_bias"] = tuple(map(_bias, values["logit_bias"]))
    return how


def _bias(text: str) -> tuple[int, float]:
    token, _, more = text.partition("=")
    try:
        return int(token), float(more)
    except ValueError:
        raise UserError(f"--logit_bias: expected ID=NUMBER, got {text!r}") from None
