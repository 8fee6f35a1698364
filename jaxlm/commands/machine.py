"""What this machine is: `jaxlm doctor`."""

from __future__ import annotations

import json

from absl import flags

from jaxlm.commands.common import Command, Flags


def _flags_doctor(values: flags.FlagValues) -> None:
    flags.DEFINE_boolean("json", False, "the result as JSON on stdout", flag_values=values)


def _doctor(values: Flags, overrides: list[tuple[str, str]]) -> int:
    from jaxlm import doctor

    found = doctor.examine()
    print(json.dumps(found) if values["json"] else doctor.text(found))
    return 0 if not found["problems"] else 1


VERBS = {
    "doctor": Command(_doctor, _flags_doctor, "devices, versions, threads, disk, what is missing"),
}
