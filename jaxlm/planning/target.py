"""Devices that are not here: how a config's mesh lies on them, and which wires its axes cross."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxlm import mesh
from jaxlm.chips import Topology
from jaxlm.config import Config
from jaxlm.planning.hlo import SLICES
from jaxlm.scaling.workers import on_cpu
from jaxlm.schema import UserError


@dataclass(frozen=True)
class Target:
    """A config's mesh on a topology."""

    topology: Topology
    axes: tuple[str, ...]  # of the mesh
    places: np.ndarray  # int [*mesh shape, 1 + torus axes]: slice (or node), then where in it
    mesh: Any = None  # jax.sharding.Mesh of compile-only devices; None where no compiler is at hand

    @property
    def shape(self) -> dict[str, int]:
        return dict(zip(self.axes, self.places.shape[:-1], strict=True))

    def crossed(self, axes: tuple[str, ...]) -> tuple[int, int, int]:
        """Of a group of devices along these mesh axes: members within a slice (or node), slices,
        and along how many axes of the torus the members within one slice lie."""
        if axes == (SLICES,):
            return 1, self.topology.slices, 0
        index = tuple(slice(None) if a in axes else 0 for a in self.axes)
        group = self.places[index].reshape(-1, self.places.shape[-1])
        slices = len(np.unique(group[:, 0]))
        within = group[group[:, 0] == group[0, 0]][:, 1:]
        return len(within), slices, sum(len(np.unique(c)) > 1 for c in within.T)


def without_tpus() -> None:
    """To be called before jax looks for devices: libtpu, where it is installed on a machine without
    TPUs, then neither complains nor keeps others from loading it."""
    if on_cpu():
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def target(config: Config, topology: Topology) -> Target:
    """Raises UserError where the config's mesh or shapes do not divide, or libtpu is missing."""
    if not topology.chip.is_tpu:
        return reckoned(config, topology)
    laid = mesh.make(config, _tpu(topology))
    places = [[getattr(d, "slice_index", 0) or 0, *d.coords] for d in laid.devices.flat]
    grid = np.array(places).reshape(*laid.devices.shape, -1)
    return Target(topology, laid.axis_names, grid, laid)


def reckoned(config: Config, topology: Topology) -> Target:
    """The mesh's axes laid on the devices in their own order, without a compiler at hand."""
    shape = mesh.sizes(config.mesh, topology.devices)
    mesh.check_divides(config, dict(zip(mesh.AXES, shape, strict=True)))
    within = (*topology.shape, topology.chip.devices_per_chip)
    places = np.stack(np.unravel_index(np.arange(topology.devices), (topology.slices, *within)), -1)
    return Target(topology, mesh.AXES, places[:, :-1].reshape(*shape, -1))


def _tpu(topology: Topology) -> list[Any]:
    """Compile-only devices of libtpu, which runs on any Linux machine."""
    from jax.experimental import topologies

    shape = topology.shape
    more: dict[str, Any] = {}
    if topology.slices > 1:
        more["num_slices"] = topology.slices
    if topology.chip.name == "v4":
        more["chip_config_name"] = "megacore"  # two cores are one device
    if topology.chips == topology.slices:
        more["chips_per_host_bounds"] = (1,) * 3
    name = f"{topology.chip.name}:{'x'.join(map(str, shape))}"
    try:
        return list(topologies.get_topology_desc(name, "tpu", **more).devices)
    except RuntimeError as e:
        if "not installed" in str(e):
            raise UserError(
                f"--topology: the compiler for {topology.chip.name} is in libtpu, which is not"
                " installed: pip install 'jaxlm[tpu]'"
            ) from None
        raise UserError(f"--topology: no {name}: {str(e).splitlines()[0]}") from None
