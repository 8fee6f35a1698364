"""`jaxlm doctor`: what this machine is, and what is missing for what."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = (
    "jaxlm",
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers",
    "matplotlib", "fsspec",
)  # fmt: skip
EXTRAS = {
    "gs:// workdirs": ("gcsfs", "gcs"),
    "GGUF files": ("gguf", "gguf"),
    "--track=tensorboard viewer": ("tensorboard", "tensorboard"),
    "--track=wandb": ("wandb", "wandb"),
    "--track=trackio": ("trackio", "trackio"),
    "plans for absent TPUs": ("libtpu", "tpu"),
    "Ray clusters": ("ray", "ray"),
    "benchmarks against PyTorch": ("torch", "bench"),
}


def examine() -> dict[str, Any]:
    """Everything that the text shows, as JSON values; `problems` is empty on a healthy machine."""
    import jax

    problems: list[str] = []
    devices: list[str] = []
    try:
        devices = [f"{d.device_kind} ({d.platform})" for d in jax.devices()]
    except RuntimeError as e:
        problems.append(f"no devices: {str(e).splitlines()[0]}")
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed: pip install -e .")
    if shutil.disk_usage(Path.cwd()).free < 2 << 30:
        problems.append("less than 2 GiB of disk are free here")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "format": "jaxlm.doctor/1",
        "versions": versions,
        "devices": devices,
        "cores": cores,
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "free_disk_gib": round(shutil.disk_usage(Path.cwd()).free / 2**30, 1),
        "compilation_cache": jax.config.values.get("jax_compilation_cache_dir")
        or "~/.cache/jaxlm/xla",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "extras": {
            use: {"installed": importlib.util.find_spec(module) is not None, "extra": extra}
            for use, (module, extra) in EXTRAS.items()
        },
        "problems": problems,
    }


def text(found: dict[str, Any]) -> str:
    lines = [f"{name:<17} {version}" for name, version in found["versions"].items()]
    lines += [
        f"{'devices':<17} {len(found['devices'])} × {', '.join(sorted(set(found['devices'])))}",
        f"{'cores':<17} {found['cores']} (load {found['load_1min']})",
        f"{'free disk':<17} {found['free_disk_gib']} GiB",
        f"{'compile cache':<17} {found['compilation_cache']}",
        f"{'XLA_FLAGS':<17} {found['xla_flags'] or '–'}",
    ]
    for use, state in found["extras"].items():
        have = "yes" if state["installed"] else f"no: pip install -e '.[{state['extra']}]'"
        lines.append(f"{use:<28} {have}")
    lines += [f"problem: {p}" for p in found["problems"]] or ["no problems found"]
    return "\n".join(lines)
