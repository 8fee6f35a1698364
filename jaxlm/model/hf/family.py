"""What a family of checkpoints is: its config.json and its tensors against ours, both ways."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxlm.config import ModelConfig, validate_model
from jaxlm.model.hf.layout import Layout, Row, layout
from jaxlm.model.transformer import table
from jaxlm.schema import UserError, from_dict

REQUIRED = object()
Json = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """A key of config.json that is a field of `ModelConfig` (dotted where it is in a part of it).

    `default` is what the key's absence means there, `older` a name that it had before. `values`
    says which of theirs is which of ours, the first being what we write.
    """

    theirs: str
    ours: str
    default: Any = REQUIRED
    older: str = ""
    values: tuple[tuple[Any, Any], ...] = ()


class Part(NamedTuple):
    """Keys of config.json that say together what fields of ours (dotted) say together.

    `read(theirs, where)` gives our fields; `write(config)` gives their keys.
    """

    read: Callable[[Json, str], Json]
    write: Callable[[ModelConfig], Json]


@dataclass(frozen=True)
class Family:
    """Everything that tells one `model_type` from another.

    `fixed` names the values a key may have, the first of which its absence means and is what we
    write; another value is an architecture that these layers do not compute. `ours` is what the
    model type itself says of `ModelConfig`. `buffers` match tensors that hold nothing which is
    computed with.
    """

    model_type: str
    architecture: str
    keys: tuple[Key, ...]
    fixed: dict[str, tuple[Any, ...]]
    ours: Json
    rows: tuple[Row, ...]
    prefix: str  # of all tensors but the output's; a bare base model leaves it out
    parts: tuple[Part, ...] = ()
    ties: tuple[str, ...] = ()  # tensors that repeat the embedding where it is tied
    buffers: tuple[str, ...] = ()
    chosen: tuple[str, tuple[Any, ...]] | None = None  # where several share architecture: by key
    older: tuple[tuple[str, str], ...] = ()  # parts of names that were others once: (old, new)

    def config(self, theirs: Json, where: str) -> ModelConfig:
        """Their config.json as ours. Raises UserError naming the key."""
        for name, allowed in self.fixed.items():
            value = theirs.get(name, allowed[0])
            if value not in allowed:
                expected = " or ".join(map(repr, allowed))
                raise UserError(f"{where}: {name} is {value!r}; only {expected} is built here")
        values = dict(self.ours)
        for key in self.keys:
            values[key.ours] = self._value(key, theirs, where)
        for part in self.parts:
            values |= part.read(theirs, where)
        nested: Json = {}
        for dotted, value in values.items():
            *groups, name = dotted.split(".")
            inner = functools.reduce(lambda node, group: node.setdefault(group, {}), groups, nested)
            inner[name] = value
        return validate_model(from_dict(ModelConfig, nested, where), where)

    def _value(self, key: Key, theirs: Json, where: str) -> Any:
        value = theirs.get(key.theirs, theirs.get(key.older, key.default))
        if value is REQUIRED:
            raise UserError(f"{where}: no {key.theirs!r}, which {self.model_type} needs")
        if key.values:
            known = dict(key.values)
            if value not in known:
                expected = ", ".join(map(repr, known))
                raise UserError(f"{where}: {key.theirs} is {value!r}; built here: {expected}")
            value = known[value]
        return value

    def config_json(self, config: ModelConfig) -> Json:
        """Our config as theirs. Whether that says everything, `speaks` tells."""
        made: Json = {"architectures": [self.architecture], "model_type": self.model_type}
        config = filled(config)
        made |= {key: allowed[0] for key, allowed in self.fixed.items()}
        for key in self.keys:
            value: Any = config
            for name in key.ours.split("."):
                value = getattr(value, name)
            if key.values:
                value = next((a for a, b in key.values if b == value), None)
            made[key.theirs] = value
        for part in self.parts:
            made |= part.write(config)
        return made

    def layouts(self, config: ModelConfig) -> dict[tuple[str, ...], Layout]:
        """Path in params → where it lies in theirs. Raises UserError for a parameter that this
        family has no place for."""
        rows = {tuple(row.ours.split(".")): row for row in self.rows}
        declared = flat(table(config))
        lost = [".".join(path) for path in declared if path not in rows]
        if lost:
            raise UserError(f"{self.model_type}: has no place for {', '.join(lost)}")
        return {path: layout(rows[path], row) for path, row in declared.items()}

    def speaks(self, config: ModelConfig) -> bool:
        """Whether a checkpoint of this family can say all that `config` computes."""
        try:
            again = self.config(self.config_json(config), self.model_type)
            self.layouts(config)
        except UserError:
            return False
        return resolved(again) == resolved(config)

    def is_buffer(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.buffers)


def find(families: Sequence[Family], theirs: Json, where: str) -> Family:
    """The family that config.json names by its model_type and, if need be, architecture."""
    kind, stated = theirs.get("model_type"), theirs.get("architectures") or [None]
    found = [family for family in families if family.model_type == kind]
    if not found:
        known = ", ".join(dict.fromkeys(f.model_type for f in families))
        raise UserError(f"{where}: model_type is {kind!r}; known: {known}")
    exact = [family for family in found if family.architecture in stated]
    if len({family.architecture for family in found}) > 1 and not exact:
        known = ", ".join(f.architecture for f in found)
        raise UserError(f"{where}: architectures is {stated}; known: {known}")
    return next(filter(functools.partial(_chosen, theirs), exact or found), found[0])


def _chosen(theirs: Json, family: Family) -> bool:
    key, values = family.chosen or ("model_type", (family.model_type,))
    return theirs.get(key, values[0]) in values


def flat(tree: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """A nested dict with the path of each leaf."""
    found: dict[tuple[str, ...], Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, (*path, name))
        else:
            found[*path, name] = value
    return found


def filled(config: ModelConfig) -> ModelConfig:
    """`config` with what None stands for."""
    return dataclasses.replace(
        config,
        n_kv_heads=config.kv_heads,
        d_head=config.head_dim,
        d_ff=config.ff_dim,
        attention_scale=config.attention_scale or config.head_dim**-0.5,
        moe=dataclasses.replace(config.moe, d_expert=config.expert_dim),
    )


# Fields that decide how something is computed, or how it is trained, but not what a model says.
_HOW = ("compute_dtype", "remat", "scan_layers", "parametrization", "base_d_model", "dropout")


def resolved(config: ModelConfig) -> ModelConfig:
    """`config`, `filled`, without what does not change the function."""
    config = filled(config)
    moe = dataclasses.replace(config.moe, balance_loss=0.0, router_z_loss=0.0)
    values: Json = {f.name: f.default for f in dataclasses.fields(config) if f.name in _HOW}
    values |= {"n_encoder_layers": config.encoder_layers, "target_len": None}
    values["moe"] = moe if moe.n_experts else type(moe)()
    if not any(config.local):
        values |= {"sliding_window": None, "global_every": 0}
    return dataclasses.replace(config, **values)
