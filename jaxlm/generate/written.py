"""What a model says as text: where an answer begins, where it ends, how likely it was."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxlm.config import ModelConfig
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.generate import beams, constrained, decode, speculative
from jaxlm.generate.sampling import Sampling
from jaxlm.generate.speculative import Draft
from jaxlm.model.transformer import Params
from jaxlm.schema import UserError


@dataclass(frozen=True, eq=False)
class Continuation:
    """What follows a prompt."""

    text: str
    token_ids: np.ndarray  # int32 [tokens], to the one that completed a stop string
    log_probs: np.ndarray  # float32 [tokens], of the model: before bias, penalties and the rest
    finish_reason: Literal["stop", "length"]  # end of text or a stop string; or else `length`


def continuations(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    sampling: Sampling,
    stops: str | Sequence[str] = (),
) -> list[Continuation]:
    """What follows each prompt, up to the end of text or the first of the strings `stops`, which
    end a row soon after they were said. As `decode.answers`."""

    def text_of(i: int, ids: np.ndarray) -> str:
        return follows(config, tokenizer, prompts[i], ids)

    def stopped(i: int, ids: np.ndarray) -> bool:
        text = text_of(i, ids)
        return until(text, stops) != text

    enough = stopped if any(stops) else None
    given = prompts, max_new_tokens, tokenizer.eos_id, sampling, enough
    found = []
    for i, answer in enumerate(decode.answers(config, params, *given)):
        ids, ended = answer.ids, answer.ended
        if enough is not None and stopped(i, ids):
            ended, tokens = True, range(len(ids) + 1)
            ids = ids[: bisect.bisect_left(tokens, True, key=lambda n: stopped(i, ids[:n]))]
        reason: Literal["stop", "length"] = "stop" if ended else "length"
        text = until(text_of(i, ids), stops)
        found.append(Continuation(text, ids, answer.log_probs[: len(ids)], reason))
    return found


def best(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    n_beams: int,
    length_penalty: float,
    stops: str | Sequence[str] = (),
) -> list[list[str]]:
    """The texts of what `beams.search` finds, cut before the first of `stops`."""
    given = prompts, max_new_tokens, tokenizer.eos_id, n_beams, length_penalty
    found = beams.search(config, params, *given)
    return [
        [until(follows(config, tokenizer, prompt, ids), stops) for ids in answers]
        for prompt, answers in zip(prompts, found, strict=True)
    ]


def led(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    sampling: Sampling,
    by: Draft | str,
    stops: str | Sequence[str] = (),
) -> list[str]:
    """What follows each prompt, proposed by a draft or held to a grammar (`constrained.grammar`),
    cut before the first of `stops`."""
    if isinstance(by, Draft):
        given = by, prompts, max_new_tokens, tokenizer.eos_id, sampling
        found = [answer.ids for answer in speculative.generate(config, params, *given)]
    else:
        rules = tokenizer, prompts, max_new_tokens, by, sampling
        found = constrained.generate(config, params, *rules)
    pairs = zip(prompts, found, strict=True)
    return [until(follows(config, tokenizer, prompt, ids), stops) for prompt, ids in pairs]


def follows(config: ModelConfig, tokenizer: Tokenizer, prompt: np.ndarray, new: np.ndarray) -> str:
    """Text of `new` after `prompt`: some tokenizers drop the space before a text's first word. (An
    encoder–decoder's answer is a text of its own.)"""
    if config.architecture == "encoder_decoder":
        return tokenizer.decode(new)
    whole, before = tokenizer.decode(np.concatenate([prompt, new])), tokenizer.decode(prompt)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new)


def until(text: str, stops: str | Sequence[str]) -> str:
    """`text` before the first of `stops` in it."""
    stops = [stops] if isinstance(stops, str) else stops
    return text[: min((i for i in map(text.find, filter(None, stops)) if i >= 0), default=None)]


def limits(lengths: list[int], new: int | None, whole: int | None) -> list[int]:
    """How many new tokens each prompt of these lengths may have: `new`, or up to `whole` tokens
    with the prompt's; 64 where neither is given. Raises UserError."""
    if new is not None and whole is not None:
        raise UserError("max_length and max_new_tokens: expected one of them, got both")
    if whole is None:
        return [64 if new is None else new] * len(lengths)
    for i, n in enumerate(lengths):
        if n >= whole:
            raise UserError(f"max_length: {whole}, but prompts[{i}] has {n} tokens already")
    return [whole - n for n in lengths]
