"""Answers held to regular expressions and JSON schemas, by Python's own `re` and `json`."""

import json
import re

import jax
import numpy as np
import pytest
import small

from jaxlm import mesh
from jaxlm.config import Config, ModelConfig
from jaxlm.data.tokenizer import Bytes
from jaxlm.generate import constrained, decode
from jaxlm.generate.sampling import Sampling
from jaxlm.schema import UserError

pytest.importorskip("llguidance", reason="needs the extra constrain")

MODEL = ModelConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=256, seq_len=32)
PROMPTS = [np.array(p, np.int32) for p in ([65], [66, 67, 68])]
PIECES = ("[a-f]{1,3}", "(foo|bar|ba)", "[0-9]{2}", "x?", "[^a-z]{1,2}", "(ab){1,2}", "é|日本")


@pytest.fixture(autouse=True)
def one_device():
    on = mesh.make(Config(model=MODEL), jax.devices()[:1])
    with jax.set_mesh(on), small.compiled_quickly():
        yield


def texts(grammar: str, how: Sampling, new: int = 128) -> list[str]:
    params = small.sharded(Config(model=MODEL), small.params(Config(model=MODEL)))
    ids = constrained.generate(MODEL, params, Bytes(), PROMPTS, new, grammar, how)
    return [bytes(row.tolist()).decode() for row in ids]


MANY = [6, pytest.param(50, marks=pytest.mark.slow)]


@pytest.mark.parametrize("n", MANY)
def test_answers_match_random_regular_expressions(n: int) -> None:
    rng, found = np.random.default_rng(0), set()
    for seed in range(n):
        pattern = "".join(f"({PIECES[i]})" for i in rng.integers(0, len(PIECES), 4))
        how = Sampling(temperature=float(seed % 3), seed=seed)
        for text in texts(constrained.grammar(regex=pattern), how):
            assert re.fullmatch(pattern, text), (pattern, text)
            found.add(text)
    assert len(found) > 1.5 * n


def schema(rng: np.random.Generator, depth: int = 2) -> dict:
    kind = rng.integers(0, 6 if depth else 4)
    if kind < 4:
        low = int(rng.integers(-20, 20))
        return (
            {"type": "boolean"},
            {"type": "integer", "minimum": low, "maximum": low + 30},
            {"enum": ["red", "größer", 7, None]},
            {"type": "string", "maxLength": 3},
        )[kind]
    inner = [schema(rng, depth - 1) for _ in range(2)]
    if kind == 4:
        return {"type": "array", "items": inner[0], "minItems": 1, "maxItems": 3}
    return {
        "type": "object", "properties": {"a": inner[0], "b": inner[1]}, "required": ["a"],
        "additionalProperties": False,
    }  # fmt: skip


def fits(value, schema: dict) -> bool:
    """What the schemas above mean."""
    if "enum" in schema:
        return value in schema["enum"]
    if schema["type"] == "boolean":
        return isinstance(value, bool)
    if schema["type"] == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if schema["type"] == "string":
        return isinstance(value, str) and len(value) <= 3
    if schema["type"] == "array":
        return 1 <= len(value) <= 3 and all(fits(v, schema["items"]) for v in value)
    inner = schema["properties"]
    return "a" in value and all(k in inner and fits(v, inner[k]) for k, v in value.items())


@pytest.mark.parametrize("n", MANY)
def test_answers_fit_random_schemas(n: int) -> None:
    rng, found = np.random.default_rng(1), set()
    for seed in range(n):
        wanted = schema(rng)
        how = Sampling(temperature=float(seed % 3), seed=seed)
        for text in texts(constrained.grammar(json_schema=wanted), how):
            assert fits(json.loads(text), wanted), (wanted, text)
            found.add(text)
    assert len(found) > n


@pytest.mark.slow
def test_what_everything_matches_is_what_is_said_anyway() -> None:
    params = small.sharded(Config(model=MODEL), small.params(Config(model=MODEL)))
    ascii_only = tuple((i, -1e9) for i in range(256) if not 32 <= i < 127)
    how = Sampling(temperature=0.7, seed=3, logit_bias=ascii_only)
    plain = decode.generate(MODEL, params, PROMPTS, 12, None, how)
    found = constrained.generate(
        MODEL, params, Bytes(), PROMPTS, 12, constrained.grammar(regex="[ -~]{20}"), how
    )
    np.testing.assert_array_equal(found, plain)


def test_what_is_no_pattern_is_refused() -> None:
    with pytest.raises(UserError, match="regex: "):
        constrained.grammar(regex="(a")
    with pytest.raises(UserError, match="json_schema: "):
        constrained.grammar(json_schema={"type": "nonsense"})
    with pytest.raises(UserError, match="constraint: expected a regular expression or"):
        constrained.grammar()


ONE = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize("rules", [{"regex": "ab7"}, {"json_schema": ONE}])
def test_what_the_tokens_cannot_spell_is_refused_in_one_line(rules) -> None:
    """Neither cut short, as if it had come to its end, nor told with the library's state."""
    params = small.sharded(Config(model=MODEL), small.params(Config(model=MODEL)))
    given = small.words(), PROMPTS, 12, constrained.grammar(**rules), Sampling(0.0)
    with pytest.raises(UserError, match=r"^constraint: the model's tokens cannot [^\n]*$"):
        constrained.generate(MODEL, params, *given)
