"""Which numbers to change: in a step that does not fit, and which mesh, remat and micro-batches are
best, as reckoned; a compiler has the last word."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from jaxlm import mesh
from jaxlm.chips import Topology
from jaxlm.config import Config, MeshConfig
from jaxlm.planning import analysis, roofline
from jaxlm.planning.roofline import Roofline
from jaxlm.planning.target import reckoned
from jaxlm.schema import UserError

GIVEN = 3  # pieces of advice
MOST_TENSOR, MOST_CONTEXT, MOST_PARTS = 32, 8, 6  # that a search tries


@dataclass(frozen=True)
class Candidate:
    """A way to run a step."""

    config: Config
    gib: float  # of one device, as reckoned
    roofline: Roofline


def ranked(config: Config, topology: Topology) -> list[Candidate]:
    """Every mesh (but pipelines) × remat × micro-batches that divides and is reckoned to
    fit; first what would take least time if nothing overlapped (of equals the fewest
    micro-batches, then the least memory)."""
    found = []
    for tried in _variants(config, topology):
        gib = memory_gib(tried, topology)
        if gib is None or gib > topology.chip.hbm_gib:
            continue
        on = reckoned(tried, topology)
        state, lines = analysis.state_bytes(tried, on.shape), analysis.collectives(tried, on.shape)
        found.append(Candidate(tried, gib, roofline.roofline(tried, on, lines, state)))

    def rank(c: Candidate) -> tuple[float, int, float]:
        return float(f"{c.roofline.serial_s:.3g}"), c.config.train.accumulation_steps, c.gib

    return sorted(found, key=rank)


def _variants(config: Config, topology: Topology) -> Iterator[Config]:
    train, moe = config.train, config.model.moe.n_experts
    parts = [k for k in range(1, train.global_batch_size + 1) if train.global_batch_size % k == 0]
    for cut in _meshes(topology.devices, moe):
        if cut.data % topology.slices:
            continue
        for remat in ("none", "dots", "full"):
            for k in parts[:MOST_PARTS]:
                yield dataclasses.replace(
                    config,
                    mesh=cut,
                    model=dataclasses.replace(config.model, remat=remat),
                    train=dataclasses.replace(train, accumulation_steps=k),
                )


def _meshes(n: int, experts: int) -> Iterator[MeshConfig]:
    """Every product of data, fsdp, tensor and context that is n, and of expert with experts."""
    for tensor in _divisors(n, MOST_TENSOR):
        for context in _divisors(n // tensor, MOST_CONTEXT):
            for expert in _divisors(n // tensor // context, max(experts, 1)):
                left = n // tensor // context // expert
                for fsdp in _divisors(left, left):
                    yield MeshConfig(
                        data=left // fsdp, fsdp=fsdp, tensor=tensor, context=context, expert=expert
                    )


def _divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]


def advice(config: Config, topology: Topology) -> tuple[str, ...]:
    """Changes after which a step is reckoned to fit, the cheapest first."""
    found: list[str] = []
    for text, changed in _changes(config, topology):
        if (gib := memory_gib(changed, topology)) is not None and gib <= topology.chip.hbm_gib:
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
            gib = memory_gib(changed, topology)
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
    if not config.optimizer.offload:
        offloaded = dataclasses.replace(config.optimizer, offload=True)
        yield "config.optimizer.offload=True", dataclasses.replace(config, optimizer=offloaded)


def memory_gib(config: Config, topology: Topology) -> float | None:
    """Memory of one device, as reckoned; None where the shapes do not divide."""
    try:
        sizes = mesh.sizes(config.mesh, topology.devices)
        shape = dict(zip(mesh.AXES, sizes, strict=True))
        mesh.check_divides(config, shape)
    except UserError:
        return None
    arguments = analysis.state_bytes(config, shape) - analysis.host_bytes(config, shape)
    return arguments / analysis.GIB + analysis.temporaries_gib(config, shape)
