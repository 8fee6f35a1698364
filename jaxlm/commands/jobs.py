"""Jobs, here and on other machines: `jaxlm launch start|logs|status|stop --config=job.py`,
`jaxlm supervise -- train …`."""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

from jaxlm.commands.common import Command, Flags
from jaxlm.schema import UserError, hint

ACTIONS = ("start", "logs", "status", "stop")


def _flags_launch(values: flags.FlagValues) -> None:
    flags.DEFINE_string("source", "start", "", flag_values=values)
    flags.DEFINE_string("config", None, "job file, with get_job()", flag_values=values)
    flags.DEFINE_boolean("dry-run", False, "print the commands, run nothing", flag_values=values)
    flags.DEFINE_boolean("json", False, "with --dry-run: the commands as JSON", flag_values=values)


def _launch(values: Flags, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import launch, show

    action = values["source"]
    if action not in ACTIONS:
        raise UserError(f"jaxlm launch: no such action: {action!r}; {hint(action, ACTIONS)}")
    if not values["config"]:
        raise UserError("--config: expected a job file, as in --config=job.py")
    job = launch.load(values["config"], overrides)
    steps = launch.commands(job, action)
    if not values["dry-run"]:
        launch.run(steps, show.Lines(to_stderr=True).say)
    elif values["json"]:
        print(json.dumps([show.plain(step) for step in steps]))
    else:
        print(launch.shown(steps))
    return 0


def _flags_supervise(values: flags.FlagValues) -> None:
    flags.DEFINE_list("command", [], "after --", flag_values=values)
    flags.DEFINE_integer("processes", 1, "of the run, joined here", 1, flag_values=values)
    flags.DEFINE_float(
        "heartbeat", 10.0, "seconds without one that end a process", 2.0, flag_values=values
    )
    flags.DEFINE_string("log", "", "'': supervisor.jsonl in the workdir", flag_values=values)
    flags.DEFINE_boolean("status", False, "tell how it went, run nothing", flag_values=values)


def _supervise(values: Flags, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import show
    from jaxlm.launch import supervisor

    command = values["command"]
    log = Path(values["log"]) if values["log"] else supervisor.log_of(command)
    if values["status"]:
        print(supervisor.status(command, log))
        return 0
    say = show.Lines(to_stderr=True).say
    return supervisor.supervise(command, log, values["processes"], values["heartbeat"], say)


VERBS = {
    "launch": Command(_launch, _flags_launch, "a job on TPU VMs, GKE, Ray, Slurm or here"),
    "supervise": Command(
        _supervise, _flags_supervise, "a run that is started again until it is finished"
    ),
}
