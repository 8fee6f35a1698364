"""Optional libraries, imported when they are first needed."""

from __future__ import annotations

import importlib
from typing import Any

from jaxlm.schema import UserError


def library(module: str, extra: str = "data") -> Any:
    """The module. Raises UserError that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"{module} is needed for this: pip install 'jaxlm[{extra}]' ({e})") from e
