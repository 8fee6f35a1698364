"""A plan: what each distinct train step of an experiment asks of the chips it is meant for."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlm import mesh
from jaxlm.chips import Topology
from jaxlm.config import Config
from jaxlm.model.scale import size
from jaxlm.planning import analysis, aot, roofline, search
from jaxlm.planning.aot import GIB, Memory
from jaxlm.planning.hlo import Collective
from jaxlm.planning.roofline import Roofline
from jaxlm.planning.target import Target, target
from jaxlm.train.optimizer import hyper
from jaxlm.train.step import program, static


@dataclass(frozen=True)
class Step:
    """One distinct train step: of one run, or of all runs of a sweep that share it."""

    runs: tuple[str, ...]
    mesh: dict[str, int]
    params: int
    tokens: int  # that the runs train on together
    flops_per_step: float
    fits: bool
    told_by: str  # 'compiler' or 'analysis'
    memory_gib: Memory | None  # of one device; None where the compiler refused
    hbm_limit_gib: float
    refused: str  # what the compiler said where the step does not fit
    advice: tuple[str, ...]  # numbers to change where it does not fit
    collectives: tuple[Collective, ...]  # of one step on one device
    compile_s: float
    roofline: Roofline | None  # None on a CPU
    mfu: float | None  # that hours are reckoned with: as stated, or its bound if that is less
    hours: float
    price: float | None  # USD, of all chips for these hours

    @property
    def mfu_bound(self) -> float | None:
        return self.roofline.mfu_bound if self.roofline else None


def distinct(configs: Sequence[Config]) -> list[list[Config]]:
    """The configs by the step that they share, cheapest step first."""
    groups: dict[Config, list[Config]] = {}
    for c in configs:
        groups.setdefault(static(c), []).append(c)
    return sorted(groups.values(), key=lambda g: flops_per_step(g[0]))


def flops_per_step(config: Config) -> float:
    return float(size(config.model).flops_per_token * config.batch_tokens)


def plan_step(
    configs: Sequence[Config], topology: Topology, mfu: float, price: float | None
) -> Step:
    """The step that `configs` share. `price`: USD per chip and hour. Raises UserError where a shape
    does not divide by the mesh."""
    config = configs[0]
    on = target(config, topology)
    state = analysis.state_bytes(config, on.shape)
    if on.mesh is not None:
        made = aot.compiled(config, on.mesh)
    else:
        made = analysed(config, on)
    chip = topology.chip
    lines = made.collectives or analysis.collectives(config, on.shape)
    bound = roofline.roofline(config, on, lines, state)
    flops = flops_per_step(config)
    reached = min(mfu, bound.mfu_bound)
    per_step_s = flops / (topology.devices * chip.flops_per_s * reached)
    hours = per_step_s * sum(c.train.steps for c in configs) / 3600
    return Step(
        runs=tuple(c.name for c in configs),
        mesh=on.shape,
        params=size(config.model).params,
        tokens=sum(c.tokens for c in configs),
        flops_per_step=flops,
        fits=made.fits,
        told_by="analysis" if on.mesh is None else "compiler",
        memory_gib=made.memory,
        hbm_limit_gib=chip.hbm_gib,
        refused=made.refused,
        advice=() if made.fits else search.advice(config, topology),
        collectives=lines,
        compile_s=made.compile_s,
        roofline=bound,
        mfu=reached,
        hours=hours,
        price=None if price is None else price * topology.chips * hours,
    )


def analysed(config: Config, on: Target) -> aot.Compiled:
    """What `aot.compiled` would say, reckoned."""
    host = analysis.host_bytes(config, on.shape) / GIB
    arguments = analysis.state_bytes(config, on.shape) / GIB - host
    temporaries = analysis.temporaries_gib(config, on.shape)
    memory = Memory(arguments, temporaries, arguments + temporaries, host)
    limit = on.topology.chip.hbm_gib
    why = "" if memory.peak <= limit else f"about {memory.peak:.1f} GiB of {limit:g} GiB"
    return aot.Compiled(not why, 0.0, memory, analysis.collectives(config, on.shape), why)


def plan_here(config: Config) -> Step:
    """The step of a lone run on this machine's devices, compiled and timed. Raises UserError."""
    made_of = mesh.make(config)
    made = aot.compiled(config, made_of)
    step_s = _timed(config, made_of, made.run)
    limit = _physical_gib() / made_of.size
    return Step(
        runs=(config.name,),
        mesh=dict(made_of.shape),
        params=size(config.model).params,
        tokens=config.tokens,
        flops_per_step=flops_per_step(config),
        fits=made.memory is not None and made.memory.peak <= limit,
        told_by="compiler",
        memory_gib=made.memory,
        hbm_limit_gib=limit,
        refused=made.refused,
        advice=(),
        collectives=made.collectives,
        compile_s=made.compile_s,
        roofline=None,
        mfu=None,
        hours=step_s * config.train.steps / 3600,
        price=None,
    )


def _timed(config: Config, on: jax.sharding.Mesh, run: Any) -> float:
    """Seconds per step: the second of two dispatches on tokens that are all 0."""
    with jax.set_mesh(on):
        numbers = hyper(config)
        batches = jax.tree.map(
            lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding),
            aot.abstract_batch(config, on),
        )
        state, _ = run(numbers, program(config).init(numbers), batches)
        jax.block_until_ready(state)
        began = time.perf_counter()
        jax.block_until_ready(run(numbers, state, batches))
        return (time.perf_counter() - began) / batches.tokens.shape[0]


def _physical_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def as_json(step: Step) -> dict[str, Any]:
    values = dataclasses.asdict(step)
    if step.roofline is not None:
        values["roofline"]["bound_by"] = step.roofline.bound_by
    return {**values, "mfu_bound": step.mfu_bound}
