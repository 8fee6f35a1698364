"""Which numbers to change in a step that does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from jaxlm import mesh
from jaxlm.chips import Topology
from jaxlm.config import Config
from jaxlm.planning import analysis
from jaxlm.schema import UserError

GIVEN = 3  # pieces of advice


def advice(config: Config, topology: Topology) -> tuple[str, ...]:
    """Changes after which a step is reckoned to fit, the cheapest first."""
    found: list[str] = []
    for text, changed in _changes(config, topology):
        if (gib := _gib(changed, topology)) is not None and gib <= topology.chip.hbm_gib:
            found.append(f"{text}: about {gib:.1f} GiB, as reckoned")
    more = "no single change is reckoned to make it fit: more chips, or a smaller model"
    return tuple(found[:GIVEN]) or (more,)


def _changes(config: Config, topology: Topology) -> Iterator[tuple[str, Config]]:
    train, model = config.train, config.model
    full = dataclasses.replace(model, remat="full")
    if model.remat != "full":
        yield "config.model.remat='full'", dataclasses.replace(config, model=full)
    each = train.global_batch_size
    parts = [n for n in range(train.accumulation_steps + 1, each + 1) if each % n == 0]
    for name, base in (("", model), ("config.model.remat='full' and ", full)):
        if name and base == model:
            continue
        for n in parts:
            changed = dataclasses.replace(
                config, model=base, train=dataclasses.replace(train, accumulation_steps=n)
            )
            gib = _gib(changed, topology)
            if gib is not None and gib <= topology.chip.hbm_gib:
                yield f"{name}config.train.accumulation_steps={n}", changed
                break
    shape = dict(zip(mesh.AXES, mesh.sizes(config.mesh, topology.devices), strict=True))
    if shape["data"] > 1:
        cut = dataclasses.replace(config.mesh, data=topology.slices, fsdp=-1)
        yield (
            f"config.mesh.data={topology.slices} and fsdp=-1",
            dataclasses.replace(config, mesh=cut),
        )
    for n in (2, 4, 8):
        cut = dataclasses.replace(config.mesh, data=topology.slices, fsdp=-1,
                                  tensor=shape["tensor"] * n)  # fmt: skip
        text = f"config.mesh.data={topology.slices}, fsdp=-1 and tensor={cut.tensor}"
        yield text, dataclasses.replace(config, mesh=cut)


def _gib(config: Config, topology: Topology) -> float | None:
    """Memory of one device, as reckoned; None where the shapes do not divide."""
    try:
        sizes = mesh.sizes(config.mesh, topology.devices)
        shape = dict(zip(mesh.AXES, sizes, strict=True))
        mesh.check_divides(config, shape)
    except UserError:
        return None
    arguments = analysis.state_bytes(config, shape) / analysis.GIB
    return arguments + analysis.temporaries_gib(config, shape)
