"""Whether a folder's checkpoint computes what our parameters compute."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.model import transformer
from jaxlm.model.hf import load
from jaxlm.model.hf.source import read_object
from jaxlm.model.transformer import Params

ROWS, TOKENS = 8, 32


def differences(config: ModelConfig, params: Params, folder: Path) -> dict[str, float | None]:
    """Largest |Δlogit| on random tokens: of the folder read back here, and of `transformers`'
    model of it (None where PyTorch or transformers is not installed). The mesh must be set."""
    t = min(TOKENS, config.seq_len)
    ids_bt = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, t), dtype=np.int32)
    ours = _logits(config, params, ids_bt)
    again = load.open_folder(folder)
    found: dict[str, float | None] = {
        "jaxlm": _largest(_logits(again.config, load.load(again), ids_bt), ours),
        "transformers": None,
    }
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        found["transformers"] = _largest(torch_logits(folder, ids_bt), ours)
    return found


def _logits(config: ModelConfig, params: Params, ids_bt: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(transformer.apply, static_argnums=0)(config, params, ids_bt))


def _largest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def torch_logits(folder: Path, ids_bt: np.ndarray) -> np.ndarray:
    """Float32 logits [b, t, v] of the architecture that config.json names."""
    import torch
    import transformers

    kind = read_object(folder / "config.json")["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(np.asarray(ids_bt, np.int64))).logits.numpy()
