"""Where a checkpoint lies: a local path first, else a name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from jaxlm.files import first_line
from jaxlm.model.hf.source import PICKLES
from jaxlm.schema import UserError

_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model"]
_UNWANTED = ["onnx/*", "openvino/*", "original/*"]


def located(source: str | Path) -> Path:
    """A folder with a config.json, or a .gguf file. A name that is no path is fetched from the hub
    (or its cache); what could run code is not. Raises UserError."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix in PICKLES:
            raise UserError(f"{path}: can run code when it is opened and is not read")
        if path.suffix == ".safetensors":
            return path.parent
        if path.suffix != ".gguf":
            raise UserError(f"{path}: expected a folder, a .gguf file or a name on the hub")
        return path
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if not (path / "config.json").exists() and found:
            if len(found) > 1:
                names = ", ".join(p.name for p in found)
                raise UserError(f"{path}: several GGUF files, name one of {names}")
            return found[0]
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise UserError(f"{source}: no such folder, and not a name on the hub")
    return _fetched(str(source))


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as e:  # of the network, the hub or the name
        raise UserError(
            f"{name}: no such folder, nor to be had from the hub: {first_line(e)}"
        ) from e
