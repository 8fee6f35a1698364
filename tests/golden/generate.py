"""What transformers' `generate` says with the tiny models beside this file.

    pip install -e '.[parity]' && python tests/golden/generate.py

writes generated.npz into the folders of `NAMES`: for each prompt (rows, -1 behind the end) the
answers that the ways of `WAYS` find. Each prompt is continued alone, so that no padding of theirs
is in it; and without their cache, which of a T5 has as many layers as its encoder.
tests/test_decoding.py compares with these files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

HERE = Path(__file__).parent
NAMES = ("gpt2", "llama3", "mistral", "t5")
EOS = 2
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "repetition": {"repetition_penalty": 1.4},
    "bias": {"sequence_bias": [[[7], 3.0], [[11], -20.0]]},
    "beams": {"num_beams": 3},
    "long_beams": {"num_beams": 3, "length_penalty": 2.0},
    "short_beams": {"num_beams": 3, "length_penalty": -1.0},
}


def prompts(n: int, shortest: int, longest: int, vocab: int = 64) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    lengths = rng.integers(shortest, longest + 1, n)
    return [rng.integers(3, vocab, length).astype(np.int32) for length in lengths]


def answers(model: Any, given: list[np.ndarray], new: int, way: dict[str, Any]) -> np.ndarray:
    """int32 [prompts, new], -1 from the end of text on."""
    out = np.full((len(given), new), -1, np.int32)
    how = {
        "max_new_tokens": new, "do_sample": False, "eos_token_id": EOS, "pad_token_id": 0,
        "early_stopping": False if way.get("num_beams") else None, "use_cache": False,
    }  # fmt: skip
    for row, prompt in zip(out, given, strict=True):
        ids = torch.tensor(prompt[None], dtype=torch.int64)
        [whole] = model.generate(ids, attention_mask=torch.ones_like(ids), **how, **way).numpy()
        more = whole[1 if model.config.is_encoder_decoder else len(prompt) :]
        more = more[: np.argmax(more == EOS)] if EOS in more else more
        row[: len(more)] = more
    return out


def load(folder: Path) -> Any:
    kind = hf.AutoConfig.from_pretrained(folder)
    auto = hf.AutoModelForSeq2SeqLM if kind.is_encoder_decoder else hf.AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def main() -> None:
    given = prompts(6, 1, 11)
    for name in NAMES:
        model = load(HERE / name)
        arrays = {way: answers(model, given, 20, how) for way, how in WAYS.items()}
        np.savez_compressed(HERE / name / "generated.npz", **arrays)


if __name__ == "__main__":
    main()
