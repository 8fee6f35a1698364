"""muP and CompleteP: what training does keeps its size with width and depth; standard does not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import reference
import small

from jaxlm import api
from jaxlm.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    validate,
)
from jaxlm.data import shards
from jaxlm.model import scale, transformer
from jaxlm.model.transformer import Declared
from jaxlm.scaling import coordcheck
from jaxlm.schema import UserError


def config(source: Path, parametrization: str, name: str = "adamw") -> Config:
    return Config(
        model=ModelConfig(
            d_model=32, n_layers=2, n_heads=2, d_head=16, seq_len=32, tie_embeddings=False,
            parametrization=parametrization, base_d_model=32, base_n_layers=2,
        ),
        data=DataConfig(sources=(str(source),), eval_fraction=0.1, max_epochs=99),
        optimizer=OptimizerConfig(name=name, learning_rate=5e-3),
        train=TrainConfig(global_batch_size=8),
    )  # fmt: skip


def corpus(folder: Path) -> None:
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"document {i}: the sky is blue, the sea is wide. " * 20)


def spread(tmp_path: Path, chosen: Config, widths: tuple, depths: tuple) -> dict:
    corpus(tmp_path)
    with small.compiled_quickly():
        found = api.coordcheck(
            chosen, tmp_path / "check", widths=widths, depths=depths, steps=4, seeds=1
        )
    assert json.loads((tmp_path / "check" / "coordcheck.json").read_text()) == found
    assert (tmp_path / "check" / "coordcheck.png").stat().st_size > 5000
    return found["spread"]


@pytest.mark.slow
def test_completep_keeps_its_size_and_standard_does_not(tmp_path: Path) -> None:
    """4 x the width and 4 x the depth at once; the control must be able to fail."""
    corpus(tmp_path)
    small_one = config(tmp_path, "completep")  # at its base, where it is the standard
    shards.build(small_one.data, small_one.model.vocab_size, tmp_path / "data")

    def grown(to: Config, **shape: int) -> dict:
        model = dataclasses.replace(to.model, **shape)
        changed = dataclasses.replace(to, model=model, mesh=MeshConfig(data=1))
        with small.compiled_quickly():
            return coordcheck.measure(changed, tmp_path / "data", steps=4)

    base = grown(small_one)
    large = grown(small_one, d_model=128, n_heads=8, n_layers=8)
    wide = grown(config(tmp_path, "standard"), d_model=128, n_heads=8)
    for quantity in coordcheck.QUANTITIES:
        assert 1 / 1.5 < large[quantity] / base[quantity] < 1.5, quantity
    assert wide["update"] > 3 * base["update"]
    assert wide["logits"] > coordcheck.FLAT * base["logits"]


@pytest.mark.slow
def test_completep_is_flat_over_width_and_depth(tmp_path: Path) -> None:
    found = spread(tmp_path, config(tmp_path, "completep"), (32, 128), (2, 8))
    for direction in ("width", "depth"):
        for quantity, value in found[direction].items():
            assert value < 1.5, (direction, quantity)


@pytest.mark.slow
def test_mup_grows_with_depth(tmp_path: Path) -> None:
    found = spread(tmp_path, config(tmp_path, "mup"), (), (2, 8))
    assert found["depth"]["update"] > 1.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("parametrization", ["standard", "mup", "completep"])
def test_the_whole_range(tmp_path: Path, name: str, parametrization: str) -> None:
    """Widths 32-1024 and depths 2-32, as issue 5 asks."""
    widths, depths = (32, 64, 128, 256, 512, 1024), (2, 4, 8, 16, 32)
    found = spread(tmp_path, config(tmp_path, parametrization, name), widths, depths)
    print(parametrization, name, found)
    flat = [d for d, s in found.items() if max(s.values()) <= coordcheck.FLAT]
    if parametrization == "completep":
        assert flat == ["width", "depth"]
    elif parametrization == "mup":
        assert "width" in flat
    elif name == "adamw":
        assert "width" not in flat


def test_completep_scales_branches_as_its_table_says() -> None:
    """Dey et al. 2025, table 1, alpha = 1, at 4 x the width and 8 x the depth. A branch multiplier
    of 1/8 is carried by the branch's last matrix: in its scale and in its learning rate."""
    base = ModelConfig(d_model=32, n_layers=2, n_heads=2, d_head=16, bias=True, norm="layernorm",
                       tie_embeddings=False)  # fmt: skip
    large = ModelConfig(d_model=128, n_layers=16, n_heads=8, d_head=16, bias=True, norm="layernorm",
                        tie_embeddings=False, parametrization="completep", base_d_model=32,
                        base_n_layers=2)  # fmt: skip
    rates = reference.flat(scale.learning_rate_multipliers(large))
    muon = reference.flat(scale.learning_rate_multipliers(large, hidden_power=0.5))
    rows, old = (reference.flat(transformer.table(m)) for m in (large, base))
    for path, row in rows.items():
        assert isinstance(row, Declared)
        branch = 1 / 8 if path[-1] in ("out", "down", "out_bias", "down_bias") else 1.0
        width = 1 / 4 if row.role in ("hidden", "unembedding") else 1.0
        assert rates[path] == pytest.approx(width * branch), path
        hidden = np.sqrt(width) if row.role == "hidden" else width
        assert muon[path] == pytest.approx(hidden * branch), path
        if row.role == "hidden":
            assert row.std == pytest.approx(old[path].std / 2 * branch), path  # 1/sqrt(4 x width)


def test_completep_at_its_base_is_standard() -> None:
    shape = {"d_model": 64, "n_layers": 2, "base_d_model": 64, "base_n_layers": 2}
    standard, complete = (
        ModelConfig(**shape, parametrization=p) for p in ("standard", "completep")
    )
    assert transformer.table(standard) == transformer.table(complete)
    assert set(reference.flat(scale.learning_rate_multipliers(complete)).values()) == {1.0}


def test_completep_is_refused_where_its_multiplier_would_not_hold() -> None:
    model = ModelConfig(parametrization="completep", norm_placement="post")
    with pytest.raises(UserError, match="pre-norm blocks"):
        validate(Config(model=model))
