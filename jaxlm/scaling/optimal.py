"""From a predicted optimum to an experiment file that trains it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from jaxlm.config import Config, Shape, validate
from jaxlm.files import write_bytes
from jaxlm.model.scale import size
from jaxlm.scaling.ladder import sized
from jaxlm.scaling.tables import COUNTS
from jaxlm.schema import UserError

_MOST_LAYERS = 256


def config_for(base: Config, params: float, tokens: float, count: str = "all") -> Config:
    """`base` at the shape nearest to so many parameters (counted as `count` says), and trained for
    so many tokens. The shape keeps the head width and comes as near as it can to the base's ratio
    of width to depth. Raises UserError where no shape of these comes within 10 %."""
    m, field = base.model, COUNTS[count]
    aspect = m.d_model / m.n_layers

    def at(layers: int, heads_more: int = 0) -> Any:
        heads = max(1, round(layers * aspect / m.head_dim) + heads_more)
        return sized(m, Shape(heads * m.head_dim, layers), "base")

    def off(model: Any) -> float:
        return abs(math.log(getattr(size(model), field) / params))

    low, high = 1, _MOST_LAYERS
    while low < high:  # the fewest layers that hold as many parameters
        middle = (low + high) // 2
        low, high = (low, middle) if getattr(size(at(middle)), field) >= params else (
            middle + 1, high)  # fmt: skip
    near = [at(max(1, n), more) for n in (low - 1, low) for more in (-1, 0, 1)]
    model = min(near, key=off)
    wrong = getattr(size(model), field) / params - 1
    if abs(wrong) > 0.1:
        raise UserError(
            f"--base: no width and depth in its proportions come within 10 % of {params:.3g}"
            f" parameters (nearest: {wrong:+.0%}); choose another base"
        )
    batch = base.train.global_batch_size * model.seq_len
    k = base.train.steps_per_dispatch
    train = dataclasses.replace(base.train, steps=max(1, round(tokens / batch / k)) * k)
    return validate(dataclasses.replace(base, name="optimal", model=model, train=train), "optimal")


def write(path: Path, config: Config, why: str) -> None:
    """An experiment file of the config, its docstring `why`."""
    classes: set[type] = set()
    body = _source(config, classes)
    by_module: dict[str, list[str]] = {}
    for c in classes:
        by_module.setdefault(c.__module__, []).append(c.__name__)
    imports = "\n".join(
        f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(
            by_module.items())
    )  # fmt: skip
    text = f'"""{why}"""\n\n{imports}\n\n\ndef get_config() -> Config:\n    return {body}\n'
    write_bytes(path, text.encode())


def _source(value: Any, classes: set[type]) -> str:
    """Python for a dataclass, fields at their defaults left out."""
    if not dataclasses.is_dataclass(value):
        return repr(value)
    classes.add(type(value))
    kind: Any = type(value)
    plain = kind()
    parts = [
        f"{f.name}={_source(getattr(value, f.name), classes)}"
        for f in dataclasses.fields(value)
        if getattr(value, f.name) != getattr(plain, f.name)
    ]
    return f"{type(value).__name__}({', '.join(parts)})"
