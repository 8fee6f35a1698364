"""The device mesh and the rules that lay arrays on it; the only file that names mesh axes.

A mesh is always set, also 1×1×1 on a laptop, and all axes are Explicit: an array's sharding is part
of its type, so a wrong layout is an error and not a slow run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import P
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from jaxlm.chips import chip_of
from jaxlm.config import Config, MeshConfig
from jaxlm.schema import UserError

AXES = ("data", "fsdp", "tensor")

# Logical axis of an array → mesh axis. `d_model` of a parameter is cut by fsdp and gathered at use.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "vocab": "tensor",
    "d_model": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "d_ff": "tensor",
    "d_head": None,
    "d_out": None,
    "experts": None,
    "buckets": None,
    "types": None,
    "classes": None,
    "rank": None,
    "seq": None,
    "layers": None,
    "population": None,
}


def spec(axes: Sequence[str | None], gathered: bool = False) -> P:
    """PartitionSpec of an array with these logical axes; `gathered`: as used, without fsdp."""
    mesh_axes = [RULES[a] if a is not None else None for a in axes]
    return P(*[None if gathered and m == "fsdp" else m for m in mesh_axes])


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': what the mesh that is set is made of, which need not be here."""
    kind = device_kind()
    return "tpu" if kind.startswith("TPU") else "cpu" if kind.lower() == "cpu" else "gpu"


def device_kind() -> str:
    """Of the devices of the mesh that is set, as jax calls it."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def sizes(config: MeshConfig, n_devices: int) -> tuple[int, ...]:
    """Devices per axis, -1 filled in. Raises UserError when the product is not `n_devices`."""
    wanted = [getattr(config, a) for a in AXES]
    if wanted.count(-1) > 1 or any(n == 0 or n < -1 for n in wanted):
        raise UserError(f"config.mesh: expected sizes ≥ 1 and at most one -1, got {config}")
    fixed = math.prod(n for n in wanted if n != -1)
    if -1 in wanted and n_devices % fixed == 0:
        wanted[wanted.index(-1)] = n_devices // fixed
    if math.prod(wanted) != n_devices:
        shape = " × ".join(f"{a}={n}" for a, n in zip(AXES, wanted, strict=True))
        raise UserError(
            f"config.mesh: {shape} needs a product of {n_devices} devices;"
            f" valid sizes per axis: {', '.join(map(str, _divisors(n_devices)))}"
        )
    return tuple(wanted)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def make(config: Config, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of a run. Raises UserError when the config's shapes do not divide by it."""
    devices = jax.devices() if devices is None else list(devices)
    shape = sizes(config.mesh, len(devices))
    check_divides(config, dict(zip(AXES, shape, strict=True)))
    return jax.sharding.Mesh(_grid(shape, devices), AXES, axis_types=(AxisType.Explicit,) * 3)


def _grid(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices of one slice in the mesh's shape: the axes along those of the torus, split where
    they must be; where jax finds no way (140 × 8 × 8 on 16x20x28), in the order of the torus, whose
    axis with most factors of two turns fastest."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (NotImplementedError, TypeError):
        places = np.array([[*d.coords, d.core_on_chip] for d in devices])
        twos = [n & -n for n in (places.max(0) + 1)[:3].tolist()]
        axes = [3, *sorted(range(3), key=lambda a: -twos[a])]  # fastest first
        order = np.lexsort(places[:, axes].T)
        return np.array(devices, object)[order].reshape(shape)


def check_divides(config: Config, shape: dict[str, int]) -> None:
    """Every sharded dimension divides by its mesh axis, or a UserError says which number to use."""
    m, t = config.model, config.train
    rows = {
        "train.global_batch_size / accumulation_steps": (
            t.global_batch_size // t.accumulation_steps,
            shape["data"] * shape["fsdp"],
            "data × fsdp",
        ),
        "model.d_model": (m.d_model, shape["fsdp"], "fsdp"),
        "model.n_heads": (m.n_heads, shape["tensor"], "tensor"),
        "model.n_kv_heads": (m.kv_heads, shape["tensor"], "tensor"),
        ("model.moe.d_expert" if m.moe.n_experts else "model.d_ff"): (
            m.expert_dim if m.moe.n_experts else m.ff_dim,
            shape["tensor"],
            "tensor",
        ),
        "model.vocab_size": (m.vocab_size, shape["tensor"], "tensor"),
    }
    for name, (value, n, axis) in rows.items():
        if value % n:
            raise UserError(
                f"config.{name}: {value} does not divide by mesh {axis}={n};"
                f" nearest: {max(1, value // n) * n} or {-(-value // n) * n}"
            )


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    return jax.NamedSharding(mesh, P())


def put_batch(tree: Any, mesh: jax.sharding.Mesh, leading: int = 0) -> Any:
    """Host arrays onto the mesh, the batch axis (after `leading` others) cut by data and fsdp."""

    def put(x: Any) -> jax.Array:
        axes = [None] * leading + ["batch"] + [None] * (x.ndim - leading - 1)
        sharding = jax.NamedSharding(mesh, spec(axes))
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(put, tree)


def peak_flops() -> float:
    """Peak FLOP/s of all devices together; 0.0 where it is not known (a CPU)."""
    chip = chip_of(jax.devices()[0].device_kind)
    return chip.flops_per_s * jax.device_count() if chip else 0.0
