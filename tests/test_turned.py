"""Matrices as decoding reads them, in 32, 8 and 4 bits, against numpy."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx
from jax import P

from jaxlm import mesh
from jaxlm.config import Config, MeshConfig, ModelConfig
from jaxlm.data.tokenizer import Bytes
from jaxlm.generate import decode, layout
from jaxlm.generate.sampling import Sampling
from jaxlm.language_model import LanguageModel
from jaxlm.model.parts import times
from jaxlm.model.turned import turned
from jaxlm.schema import UserError

MODEL = ModelConfig(d_model=16, n_layers=2, n_heads=4, vocab_size=256, seq_len=32)
FORMULAS = {  # of the product: the matrix's shape and axes, how many of them are inputs
    "btd,dhk->bthk": ((16, 4, 6), ("d_model", "heads", "d_head"), 1),
    "bthk,hkd->btd": ((4, 6, 16), ("heads", "d_head", "d_model"), 2),
    "btd,df->btf": ((16, 24), ("d_model", "d_ff"), 1),
    "btf,fd->btd": ((24, 16), ("d_ff", "d_model"), 1),
}


@pytest.fixture(autouse=True)
def one_device():
    on = mesh.make(Config(model=MODEL), jax.devices()[:1])
    with jax.set_mesh(on), small.compiled_quickly():
        yield on


def kept(w: np.ndarray, axes: tuple[str, ...], bits: int = 32) -> nnx.Param:
    return nnx.Param(turned(jnp.array(w), axes, bits), axes=axes)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("t", [1, pytest.param(9, marks=pytest.mark.slow)])
def test_a_product_is_numpys(formula: str, t: int) -> None:
    shape, axes, n = FORMULAS[formula]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, t, *shape[:n])).astype(np.float32)
    w = rng.normal(size=shape).astype(np.float32)
    want = np.einsum(formula, x.astype(np.float64), w.astype(np.float64))
    layout = P(*[None] * want.ndim)
    np.testing.assert_allclose(times(formula, jnp.array(x), kept(w, axes), layout), want, atol=1e-5)
    got = np.asarray(times(formula, jnp.array(x), kept(w, axes, 8), layout))
    # Half a step of each weight and each activation, and of both.
    flat_x = np.abs(x.reshape(2, t, -1))
    flat_w = np.abs(w.reshape(flat_x.shape[-1], -1))
    step_x, step_w = flat_x.max(-1, keepdims=True) / 127, flat_w.max(0) / 127
    bound = flat_x.sum(-1, keepdims=True) * step_w / 2 + step_x * flat_w.sum(0) / 2
    bound = (bound + len(flat_w) * step_x * step_w / 4).reshape(want.shape)
    assert (np.abs(got - want) <= bound + 1e-5).all()
    assert np.abs(got - want).max() > 1e-4  # it is in 8 bits


IN_4_BITS = {  # the same products, of inputs in pairs of groups
    "btd,dhk->bthk": ((128, 4, 6), ("d_model", "heads", "d_head"), 1),
    "bthk,hkd->btd": ((4, 16, 24), ("heads", "d_head", "d_model"), 2),
}


@pytest.mark.parametrize("formula", IN_4_BITS)
@pytest.mark.parametrize("t", [1, pytest.param(9, marks=pytest.mark.slow)])
def test_a_product_in_4_bits_is_numpys_of_what_was_packed(formula: str, t: int) -> None:
    shape, axes, n = IN_4_BITS[formula]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, t, *shape[:n])).astype(np.float32)
    w = rng.normal(size=shape).astype(np.float32)
    param = kept(w, axes, 4)
    found = jax.tree.map(np.asarray, param.get_value())
    flat_w = w.reshape(-1, int(np.prod(shape[n:]))).T
    packed = found.values.view(np.uint8).reshape(len(flat_w), -1, 1, 32)
    whole = np.concatenate([packed & 15, packed >> 4], axis=2).astype(np.int8)
    whole = np.where(whole > 7, whole - 16, whole) * found.factors.reshape(*whole.shape[:3], 1)
    near = whole.reshape(flat_w.shape) * found.scale[:, None].astype(np.float64)
    theirs = gguf.quants.quantize(flat_w, gguf.GGMLQuantizationType.Q4_0)
    theirs = gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType.Q4_0)
    assert np.square(near - flat_w).mean() < np.square(theirs - flat_w).mean()
    got = np.asarray(times(formula, jnp.array(x), param, P(*[None] * (2 + len(shape) - n))))
    flat_x = x.reshape(2, t, -1)
    want = (flat_x @ near.T).reshape(got.shape)
    step_x = np.abs(flat_x).max(-1, keepdims=True) / 127
    bound = (step_x / 2 * np.abs(near).sum(1)).reshape(got.shape)
    assert (np.abs(got - want) <= bound + 1e-5).all()


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "alike", "size"), [(8, 0.99, 0.35), (4, 0.9, 0.25)])
def test_a_model_in_few_bits_says_nearly_the_same(one_device, bits, alike, size) -> None:
    config = dataclasses.replace(MODEL, d_model=64, tie_embeddings=False)
    params = small.sharded(Config(model=config), small.params(Config(model=config)))
    model = LanguageModel(Bytes(), config, params, one_device)
    light = model.in_bits(bits)
    ids = np.arange(65, 90, dtype=np.int32)[None]
    a, b = np.asarray(model.logits(ids)), np.asarray(light.logits(ids))
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > alike and np.abs(a - b).max() > 1e-3
    sizes = [sum(x.nbytes for x in jax.tree.leaves(m.params["layers"])) for m in (model, light)]
    assert sizes[1] < size * sizes[0]
    [[alone]] = light.generate("A", max_new_tokens=8, temperature=0)
    together = light.generate(["A", "BCD"], max_new_tokens=8, temperature=0)
    assert together[0] == [alone]
    [[drafted]] = light.generate("A", max_new_tokens=8, temperature=0, draft=light)
    assert drafted == alone
    with pytest.raises(UserError, match="num_beams, draft, regex or json_schema: expected one"):
        light.generate("A", draft=light, num_beams=2)


def test_queries_keys_and_values_of_few_heads_are_one_matrix(one_device) -> None:
    config = dataclasses.replace(MODEL, n_heads=4, n_kv_heads=2, bias=True, qk_norm=True)
    params = small.params(Config(model=config))
    with jax.set_mesh(one_device):
        laid = layout.laid_out(config, small.sharded(Config(model=config), params))
        assert [layer["attention"]["query"].outputs[0] for layer in laid["layers"]] == [
            8
        ] * config.n_layers
        found = decode.generate(config, laid, [np.arange(65, 80, dtype=np.int32)], 8, None,
                                Sampling(0.0))[0]  # fmt: skip
    model = LanguageModel(Bytes(), config, small.sharded(Config(model=config), params), one_device)
    ids = np.arange(65, 80)
    for token in found:
        assert np.asarray(model.logits(ids[None].astype(np.int32)))[0, -1].argmax() == token
        ids = np.append(ids, token)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_eight_devices_say_what_one_says(bits: int) -> None:
    model = dataclasses.replace(MODEL, d_model=256)
    config = Config(model=model, mesh=MeshConfig(data=1, fsdp=2, tensor=4))
    ids = np.arange(65, 90, dtype=np.int32)
    found = []
    for on in (mesh.make(Config(model=model), jax.devices()[:1]), mesh.make(config)):
        with jax.set_mesh(on):
            params = small.sharded(config, small.params(config))
            laid = layout.laid_out(model, params, bits=bits)
            packed = [layer["feed_forward"]["down"].factors is not None for layer in laid["layers"]]
            assert packed == [bits == 4] * model.n_layers
            found.append(decode.generate(model, laid, [ids], 8, None, Sampling(0.0))[0])
    np.testing.assert_array_equal(found[0], found[1])
