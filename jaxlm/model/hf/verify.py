"""Whether a folder's checkpoint computes what our parameters compute."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.model import transformer
from jaxlm.model.hf import load
from jaxlm.model.hf.source import read_object
from jaxlm.model.transformer import Params, Source

ROWS, TOKENS = 8, 32


def differences(config: ModelConfig, params: Params, folder: Path) -> dict[str, float | None]:
    """Largest |Δlogit| on random tokens: of the folder read back here, and of `transformers`'
    model of it (None where PyTorch or transformers is not installed). The mesh must be set."""
    t = min(TOKENS, config.seq_len)
    ids_bt = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, t), dtype=np.int32)
    ours = np.asarray(_jitted(config, params, ids_bt))
    again = load.open_folder(folder)
    found: dict[str, float | None] = {
        "jaxlm": _largest(np.asarray(_jitted(again.config, load.load(again), ids_bt)), ours),
        "transformers": None,
    }
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        found["transformers"] = _largest(torch_output(folder, ids_bt), ours)
    return found


def _largest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def output(config: ModelConfig, params: Params, ids_bt: jax.Array) -> jax.Array:
    """What a checkpoint of this kind is for, float32: logits [b, t, v], of classes [b, c], or of a
    bare encoder the hidden states [b, t, d]. An encoder–decoder reads the ids backwards too, as its
    source."""
    where_bt = jnp.broadcast_to(jnp.arange(ids_bt.shape[1], dtype=jnp.int32), ids_bt.shape)
    ones_bt = jnp.ones_like(where_bt)
    if config.architecture == "encoder" and not config.mlm_head:
        x_btd = transformer.hidden(config, params, ids_bt, where_bt, ones_bt)
        if not config.n_classes:
            return x_btd
        return transformer.pooled(config, params, x_btd, ones_bt)
    both = config.architecture == "encoder_decoder"
    source = Source(ids_bt[:, ::-1], where_bt, ones_bt) if both else None
    return transformer.apply(config, params, ids_bt, source=source)


_jitted = jax.jit(output, static_argnums=0)


def torch_output(folder: Path, ids_bt: np.ndarray) -> np.ndarray:
    """The same by the architecture of `transformers` that config.json names."""
    import torch
    import transformers

    kind = read_object(folder / "config.json")["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(np.asarray(ids_bt, np.int64))
    source = {"input_ids": ids.flip(1), "decoder_input_ids": ids}
    with torch.no_grad():
        out = model(**source) if model.config.is_encoder_decoder else model(ids)
    return (out.logits if "logits" in out else out.last_hidden_state).numpy()
