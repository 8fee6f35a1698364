"""Answers that match a regular expression or a JSON schema.

Between two steps llguidance (extra `constrain`) tells which tokens may come next, and the others'
logits become -inf. What is left is chosen as always: among the allowed tokens the model's
probabilities keep their proportions, which is not the model's distribution over all texts that
match.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from jaxlm import mesh
from jaxlm.config import ModelConfig
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.generate import decode, layout
from jaxlm.generate import sampling as draws
from jaxlm.generate.decode import Begun, Prompts
from jaxlm.generate.sampling import Knobs, Method, Said, Sampling
from jaxlm.model.transformer import Params
from jaxlm.schema import UserError


def grammar(regex: str | None = None, json_schema: Any = None) -> str:
    """What answers must match, in llguidance's own words. Raises UserError for what is neither, or
    not understood, and without llguidance."""
    llguidance = _library()
    if (regex is None) == (json_schema is None):
        raise UserError("constraint: expected a regular expression or a JSON schema")
    name = "regex" if json_schema is None else "json_schema"
    try:
        if regex is not None:
            made = llguidance.LLMatcher.grammar_from_regex(regex)
        else:
            schema = json_schema if isinstance(json_schema, str) else json.dumps(json_schema)
            # Without white space, of which a weak model might not find the end.
            how = {"whitespace_flexible": False}
            made = llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=how)
        wrong = llguidance.LLMatcher.validate_grammar(made)
    except ValueError as error:
        wrong = str(error)
    if wrong and not wrong.startswith("WARNING"):
        raise UserError(f"{name}: {' '.join(wrong.split())}")
    return made


def generate(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    grammar: str,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
) -> list[np.ndarray]:
    """As `decode.generate`, of answers that match `grammar`. They end where nothing more may come,
    or where the end of text may and is chosen; one of `max_new_tokens` may be the beginning of what
    matches. Raises UserError, too, where no token of the model's goes on towards what matches."""
    decode.check(config, prompts, max_new_tokens)
    sampling = draws.validate(sampling, config.vocab_size)
    if not prompts:
        return []
    method, devices = draws.method([sampling]), jax.sharding.get_mesh()
    placed = decode.place(prompts)
    rows = placed.tokens_bt.shape[0]
    given = [*prompts, *[np.zeros(1, np.int32)] * (rows - len(prompts))]
    alike = [sampling] * rows
    said = draws.said(method, given, alike, config.vocab_size)
    how = draws.streams(given, sampling.seed), draws.knobs(alike, config.vocab_size)
    laid = layout.laid_out(config, params, rows=rows)
    begun = _starter(config, decode.slots(max_new_tokens), devices)(laid, placed)
    first = matcher(tokenizer, config.vocab_size, grammar)
    matchers = [first.deep_copy() for _ in prompts]
    out: list[list[int]] = [[] for _ in prompts]
    cache, last_b, step = begun.cache, begun.last_b, _stepper(config, method, devices)
    begun = begun._replace(cache=())
    for i in range(max_new_tokens):
        open_ = [j for j, one in enumerate(matchers) if not one.is_stopped()]
        if not open_:
            break
        allowed_bv = allowed({j: matchers[j] for j in open_}, rows, config.vocab_size)
        for j in open_:
            _check(matchers[j])
        last_b, cache, said = step(laid, begun, cache, np.int32(i), last_b, allowed_bv, *how, said)
        for j, token in zip(open_, np.asarray(last_b)[open_].tolist(), strict=True):
            matchers[j].consume_token(token)
            _check(matchers[j])
            if token != tokenizer.eos_id:
                out[j].append(token)
    return [np.array(ids, np.int32) for ids in out]


def _library() -> Any:
    try:
        import llguidance
        import llguidance.numpy
    except ImportError:
        raise UserError("constraint: needs llguidance: pip install 'jaxlm[constrain]'") from None
    return llguidance


def matcher(tokenizer: Tokenizer, vocab_size: int, grammar: str, ends: Collection[int] = ()) -> Any:
    """What tells llguidance's way through `grammar`, at its beginning: each answer has a copy. Of
    subwords, `ends` are the ids that may end it; the end of text unless they are given."""
    words: Any = tokenizer  # hashed by identity
    known = _known(words, vocab_size, tuple(sorted(ends)) or (tokenizer.eos_id,))
    found = _library().LLMatcher(known, grammar, log_level=0)
    _check(found)
    return found


def allowed(matchers: Mapping[int, Any], n: int, vocab_size: int) -> np.ndarray:
    """Bool [n, v]: what may come next in the rows of `matchers`; all of it in others. Where a
    matcher fails nothing may, and it tells so (`is_error`)."""
    library = _library()
    bits = library.numpy.allocate_token_bitmask(n, vocab_size)
    for j, one in matchers.items():
        library.numpy.fill_next_token_bitmask(one, bits, j)
    each = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")
    return each[:, :vocab_size].astype(bool)


def _check(matcher: Any) -> None:
    """Raises UserError where nothing may come next: an error looks like an end otherwise."""
    if matcher.is_error():
        why = matcher.get_error().splitlines()[0]
        raise UserError(f"constraint: the model's tokens cannot go on towards what matches: {why}")


@functools.lru_cache(maxsize=8)
def _known(tokenizer: Any, vocab_size: int, ends: tuple[int, ...]) -> Any:
    """The tokenizer as llguidance knows it."""
    if tokenizer.kind == "bytes":
        return _library().LLTokenizer(_wrapped(vocab_size), n_vocab=vocab_size)
    if tokenizer.kind != "subword":
        raise UserError(f"constraint: expected bytes or subwords, got a {tokenizer.kind} tokenizer")
    spelled = tokenizer.inner.to_str()
    return _library().LLTokenizer(spelled, n_vocab=vocab_size, eos_token=list(ends))


def _wrapped(vocab_size: int) -> Any:
    """Bytes; ids above 255, which a model may have, are none."""
    from llguidance import TokenizerWrapper

    class Spelled:
        eos_token_id, bos_token_id, special_token_ids = 0, None, (0,)
        tokens = (b"<eos>", *(bytes([i]) for i in range(1, 256)), *[b""] * (vocab_size - 256))

        def __call__(self, text: bytes) -> list[int]:
            return list(text)

    return TokenizerWrapper(Spelled())


@functools.lru_cache(maxsize=16)
def _starter(config: ModelConfig, new: int, devices: Any) -> Any:
    del devices  # part of the key: traced for the mesh that is set

    def start(laid: Params, prompts: Prompts) -> Begun:
        return decode.begin(config, laid, prompts, new)

    return jax.jit(start)


@functools.lru_cache(maxsize=16)
def _stepper(config: ModelConfig, method: Method, devices: Any) -> Any:
    """Jitted (laid, begun, cache, i, last_b, allowed_bv, streams_b2, knobs, said) → the next tokens
    [b], and cache and said with them."""
    del devices

    def step(
        laid: Params, begun: Begun, cache: Any, i: Any, last_b: Any, allowed_bv: Any,
        streams_b2: Any, knobs: Knobs, said: Said,
    ) -> tuple[jax.Array, Any, Said]:  # fmt: skip
        logits_bv, cache = begun.logits(config, laid, i, last_b, cache)
        logits_bv = jnp.where(allowed_bv, jax.reshard(logits_bv, P()), -jnp.inf)
        at_b = jax.reshard(begun.lengths_b - 1 + i, P())
        next_b = draws.choose(method, logits_bv, streams_b2, at_b, knobs, said)
        return jax.reshard(next_b, mesh.spec(("batch",))), cache, draws.noted(said, next_b)

    return jax.jit(step, donate_argnums=(2,))
