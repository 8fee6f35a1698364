"""Counts against published models, FLOPs against what XLA and the traced program count."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
import reference
import small

from jaxlm.config import ModelConfig, validate_model
from jaxlm.model import presets, scale, transformer
from jaxlm.schema import UserError
from jaxlm.train import losses

# Parameters of the released checkpoints: their tensors added up, as their pages say. BERT: with the
# MLM head and without the pooler. Gemma 3 from 4B: the page's total less the vision tower and the
# projector (416,866,032 and 1152 · (d_model + 1)).
PUBLISHED = {
    "gpt2-124m": 124_439_808, "gpt2-355m": 354_823_168, "gpt2-774m": 774_030_080,
    "gpt2-1558m": 1_557_611_200, "pythia-70m": 70_426_624, "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016, "pythia-1b": 1_011_781_632, "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960, "pythia-6.9b": 6_857_302_016, "pythia-12b": 11_846_072_320,
    "bert-base": 109_514_298, "bert-large": 335_174_458, "t5-small": 60_506_624,
    "t5-base": 222_903_552, "t5-large": 737_668_096, "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344, "t5-v1.1-small": 76_961_152, "t5-v1.1-base": 247_577_856,
    "t5-v1.1-large": 783_150_080, "t5-v1.1-xl": 2_849_757_184, "t5-v1.1-xxl": 11_135_332_352,
    "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496, "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496, "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400, "llama3.2-3b": 3_212_749_824, "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384, "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_620_634_112, "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264, "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560, "olmo2-1b": 1_484_916_736, "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400, "olmo2-32b": 32_234_279_936, "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984, "gemma2-27b": 27_227_128_320, "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952, "gemma3-4b": 4_300_079_472 - 416_866_032 - 1152 * 2561,
    "gemma3-12b": 12_187_325_040 - 416_866_032 - 1152 * 3841,
    "gemma3-27b": 27_432_406_640 - 416_866_032 - 1152 * 5377,
}  # fmt: skip
# Brown et al. 2020, table 2.1, in billions.
GPT3 = {
    "125m": 0.125, "350m": 0.350, "760m": 0.760, "1.3b": 1.3, "2.7b": 2.7, "6.7b": 6.7,
    "13b": 13.0, "175b": 175.0,
}  # fmt: skip
# Parameters that a token goes through, in billions: of the 30B, 3.3 (Yang et al. 2025, table 2); of
# Mixtral, 13 (Jiang et al. 2024, §1).
ACTIVE = {"qwen3-30b-a3b": 3.3, "qwen3-235b-a22b": 22.0, "mixtral-8x7b": 13.0}


def test_every_preset_has_a_published_count():
    gpt3 = {f"gpt3-{size}" for size in GPT3}
    assert set(presets.names()) == set(PUBLISHED) | gpt3


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    model = presets.preset(name)
    validate_model(model)
    assert scale.size(model).params == PUBLISHED[name]


@pytest.mark.parametrize("size", GPT3)
def test_gpt3_has_the_sizes_that_its_paper_gives(size):
    model = presets.preset(f"gpt3-{size}")
    assert scale.size(model).params / 1e9 == pytest.approx(GPT3[size], rel=0.025)


@pytest.mark.parametrize("name", ACTIVE)
def test_experts_count_as_far_as_a_token_uses_them(name):
    rows = reference.flat(transformer.table(presets.preset(name)))
    active = sum(math.prod(row.shape) * row.active for row in rows.values())
    assert active / 1e9 == pytest.approx(ACTIVE[name], rel=0.03)


def test_a_preset_of_another_name_is_refused_with_a_hint():
    with pytest.raises(UserError, match="did you mean 'llama3-8b'"):
        presets.preset("llama-3-8b")


def test_embeddings_are_counted_apart():
    counted = scale.size(presets.preset("gpt2-124m"))
    assert counted.params_non_embedding == counted.params - (50257 + 1024) * 768


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
        d_model=512, n_layers=2, n_heads=4, vocab_size=2048, seq_len=64, scan_layers=False
    )  # of a sequence that attention does not cut into blocks, whose future it never computes
    with small.on_mesh(small.config()):
        f, arguments = gradient(model, 2)
        counted = jax.jit(f).lower(*arguments).cost_analysis()["flops"]
    ours = scale.size(model).flops_per_token * 2 * model.seq_len
    assert 1.0 < counted / ours < 1.04


def test_effective_parameters_make_six_n_d_exact():
    size = scale.size(presets.preset("gpt2-124m"))
    assert 6 * size.params_effective == size.flops_per_token
    # Kaplan et al. 2020, §2.1: 2 N forward plus 2 · layers · context · d_attn, thrice for training
    # (theirs halves attention for causality), N without embeddings but with the unembedding's use.
    n = scale.size(presets.preset("gpt2-124m")).params_non_embedding + 50257 * 768
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
