"""Models to talk to: `jaxlm serve|chat`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from absl import flags

from jaxlm.commands.common import Command, Flags, sampling, sampling_flags
from jaxlm.schema import UserError


def _flags_serve(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string(
        "model", [], "NAME=PATH of a run, a folder of others' or a .gguf; repeatable",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("host", "127.0.0.1", "address; others want a token", flag_values=values)
    flags.DEFINE_integer("port", 8000, "0: any free one", 0, 65535, flag_values=values)
    flags.DEFINE_string("token", None, "of clients; else JAXLM_TOKEN", flag_values=values)
    flags.DEFINE_multi_string("name", [], "a host name it is asked under", flag_values=values)
    flags.DEFINE_integer("rows", 8, "requests answered at a time", 1, flag_values=values)
    flags.DEFINE_integer("context", None, "tokens of prompt and answer", 1, flag_values=values)
    flags.DEFINE_integer("queue", 64, "requests that may wait", 0, flag_values=values)
    flags.DEFINE_float("grace", 30.0, "seconds to finish in after SIGTERM", 0, flag_values=values)
    _flags_documents(values)


def _flags_documents(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "documents", None, "folder of .md and .txt that answers come from", flag_values=values
    )
    flags.DEFINE_string(
        "embedder", None, "the model that finds what is near in them", flag_values=values
    )


def _flags_chat(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "model", None, "a run, a folder of others' or a .gguf; or NAME=PATH", flag_values=values
    )
    flags.DEFINE_string("system", "", "the system prompt", flag_values=values)
    flags.DEFINE_integer("context", None, "tokens of prompt and answer", 1, flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 256, "of an answer", 1, flag_values=values)
    sampling_flags(values, seed="another each time unless given")
    flags.DEFINE_boolean("json", False, "answers as rows of JSON", flag_values=values)
    _flags_documents(values)


def _named(given: list[str]) -> dict[str, str]:
    """Sources by name; without one it is the last part of the path. Raises UserError."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, source = text.partition("=")
        if not equals:
            name, source = Path(text).name, text
        if not name or not source or name in found:
            raise UserError(f"--model: expected NAME=PATH, each name once, got {text!r}")
        found[name] = source
    return found


def _serve(values: Flags, overrides: list[tuple[str, str]]) -> int:
    models = _named(values["model"])
    from jaxlm import api

    same = ("host", "port", "rows", "context", "queue", "documents", "embedder")
    return api.serve(
        models,
        token=os.environ.get("JAXLM_TOKEN", "") if values["token"] is None else values["token"],
        names=values["name"],
        grace_s=values["grace"],
        say=lambda line: print(line, flush=True),
        **{name: values[name] for name in same},
    )


def _chat(values: Flags, overrides: list[tuple[str, str]]) -> int:
    if not values["model"]:
        raise UserError("--model: expected a run or a model, as in --model=runs/mine")
    [(name, source)] = _named([values["model"]]).items()
    from jaxlm import api

    same = ("system", "context", "max_new_tokens", "stop", "documents", "embedder")
    api.chat(
        source,
        name,
        rows=values["json"],
        say=lambda line: print(line, file=sys.stderr, flush=True),
        **{name: values[name] for name in same},
        **sampling(values),
    )
    return 0


VERBS = {
    "chat": Command(_chat, _flags_chat, "a conversation with a model in this terminal"),
    "serve": Command(_serve, _flags_serve, "models over HTTP, with OpenAI's interface"),
}
