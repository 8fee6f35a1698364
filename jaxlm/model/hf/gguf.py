"""A GGUF file of the Llama family as a checkpoint: dequantised, under Hugging Face's names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.files import first_line
from jaxlm.schema import UserError

_ARCHITECTURE = "llama"

# config.json key → metadata key below "llama."
_KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}


class Gguf:
    """The tensors of one GGUF file, each dequantised when it is read.

    `config` is what its config.json would say, `metadata` what the file says (for the tokenizer).
    Raises UserError for a file that is damaged, of another architecture, or of a type that the
    `gguf` package cannot dequantise, and where that package is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        with _told(path):
            import gguf

            reader = gguf.GGUFReader(path)
            self.metadata = {name: field.contents() for name, field in reader.fields.items()}
            self._tensors = {t.name: t for t in reader.tensors}
        self.config = self._config()
        self._names = self._renamed()
        for tensor in self._tensors.values():
            self._check_type(tensor)

    def _get(self, key: str) -> Any:
        value = self.metadata.get(f"{_ARCHITECTURE}.{key}")
        if value is None:
            raise UserError(f"{self.where}: no {_ARCHITECTURE}.{key} in its metadata")
        return value

    def _config(self) -> dict[str, Any]:
        found = self.metadata.get("general.architecture")
        if found != _ARCHITECTURE:
            raise UserError(f"{self.where}: architecture {found!r}; only {_ARCHITECTURE!r} is read")
        if self.metadata.get(f"{_ARCHITECTURE}.expert_count"):
            raise UserError(f"{self.where}: mixtures of experts are not read from GGUF")
        values = {theirs: self._get(key) for theirs, key in _KEYS.items()}
        # float32 in the file: 1e-5 comes as 9.999999747e-06
        values = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise UserError(f"{self.where}: no token_embd.weight in it")
        return {
            **values,
            "model_type": "llama",
            "vocab_size": int(embedding.shape[1]),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
        }

    def _renamed(self) -> dict[str, str]:
        """Hugging Face's name → GGUF's; what has no such name keeps its own."""
        import gguf

        n = self.config["num_hidden_layers"]
        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, n)
        hf = {f"model.layers.{i}.{part}" for i in range(n) for part in _PARTS}
        hf |= {"model.embed_tokens", "model.norm", "lm_head"}
        names = {f"{known.get_name(name)}.weight": f"{name}.weight" for name in hf}
        return {names.get(name, name): name for name in self._tensors}

    def _check_type(self, tensor: Any) -> None:
        import gguf

        try:
            gguf.quants.dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"{self.where}: {tensor.name} is {kind}, which is not read") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """GGUF counts its axes from the fastest."""
        return {
            name: tuple(int(n) for n in reversed(self._tensors[own].shape))
            for name, own in self._names.items()
        }

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        import gguf

        tensor = self._tensors[self._names[name]]
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        part = tensor.name.split(".")[-2]
        if part in heads:
            whole = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            return _half_split(whole, self.config[heads[part]])[slices]
        rows = gguf.quants.dequantize(tensor.data[slices[0]], tensor.tensor_type)
        return rows[(slice(None), *slices[1:])]


_PARTS = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip


def _half_split(w_rd: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's rotary pairs are rows (2i, 2i + 1) of each head; ours are (i, i + k/2)."""
    rows, d = w_rd.shape
    return w_rd.reshape(heads, rows // heads // 2, 2, d).swapaxes(1, 2).reshape(rows, d)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the library raises (anything, on a damaged file), as one line."""
    try:
        yield
    except ModuleNotFoundError as e:
        raise UserError(f"{path}: needs the gguf package: pip install 'jaxlm[gguf]'") from e
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{path}: no readable GGUF file: {first_line(e)}") from e
