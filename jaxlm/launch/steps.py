"""What is run to start, watch and stop a job: commands as data, shown or carried out."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxlm.schema import JaxlmError, UserError

POLL_S = 30.0


@dataclass(frozen=True)
class Do:
    """One command. `{name}` in an argument is what an earlier command, that has it as its `keep`,
    printed."""

    argv: tuple[str, ...]
    stdin: str = ""
    until: str = ""  # is asked again until it prints this, unless it prints FAILED
    keep: str = ""


def shown(steps: Sequence[Do]) -> str:
    """A shell script of the commands, exactly as `run` would run them."""
    kept = [step.keep for step in steps if step.keep]
    return "\n".join(["set -e", *(_shell(step, kept) for step in steps)])


def _shell(step: Do, kept: Sequence[str]) -> str:
    line = " ".join(_quoted(a, kept) for a in step.argv)
    if step.stdin:
        line += f" <<'END'\n{step.stdin.rstrip()}\nEND\n"
    if step.keep:
        return f"{step.keep}=$({line})"
    if step.until:
        state = f'state=$({line}); [ "$state" = {step.until} ]'
        return f'until {state}; do [ "$state" != FAILED ]; sleep {POLL_S:g}; done'
    return line


def _quoted(argument: str, kept: Sequence[str]) -> str:
    if any(f"{{{name}}}" in argument for name in kept):
        return '"' + _filled(argument, {name: f"${{{name}}}" for name in kept}) + '"'
    return shlex.quote(argument)


def _filled(argument: str, kept: Mapping[str, str]) -> str:
    for name, value in kept.items():
        argument = argument.replace(f"{{{name}}}", value)
    return argument


def run(steps: Sequence[Do], say: Callable[[str], None], poll_s: float = POLL_S) -> None:
    """One after the other. Raises JaxlmError with the exit code of one that fails."""
    kept: dict[str, str] = {}
    for step in steps:
        argv = [_filled(a, kept) for a in step.argv]
        say(shlex.join(argv))
        while True:
            printed = _one(argv, step)
            if not step.until or printed == step.until:
                break
            if printed == "FAILED":
                raise JaxlmError(f"{shlex.join(argv[:6])} … says FAILED")
            say(f"{printed or 'not there yet'}; asked again in {poll_s:g} s")
            time.sleep(poll_s)
        if step.keep:
            kept[step.keep] = printed


def _one(argv: list[str], step: Do) -> str:
    """What it printed, where that is of use; else it is left to the terminal."""
    read = bool(step.until or step.keep)
    try:
        done = subprocess.run(
            argv,
            input=step.stdin if step.stdin else None,
            stdout=subprocess.PIPE if read else None,
            text=True,
            env=dict(os.environ),
        )
    except FileNotFoundError:
        raise UserError(f"{argv[0]}: no such program on PATH; it is what starts this job") from None
    if done.returncode:
        error = JaxlmError(f"{shlex.join(argv[:6])} … failed with exit code {done.returncode}")
        error.exit_code = done.returncode if done.returncode > 0 else 128 - done.returncode
        raise error
    return done.stdout.strip() if read else ""
