"""What is seen of a model while it trains: its expectations, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlm.config import Config
from jaxlm.data.tokenizer import EOS, Subword, Tokenizer, byte_letters
from jaxlm.generate import decode, written
from jaxlm.generate.sampling import Sampling
from jaxlm.train.loop import Observer


def check_prompts(config: Config, tokenizer: Tokenizer) -> None:
    """Raises UserError, before training, for `train.probes` or `train.sample_prompts` that could
    not be answered during it."""
    t = config.train
    decode.check(config.model, tokenizer.encode_batch(t.probes), 1, "config.train.probes")
    if t.sample_prompts:
        ids = tokenizer.encode_batch(t.sample_prompts)
        decode.check(config.model, ids, t.sample_tokens, "config.train.sample_prompts")


def probes(tokenizer: Tokenizer, prompts: Sequence[str], k: int = 5) -> Observer:
    """An observer that logs what the model expects after each prompt: rows of "probe/prompt" and
    "probe/top", the `k` most likely next tokens as [text, probability], most likely first."""
    ids = tokenizer.encode_batch(prompts)

    def observe(config: Config, params: Any, step: int) -> list[dict[str, Any]]:
        rows = []
        for prompt, top in zip(prompts, decode.expected(config.model, params, ids, k), strict=True):
            pairs = [[token_text(tokenizer, i), share] for i, share in top]
            rows.append({"step": step, "probe/prompt": prompt, "probe/top": pairs})
        return rows

    return observe


def samples(tokenizer: Tokenizer, prompts: Sequence[str], tokens: int, seed: int) -> Observer:
    """An observer that logs a draw of at most `tokens` tokens after each prompt: rows of
    "sample/prompt" and "sample/text". The seed is the same at each step: what changes is the
    model."""

    def observe(config: Config, params: Any, step: int) -> list[dict[str, Any]]:
        ids = tokenizer.encode_batch(prompts)
        given = tokenizer, ids, tokens, Sampling(seed=seed)
        found = written.continuations(config.model, params, *given)
        return [
            {"step": step, "sample/prompt": prompt, "sample/text": said.text}
            for prompt, said in zip(prompts, found, strict=True)
        ]

    return observe


def token_text(tokenizer: Tokenizer, i: int) -> str:
    """What one token stands for, always readable: a byte that is no text by itself as '\\xe3'."""
    text = tokenizer.decode([i])
    if i == tokenizer.eos_id:
        return EOS
    if tokenizer.kind == "bytes" and i < tokenizer.vocab_size:
        return bytes([i]).decode(errors="backslashreplace")
    if text and "\ufffd" not in text:
        return text
    letters = byte_letters()
    name = tokenizer.inner.id_to_token(i) if isinstance(tokenizer, Subword) else None
    if name and all(c in letters for c in name):
        return bytes(letters[c] for c in name).decode(errors="backslashreplace")
    return f"<{i}>"
