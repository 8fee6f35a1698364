"""The device mesh and the rules that lay arrays on it; the only file that names mesh axes.

A mesh is always set, also 1×1×1 on a laptop, and all axes are Explicit: an array's sharding is part
of its type, so a wrong layout is an error and not a slow run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import P
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from jaxlm.chips import chip_of
from jaxlm.config import Config, MeshConfig
from jaxlm.schema import UserError

DATA, FSDP = "data", "fsdp"
STAGE, CONTEXT, EXPERT, TENSOR = "stage", "context", "expert", "tensor"

# In the order of the devices, the slowest links first: `data` may cross slices.
AXES = (DATA, STAGE, CONTEXT, FSDP, EXPERT, TENSOR)
HOST_MEMORY = "pinned_host"  # of a device's memories, as jax calls it
_EXPLICIT = (AxisType.Explicit,) * len(AXES)

# Logical axis of an array → mesh axis. `d_model` of a parameter is cut by fsdp and gathered at use.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp", "expert"),
    "seq": "context",
    "vocab": "tensor",
    "d_model": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "d_ff": "tensor",
    "d_head": None,
    "d_out": None,
    "experts": "expert",
    "buckets": None,
    "positions": None,
    "routes": None,
    "types": None,
    "classes": None,
    "rank": None,
    "layers": "stage",
    "population": None,
}


def spec(axes: Sequence[str | None], gathered: bool = False) -> P:
    """PartitionSpec, on the mesh that is set, of an array with these logical axes; `gathered`: as
    used, without fsdp. Mesh axes of size 1, and those of a `local` around it, are left out."""
    cut = _cut()

    def on_mesh(axis: str | None) -> str | tuple[str, ...] | None:
        wanted = RULES[axis] if axis is not None else None
        names = (wanted,) if isinstance(wanted, str) else wanted or ()
        there = tuple(n for n in names if n in cut and not (gathered and n == "fsdp"))
        return there if len(there) > 1 else there[0] if there else None

    return P(*map(on_mesh, axes))


def _cut() -> frozenset[str]:
    """Axes of the mesh that is set along which an array can be cut here."""
    here = jax.sharding.get_abstract_mesh()
    sizes_and_types = zip(here.axis_names, here.axis_sizes, here.axis_types, strict=True)
    return frozenset(a for a, n, kind in sizes_and_types if n > 1 and kind == AxisType.Explicit)


def size(*axes: str) -> int:
    """Devices along these axes of the mesh that is set; 1 without a mesh."""
    here = jax.sharding.get_abstract_mesh()
    return math.prod(here.shape[a] for a in axes) if here.axis_names else 1


def parts(logical: str) -> int:
    """Into how many parts an array is cut along a logical axis."""
    axes = RULES[logical]
    return size(*((axes,) if isinstance(axes, str) else axes or ()))


def local(f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`f` on each device's own part of its arguments (`jax.shard_map` over every axis that is not
    so mapped already), which are laid out as `in_specs` say first."""
    here = jax.sharding.get_abstract_mesh()
    types = zip(here.axis_names, here.axis_types, strict=True)
    names = {a for a, kind in types if kind == AxisType.Explicit}
    if not names:
        return f
    # Inside another one, jax 0.10.2 gets the layout of what it keeps for the gradient wrong if it
    # checks which values vary along which axes.
    alone = len(names) == len(here.axis_names)
    mapped = jax.shard_map(
        f, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=alone
    )
    return lambda *args: mapped(*map(jax.reshard, args, in_specs))


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': what the mesh that is set is made of, which need not be here."""
    kind = device_kind()
    return "tpu" if kind.startswith("TPU") else "cpu" if kind.lower() == "cpu" else "gpu"


def device_kind() -> str:
    """Of the devices of the mesh that is set, as jax calls it."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def sizes(config: MeshConfig, n_devices: int) -> tuple[int, ...]:
    """Devices per axis, in the order of AXES, -1 filled in. Raises UserError when the product is
    not `n_devices`."""
    wanted = {a: getattr(config, a) for a in AXES}
    if list(wanted.values()).count(-1) > 1 or any(n == 0 or n < -1 for n in wanted.values()):
        raise UserError(f"config.mesh: expected sizes ≥ 1 and at most one -1, got {config}")
    fixed = math.prod(n for n in wanted.values() if n != -1)
    if n_devices % fixed == 0:
        wanted = {a: n_devices // fixed if n == -1 else n for a, n in wanted.items()}
    if math.prod(wanted.values()) != n_devices:
        shape = " × ".join(f"{a}={n}" for a, n in wanted.items() if n != 1)
        raise UserError(
            f"config.mesh: {shape or 'data=1'} needs a product of {n_devices} devices;"
            f" valid sizes per axis: {', '.join(map(str, _divisors(n_devices)))}"
        )
    return tuple(wanted.values())


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def make(config: Config, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of a run; where devices are of several slices, `data` goes over them first (DCN).
    Raises UserError when the config's shapes do not divide by it."""
    devices = jax.devices() if devices is None else list(devices)
    shape = sizes(config.mesh, len(devices))
    check_divides(config, dict(zip(AXES, shape, strict=True)))
    _check_memory(config, devices[0])
    return jax.sharding.Mesh(grid(shape, devices), AXES, axis_types=_EXPLICIT)


def grid(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices in the mesh's shape: `data` over slices first, within them as `_of_slice`."""
    slices: dict[int, list[Any]] = {}
    for d in devices:
        slices.setdefault(getattr(d, "slice_index", 0) or 0, []).append(d)
    n, (data, *others) = len(slices), shape
    if data % n:
        raise UserError(f"config.mesh.data: expected a multiple of {n} slices, got {data}")
    return np.concatenate([_of_slice((data // n, *others), slices[i]) for i in sorted(slices)])


def _of_slice(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices of one slice in a shape: the axes along those of the torus, split where they
    must be; where jax finds no way (140 × 8 × 8 on 16x20x28), in the order of the torus, whose axis
    with most factors of two turns fastest."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (NotImplementedError, TypeError):
        places = np.array([[*d.coords, d.core_on_chip] for d in devices])
        twos = [n & -n for n in (places.max(0) + 1)[:3].tolist()]
        axes = [3, *sorted(range(3), key=lambda a: -twos[a])]  # fastest first
        order = np.lexsort(places[:, axes].T)
        return np.array(devices, object)[order].reshape(shape)


def for_reading(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The same devices in the same order for evaluating and generating, whose rows are too short
    to be cut and whose layers come one after the other: stage and context become fsdp."""
    shape = dict(mesh.shape)
    if shape["stage"] * shape["context"] == 1:
        return mesh
    shape["fsdp"] *= shape["stage"] * shape["context"]
    shape["stage"] = shape["context"] = 1
    devices = mesh.devices.reshape(tuple(shape.values()))
    return jax.sharding.Mesh(devices, AXES, axis_types=_EXPLICIT)


def of_one_copy(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The first devices along `tensor`, which hold one copy of a model and whole batches."""
    if mesh.size == mesh.shape[TENSOR]:
        return mesh
    first = mesh.devices[(slice(1),) * (mesh.devices.ndim - 1)]
    return jax.sharding.Mesh(first, AXES, axis_types=_EXPLICIT)


def check_divides(config: Config, shape: dict[str, int]) -> None:
    """Every sharded dimension divides by its mesh axis, or a UserError says which number to use."""
    m, t, tensor = config.model, config.train, shape["tensor"]
    moe, both = m.moe.n_experts > 0, m.architecture == "encoder_decoder"
    # Of a causal stack each device has an early and a late piece (`model.ring`).
    pieces = shape["context"] * (1 if shape["context"] == 1 or m.architecture == "encoder" else 2)
    layers = shape["stage"] * m.pipeline_repeats
    rows = {
        "train.global_batch_size / accumulation_steps": (
            t.global_batch_size // t.accumulation_steps,
            math.prod(shape[a] for a in ("data", "fsdp", "expert")),
            "data × fsdp × expert",
        ),
        "model.d_model": (
            m.d_model,
            math.prod(shape[a] for a in ("fsdp", "stage", "context")),
            "fsdp × stage × context",
        ),
        "model.n_heads": (m.n_heads, tensor, "tensor"),
        "model.n_kv_heads": (m.kv_heads, tensor, "tensor"),
        "model.moe.d_expert" if moe else "model.d_ff": (
            m.expert_dim if moe else m.ff_dim,
            tensor,
            "tensor",
        ),
        "model.vocab_size": (m.vocab_size, tensor, "tensor"),
        "model.seq_len": (m.seq_len, pieces, "context (× 2 where causal)"),
        "model.target_len": (m.decoder_len, pieces, "context (× 2 where causal)"),
        "model.n_layers": (m.n_layers, layers, "stage × model.pipeline_repeats"),
        "model.n_encoder_layers": (
            m.encoder_layers if both else layers,
            layers,
            "stage × model.pipeline_repeats",
        ),
        "model.moe.n_experts": (m.moe.n_experts, shape["expert"] if moe else 1, "expert"),
    }
    for name, (value, n, axis) in rows.items():
        if value % n:
            near = dict.fromkeys((max(1, value // n) * n, -(-value // n) * n))
            raise UserError(
                f"config.{name}: {value} does not divide by mesh {axis}={n};"
                f" nearest: {' or '.join(map(str, near))}"
            )
    _check_shards(t.deterministic_reduce, shape)
    if m.layer and shape["context"] > 1:
        raise UserError("config.mesh.context: expected 1 with an own layer (model.layer)")


def _check_memory(config: Config, device: Any) -> None:
    there = [memory.kind for memory in device.addressable_memories()]
    if config.optimizer.offload and HOST_MEMORY not in there:
        raise UserError(
            f"config.optimizer.offload: expected False: {device.device_kind} has no memory"
            f" {HOST_MEMORY!r}, but {', '.join(there)}"
        )


def _check_shards(shards: int, shape: dict[str, int]) -> None:
    """`train.deterministic_reduce` is of data alone, and each device has two shards or more."""
    if not shards:
        return
    n, near = shape[DATA], 1 << (shape[DATA].bit_length() - 1)
    others = ", ".join(f"{axis}={k}" for axis, k in shape.items() if k > 1 and axis != DATA)
    field = "config.train.deterministic_reduce: expected"
    if others:
        raise UserError(f"{field} a mesh of data alone, got {others}; 0 turns it off")
    if near != n:
        raise UserError(
            f"config.mesh.data: expected a power of two for deterministic_reduce, got {n};"
            f" nearest: {near}"
        )
    if shards < 2 * n:
        raise UserError(
            f"{field} at least two shards on each device of mesh data={n}, got {shards};"
            f" nearest: {2 * n}"
        )


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    return jax.NamedSharding(mesh, P())


def whole(tree: Any) -> Any:
    """Traced arrays on every device whole, so that each process can read them."""
    return jax.tree.map(lambda x: jax.reshard(x, P(*[None] * x.ndim)), tree)


def own_rows(mesh: jax.sharding.Mesh, n: int) -> np.ndarray:
    """The rows of a batch of n that this process's devices hold, ascending; on a torus, whose hosts
    hold squares of it, they need not follow one another."""
    sharding = jax.NamedSharding(mesh, spec(("batch",)))
    places = sharding.addressable_devices_indices_map((n,)).values()
    return np.unique([np.arange(n)[at] for at in places if at is not None])


def put_batch(tree: Any, mesh: jax.sharding.Mesh, leading: int = 0, rows: int = 0) -> Any:
    """Host arrays onto the mesh, the batch axis (after `leading` others) cut by data and fsdp.

    Each process gives all rows of a batch, or of `rows` its own (`own_rows`).
    """

    def put(x: Any) -> jax.Array:
        axes = [None] * leading + ["batch"] + [None] * (x.ndim - leading - 1)
        sharding = jax.NamedSharding(mesh, spec(axes))
        whole = list(x.shape)
        whole[leading] = rows or whole[leading]
        return jax.make_array_from_process_local_data(sharding, x, tuple(whole))

    return jax.tree.map(put, tree)


def peak_flops() -> float:
    """Peak FLOP/s of all devices together; 0.0 where it is not known (a CPU)."""
    chip = chip_of(jax.devices()[0].device_kind)
    return chip.flops_per_s * jax.device_count() if chip else 0.0
