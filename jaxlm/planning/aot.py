"""The train step compiled ahead of time, by the compiler that the chips would use."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxlm import mesh
from jaxlm.config import Config
from jaxlm.data.loader import Batch
from jaxlm.planning import hlo
from jaxlm.planning.hlo import Collective
from jaxlm.train.optimizer import hyper
from jaxlm.train.step import abstract_state, program

GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Of one device, in GiB, as the compiler laid it out: state and batch, what lives within the
    step besides, and the most that is alive at once (which may be less than their sum). `host`: of
    the state, what lies in the host's memory instead (`optimizer.offload`)."""

    arguments: float
    temporaries: float
    peak: float
    host: float = 0.0


@dataclass(frozen=True)
class Compiled:
    """`memory` and `collectives` (of one step) are of a program that fits."""

    fits: bool
    compile_s: float
    memory: Memory | None = None
    collectives: tuple[Collective, ...] = ()
    refused: str = ""  # what the compiler said where it does not fit
    run: Any = None  # (hyper, state, batches) -> (state, metrics), on devices that are here


def compiled(config: Config, on: jax.sharding.Mesh) -> Compiled:
    """The very program that a run of `config` would dispatch, compiled for a mesh."""
    began = time.perf_counter()
    with jax.set_mesh(on):
        state = abstract_state(config, hyper(config))
        run: Any = program(config).chunk
        lowered = run.lower(hyper(config), state, abstract_batch(config, on))
        try:
            made = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            return Compiled(False, time.perf_counter() - began, refused=_why(str(e)))
    seconds = time.perf_counter() - began
    steps = min(config.train.steps_per_dispatch, config.train.steps)
    found = hlo.collectives(made.as_text(), dict(on.shape), steps)
    return Compiled(True, seconds, _memory(made), found, run=made)


def abstract_batch(config: Config, on: Any) -> Any:
    """Shapes, types and shardings of the batches of one dispatch, leaves [steps, b, t]."""
    t = config.train
    shape = (min(t.steps_per_dispatch, t.steps), t.global_batch_size, config.model.seq_len)
    layout = jax.NamedSharding(on, mesh.spec((None, "batch", None)))
    types = Batch(np.int32, np.int32, np.float32, np.int32, np.int32)
    return jax.tree.map(lambda d: jax.ShapeDtypeStruct(shape, d, sharding=layout), types)


def _memory(made: Any) -> Memory:
    m = made.memory_analysis()
    host = m.host_argument_size_in_bytes  # which the peak counts, too
    sizes = (m.argument_size_in_bytes, m.temp_size_in_bytes, m.peak_memory_in_bytes - host, host)
    return Memory(*(n / GIB for n in sizes))


def _why(text: str) -> str:
    """The compiler's sentence on how much was asked of how much."""
    return text.splitlines()[0].partition("RESOURCE_EXHAUSTED: ")[2][:200]
