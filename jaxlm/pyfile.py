"""Python files as modules: experiments, and the parts of their own that they bring.

A module is made from the bytes that were read, so what runs is what a fingerprint was taken of,
and nothing (no `__pycache__`) is left beside the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlm.schema import JaxlmError, UserError, hint

_used: dict[Path, str] = {}  # file → name of the module that `resolve` took from it


def resolve(reference: str, where: str) -> Any:
    """The object named by 'file.py:name' or 'package.module:name'. Raises UserError.

    A file that was changed since it was first used here is refused: programs that were compiled
    with the old text would go on under the new text's fingerprint.
    """
    target, _, name = reference.rpartition(":")
    if not target:
        raise UserError(f"{where}: expected 'file.py:name' or 'module:name', got {reference!r}")
    if target.endswith(".py"):
        module = load(Path(target), where)
        if _used.setdefault(Path(target).resolve(), module.__name__) != module.__name__:
            raise UserError(f"{where}: {target} has changed while in use; start Python anew")
    else:
        module = _import(target, where)
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise UserError(f"{where}: {target} has no {name!r}; {hint(name, public)}")
    return getattr(module, name)


def _import(name: str, where: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"{where}: cannot import {name!r}: {e}") from e


def load(path: Path, where: str) -> types.ModuleType:
    """The file as a module, executed once per text. Raises UserError naming the line."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{where}: no such file: {path}") from None
    except OSError as e:
        raise UserError(f"{where}: cannot read {path}: {e.strerror}") from None
    name = f"jaxlm_file_{_short(str(path.resolve()).encode())}_{_short(text)}"
    if name in sys.modules:
        return sys.modules[name]
    module = types.ModuleType(name)
    module.__file__ = str(path.absolute())
    sys.modules[name] = module  # dataclasses look for their module there
    try:
        with told_by_line(module, where):
            exec(compile(text, module.__file__, "exec", dont_inherit=True), vars(module))
    except JaxlmError:
        del sys.modules[name]
        raise
    return module


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


@contextlib.contextmanager
def told_by_line(module: types.ModuleType, where: str) -> Iterator[None]:
    """An error in the module's code is told as path:line, a misspelt field with its nearest."""
    try:
        yield
    except JaxlmError:
        raise
    except Exception as e:
        line, trace = getattr(e, "lineno", None), e.__traceback__
        while trace:
            if trace.tb_frame.f_code.co_filename == module.__file__:
                line = trace.tb_lineno
            trace = trace.tb_next
        text = str(e).partition("\n")[0]
        misspelt = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
        if misspelt and dataclasses.is_dataclass(cls := vars(module).get(misspelt[1])):
            names = [f.name for f in dataclasses.fields(cls)]
            text = f"{misspelt[1]} has no field {misspelt[2]!r}; {hint(misspelt[2], names)}"
        raise UserError(f"{where}: {module.__file__}:{line}: {type(e).__name__}: {text}") from e


def is_reference(text: str) -> bool:
    """Whether this is 'file.py:name' or 'package.module:name'."""
    target, colon, name = text.rpartition(":")
    return (
        bool(colon)
        and name.isidentifier()
        and (target.endswith(".py") or all(p.isidentifier() for p in target.split(".")))
    )
