"""jaxlm: from a folder of text to a scaling law that you can trust.

The Python face is small: `jaxlm.train(config)`, `jaxlm.sweep(sweep)`, `jaxlm.fit(source)`,
`jaxlm.from_pretrained(name)`.
Importing the package is cheap: nothing below loads jax until it is called.
"""

from __future__ import annotations

import sys
import types
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Sweep",
    "evaluate",
    "export",
    "finetune",
    "fit",
    "from_pretrained",
    "generate",
    "inspect",
    "report",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in ("Config", "Sweep"):
        from jaxlm import config

        return getattr(config, name)
    if name in __all__:
        from jaxlm import api

        return getattr(api, name)
    raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")


class _Package(types.ModuleType):
    """Importing the folder `jaxlm.train` would put it in the place of the function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in __all__ or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
