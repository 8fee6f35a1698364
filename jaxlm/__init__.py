"""jaxlm: from a folder of text to a scaling law that you can trust.

The Python face is small: `jaxlm.train(config)`, `jaxlm.sweep(sweep)`, `jaxlm.fit(source)`.
Importing the package is cheap: nothing below loads jax until it is called.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Config", "Sweep", "fit", "generate", "report", "sweep", "train"]


def __getattr__(name: str) -> Any:
    if name in ("Config", "Sweep"):
        from jaxlm import config

        return getattr(config, name)
    if name in __all__:
        from jaxlm import api

        return getattr(api, name)
    raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
