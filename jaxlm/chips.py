"""Accelerators as their makers describe them, one row per chip. Knows nothing of jax.

FLOP/s are dense bfloat16; bandwidths are what can be at most, so that what is computed from them is
a bound. TPUs: docs.cloud.google.com/tpu (v4, v5e, v5p, v6e, TPU7x); GPUs: NVIDIA's data sheets.
`hbm_gib` of a TPU is what its compiler lets a program use, as it says when one asks for more.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from jaxlm.schema import UserError, hint


@dataclass(frozen=True)
class Chip:
    """One JAX device: a chip, or half of one where a chip is two devices (TPU7x)."""

    name: str  # as in --topology
    kind: str  # how its jax `device_kind` begins
    flops_per_s: float
    hbm_gib: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float  # one link to a neighbour, one way; of a GPU all of NVLink
    axes: int  # of the torus that links form; 0: a switch between the GPUs of a node
    network_bytes_per_s: float  # between slices or nodes, one way, a device's share of its host's
    devices_per_chip: int = 1
    chips_per_host: int = 4  # of a slice of several hosts

    @property
    def is_tpu(self) -> bool:
        return self.axes > 0


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "TPU v4", 275e12, 31.75, 1.2e12, 50e9, 3, 6.25e9),
        Chip("v5e", "TPU v5 lite", 197e12, 15.75, 819e9, 50e9, 2, 3.125e9),
        Chip("v5p", "TPU v5", 459e12, 95.74, 2.765e12, 100e9, 3, 6.25e9),
        Chip("v6e", "TPU v6 lite", 918e12, 31.25, 1.64e12, 100e9, 2, 12.5e9),
        Chip("tpu7x", "TPU7x", 1153.5e12, 94.75, 3.69e12, 100e9, 3, 6.25e9, devices_per_chip=2),
        Chip("a100", "NVIDIA A100", 312e12, 80.0, 2.039e12, 300e9, 0, 25e9, chips_per_host=8),
        Chip("h100", "NVIDIA H100", 989e12, 80.0, 3.35e12, 450e9, 0, 50e9, chips_per_host=8),
        Chip("h200", "NVIDIA H200", 989e12, 141.0, 4.8e12, 450e9, 0, 50e9, chips_per_host=8),
        Chip("b200", "NVIDIA B200", 2250e12, 180.0, 8.0e12, 900e9, 0, 50e9, chips_per_host=8),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """The row of a jax device, None for one that is not listed (a CPU)."""
    known = [c for c in CHIPS.values() if device_kind.startswith(c.kind)]
    return max(known, key=lambda c: len(c.kind), default=None)


@dataclass(frozen=True)
class Topology:
    """Chips wired together, as often as there are slices: 'v5p:8x8x16', 'h100:8' (a node)."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices_per_chip

    @property
    def name(self) -> str:
        one = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return f"{self.slices} × {one}" if self.slices > 1 else one


def topology(text: str, slices: int = 1) -> Topology:
    """'v5p:8x8x16' → Topology. Raises UserError with what is expected."""
    name, _, size = text.partition(":")
    if name not in CHIPS:
        raise UserError(f"--topology: no chip {name!r}; {hint(name, CHIPS)}")
    chip = CHIPS[name]
    axes = chip.axes or 1
    example = {1: "8", 2: "4x4", 3: "4x4x4"}[axes]
    if not re.fullmatch(rf"\d+(x\d+){{{axes - 1}}}", size):
        raise UserError(
            f"--topology: expected chips along {axes} axes, as in {name}:{example}, got {text!r}"
        )
    shape = tuple(map(int, size.split("x")))
    if min(shape) < 1 or slices < 1:
        raise UserError(f"--topology: expected at least one chip and slice, got {text!r}")
    if not chip.is_tpu and shape[0] > chip.chips_per_host:
        most = chip.chips_per_host
        raise UserError(
            f"--topology: {name} has {most} GPUs in a node; {shape[0]} of them are"
            f" {name}:{most} with --slices={-(-shape[0] // most)}"
        )
    return Topology(chip, shape, slices)
