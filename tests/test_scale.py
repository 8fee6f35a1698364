"""Counts against published models, FLOPs against what XLA and the traced program count."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
import reference
import small

from jaxlm.config import ModelConfig
from jaxlm.model import scale, transformer
from jaxlm.train import losses


def gpt(d_model, n_layers, n_heads, seq_len):
    return ModelConfig(
        d_model=d_model, n_layers=n_layers, n_heads=n_heads, seq_len=seq_len, vocab_size=50257,
        norm="layernorm", positions="learned", bias=True, tie_embeddings=True,
    )  # fmt: skip


def llama(d_model, n_layers, n_heads, d_ff, vocab_size, **rest):
    return ModelConfig(
        d_model=d_model, n_layers=n_layers, n_heads=n_heads, d_ff=d_ff, vocab_size=vocab_size,
        activation="swiglu", **{"tie_embeddings": False, **rest},
    )  # fmt: skip


# Parameters of the released checkpoints (the sizes of their tensors added up).
PUBLISHED = {
    "GPT-2 124M": (gpt(768, 12, 12, 1024), 124_439_808),
    "GPT-2 355M": (gpt(1024, 24, 16, 1024), 354_823_168),
    "GPT-2 774M": (gpt(1280, 36, 20, 1024), 774_030_080),
    "GPT-2 1.5B": (gpt(1600, 48, 25, 1024), 1_557_611_200),
    "Llama 2 7B": (llama(4096, 32, 32, 11008, 32000), 6_738_415_616),
    "Llama 3 8B": (llama(4096, 32, 32, 14336, 128256, n_kv_heads=8), 8_030_261_248),
    "Qwen3 0.6B": (
        llama(
            1024, 28, 16, 3072, 151936, n_kv_heads=8, d_head=128, qk_norm=True, tie_embeddings=True
        ),
        596_049_920,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    model, count = PUBLISHED[name]
    assert scale.size(model).params == count


def test_gpt3_has_the_size_that_its_paper_gives():
    """Brown et al. 2020, table 2.1: 175.0B with d_model 12288, 96 layers, 96 heads of 128."""
    model = gpt(12288, 96, 96, 2048)
    assert model.head_dim == 128
    assert round(scale.size(model).params / 1e9) == 175


def test_embeddings_are_counted_apart():
    model, count = PUBLISHED["GPT-2 124M"]
    assert scale.size(model).params_non_embedding == count - (50257 + 1024) * 768


def gradient(model, b):
    """The gradient of the loss as a function of abstract arguments, and these."""
    t = model.seq_len
    ints = jax.ShapeDtypeStruct((b, t), jnp.int32)
    params = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0)))

    def loss(params, tokens, targets):
        where = jnp.broadcast_to(jnp.arange(t), (b, t))
        x_btd = transformer.hidden(model, params, tokens, where, jnp.ones((b, t), jnp.int32))
        return losses.token_losses(model, params, x_btd, targets)[0].sum()

    return jax.grad(loss), (params, ints, ints)


def matmul_flops(jaxpr):
    """2 · (all dimensions of a product) over every dot_general, those of inner programs too."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            shape = eqn.invars[0].aval.shape
            depth = math.prod(shape[i] for i in contracted)
            total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += matmul_flops(inner)
    return total


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"activation": "swiglu", "n_kv_heads": 2, "tie_embeddings": False, "qk_norm": True},
        {"d_head": 24, "d_ff": 40, "bias": True, "norm": "layernorm", "positions": "learned"},
    ],
)
def test_flops_are_those_of_every_matrix_product_forward_and_backward(variant):
    model = ModelConfig(
        d_model=64, n_layers=3, n_heads=4, vocab_size=96, seq_len=32, scan_layers=False, **variant
    )
    with small.on_mesh(small.config()):
        f, arguments = gradient(model, 2)
        jaxpr = jax.make_jaxpr(f)(*arguments).jaxpr
    assert matmul_flops(jaxpr) == scale.size(model).flops_per_token * 2 * model.seq_len


def test_flops_agree_with_xla_cost_analysis():
    """XLA also counts elementwise work (norms, softmax, GELU), which is O(1/width): a few per cent
    at this width. So its figure is above ours, and by no more than that."""
    model = ModelConfig(
        d_model=512, n_layers=2, n_heads=4, vocab_size=2048, seq_len=128, scan_layers=False
    )
    with small.on_mesh(small.config()):
        f, arguments = gradient(model, 2)
        counted = jax.jit(f).lower(*arguments).cost_analysis()["flops"]
    ours = scale.size(model).flops_per_token * 2 * model.seq_len
    assert 1.0 < counted / ours < 1.04


def test_effective_parameters_make_six_n_d_exact():
    size = scale.size(gpt(768, 12, 12, 1024))
    assert 6 * size.params_effective == size.flops_per_token
    # Kaplan et al. 2020, §2.1: 2 N forward plus 2 · layers · context · d_attn, thrice for training
    # (theirs halves attention for causality), N without embeddings but with the unembedding's use.
    n = scale.size(gpt(768, 12, 12, 1024)).params_non_embedding + 50257 * 768
    attention = 12 * 12 * 768 * 1024
    assert size.flops_per_token == pytest.approx(6 * n + attention, rel=1e-2)


def test_mup_shrinks_matrices_and_the_output_as_one_over_width():
    """Yang et al. 2022, table 3, Adam: hidden weights and output 1/width, all else 1."""
    standard = ModelConfig(
        d_model=256, base_d_model=64, tie_embeddings=False, bias=True, norm="layernorm"
    )
    mup = dataclasses.replace(standard, parametrization="mup")
    mup = reference.flat(scale.learning_rate_multipliers(mup))
    for path, multiplier in mup.items():
        assert multiplier == (0.25 if path[-1] in reference.MATRICES else 1.0), path
    standard = reference.flat(scale.learning_rate_multipliers(standard))
    assert set(standard.values()) == {1.0}
    at_base = ModelConfig(parametrization="mup", d_model=64, base_d_model=64)
    assert set(reference.flat(scale.learning_rate_multipliers(at_base)).values()) == {1.0}


def test_roles_split_the_parameters():
    model = small.MODEL
    hidden = reference.flat(scale.by_role(model, ("hidden",)))
    assert {p[-1] for p, yes in hidden.items() if yes} == {
        "query", "key", "value", "out", "up", "down",
    }  # fmt: skip
    embeddings = reference.flat(scale.by_role(model, ("embedding",)))
    assert [p for p, yes in embeddings.items() if yes] == [("embedding",)]
