"""How fast a step can be at most: arithmetic, memory and wires, each at its data sheet's best.

A bound and no forecast: nothing is said of what overlaps or stalls. FLOPs are those that MFU counts
(`model.scale.size`: attention over the full square), plus what remat computes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxlm.chips import Chip
from jaxlm.config import Config
from jaxlm.mesh import TENSOR
from jaxlm.model.scale import size
from jaxlm.planning.hlo import Collective
from jaxlm.planning.target import Target


@dataclass(frozen=True)
class Roofline:
    """Seconds that a step takes at least; the longest binds it."""

    compute_s: float
    memory_s: float
    network_s: dict[str, float]  # mesh axes ('fsdp', 'data+fsdp') → at least
    mfu_bound: float

    @property
    def step_s(self) -> float:
        return max(self.compute_s, self.memory_s, *self.network_s.values(), 0.0)

    @property
    def serial_s(self) -> float:
        """If arithmetic and wires waited for each other."""
        return max(self.compute_s, self.memory_s) + sum(self.network_s.values())

    @property
    def bound_by(self) -> str:
        names = {"compute": self.compute_s, "memory": self.memory_s} | {
            f"network ({axes})": s for axes, s in self.network_s.items()
        }
        return max(names, key=lambda name: names[name])


def roofline(
    config: Config, target: Target, collectives: Sequence[Collective], state_bytes: float
) -> Roofline:
    """`collectives`: of one step on a device; `state_bytes`: of parameters and optimizer there."""
    chip, devices = target.topology.chip, target.places[..., 0].size
    counted = size(config.model).flops_per_token * config.batch_tokens / devices
    compute_s = counted * recomputed(config) / chip.flops_per_s
    memory_s = _traffic(config, target, state_bytes) / chip.hbm_bytes_per_s
    network: dict[str, float] = {}
    for c in collectives:
        name = "+".join(c.axes)
        network[name] = network.get(name, 0.0) + seconds(c, target)
    network_s = dict(sorted(network.items(), key=lambda item: -item[1]))
    step_s = max(compute_s, memory_s, *network_s.values(), 0.0)
    return Roofline(compute_s, memory_s, network_s, counted / chip.flops_per_s / step_s)


def recomputed(config: Config) -> float:
    """FLOPs of a step over those counted: 'full' remat runs the blocks forward once more. ('dots'
    keeps every product of a weight; what it computes again is left out.)"""
    if config.model.remat != "full":
        return 1.0
    m = config.model
    unembedding = 6 * m.decoder_len / m.seq_len * m.vocab_size * m.d_model
    blocks = 1 - unembedding / size(m).flops_per_token
    return 1 + blocks / 3


def _traffic(config: Config, target: Target, state_bytes: float) -> float:
    """Bytes to and from a device's memory at least: the state read and written once, and in each
    pass over each micro-batch the weights as they are multiplied."""
    passes = (4 if config.model.remat == "full" else 3) * config.train.accumulation_steps
    width = 4 if config.model.compute_dtype == "float32" else 2
    cut = target.shape[TENSOR]
    return 2 * state_bytes + passes * width * size(config.model).params / cut


def seconds(c: Collective, target: Target) -> float:
    """What a collective's bytes take over every wire that its group has.

    A ring over k axes of a torus uses both directions of each (Austin et al. 2025, How to Scale
    Your Model, part 3); between slices or nodes each device has its share of its host's network.
    """
    chip = target.topology.chip
    within, slices, dims = target.crossed(c.axes)
    inner = c.moved(within) / _wire(chip, dims)
    outer = c.moved(slices) / within / chip.network_bytes_per_s
    return max(inner, outer)


def _wire(chip: Chip, dims: int) -> float:
    return chip.link_bytes_per_s * (2 * max(dims, 1) if chip.is_tpu else 1)
