"""Which parameters a run moves, and the model's from them: all of them, or adapters and new heads.

With adapters (`tune.lora.rank`) a run's parameters are {"adapters": …, "whole": …}: low-rank pairs,
and what the weights to begin with did not have. The others are `State.frozen`.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxlm.config import Config
from jaxlm.model import lora, transformer
from jaxlm.model.transformer import Params

WHOLE = ("classifier",)  # learnt as they are beside adapters


def moving(config: Config) -> dict[str, Any]:
    """The table of what moves: a tree like the run's parameters with a `Declared` at each leaf."""
    rows = transformer.table(config.model)
    if not config.tune.lora.rank:
        return rows
    whole = {name: rows[name] for name in WHOLE if name in rows}
    return {"adapters": lora.table(config.model, config.tune.lora), "whole": whole}


def init(config: Config, key: jax.Array) -> Params:
    """Fresh parameters of a run, laid out on the current mesh."""
    if not config.tune.lora.rank:
        return transformer.init(config.model, key)
    fresh = transformer.init(config.model, key)
    whole = {name: fresh[name] for name in WHOLE if name in fresh}
    return {"adapters": lora.init(config.model, config.tune.lora, key), "whole": whole}


def whole(config: Config, params: Params, frozen: Any) -> Params:
    """The model's parameters."""
    if not config.tune.lora.rank:
        return params
    base = {**frozen, **params["whole"]}
    return lora.merged(config.model, config.tune.lora, base, params["adapters"])


def frozen(config: Config, params: Params) -> Any:
    """Of a model's parameters those that stay; None where all move."""
    if not config.tune.lora.rank:
        return None
    return {name: x for name, x in params.items() if name not in WHOLE}
