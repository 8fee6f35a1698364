"""XLA's compiler options by chip.

Names and purposes of `train.xla_preset`'s are those of MaxText's list of flags found useful for
language models on TPUs; each is checked against libtpu's compiler in a test, alone and on a whole
train step. What they gain was not measured: no TPU.
"""

from __future__ import annotations

from jaxlm.chips import chip_of

# Collectives in the background of arithmetic, and between slices for the data axis.
_OVERLAP = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
# Gradients summed and cut in one operation, with the layout that it wants.
_SCATTER = {
    "xla_tpu_use_minor_sharding_for_major_trivial_input": "true",
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
    "xla_tpu_assign_all_reduce_scatter_layout": "true",
}
_WIDE_VMEM = {"xla_tpu_scoped_vmem_limit_kib": "98304"}  # of v6e's 128 MiB: larger tiles

PRESETS = {
    "v4": _OVERLAP,
    "v5e": _OVERLAP | _SCATTER,
    "v5p": _OVERLAP | _SCATTER,
    "v6e": _OVERLAP | _SCATTER | _WIDE_VMEM,
    "tpu7x": _OVERLAP | _SCATTER,
}


def options(preset: str, device_kind: str) -> dict[str, str]:
    """Of 'chip' on a device of this kind; none for 'none', and where the chip has no preset."""
    chip = chip_of(device_kind)
    return PRESETS.get(chip.name, {}) if preset == "chip" and chip else {}


def exact(shards: int, device_kind: str) -> dict[str, bool]:
    """With `train.deterministic_reduce`: every rounding to bfloat16 that is written is made, also
    where XLA could keep more; and on a CPU no product is summed in an order that depends on how
    many threads there are."""
    threads = {"xla_cpu_multi_thread_eigen": False} if device_kind.lower() == "cpu" else {}
    return {"xla_allow_excess_precision": False} | threads if shards else {}


def decoding(device_kind: str) -> dict[str, int]:
    """Of a program that makes steps of one token. On a CPU a product with one vector then reads a
    line of the cache, 64 bytes, of each row at a time, where the processor can; XLA's own choice
    is half of one (docs/performance.md)."""
    return {"xla_cpu_prefer_vector_width": 512} if device_kind.lower() == "cpu" else {}
