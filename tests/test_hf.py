"""Other people's checkpoints: layouts, golden logits of every family, export, damaged files."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxlm import mesh
from jaxlm.config import Config, MeshConfig, ModelConfig
from jaxlm.model import transformer
from jaxlm.model.hf import export, load, verify
from jaxlm.model.hf.families import FAMILIES
from jaxlm.model.hf.layout import Row, layout
from jaxlm.model.transformer import Declared
from jaxlm.model_config import MoE
from jaxlm.schema import UserError

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


def on(config: ModelConfig, sizes: tuple[int, int, int] = (1, 1, 1)):
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.set_mesh(mesh.make(Config(model=config, mesh=MeshConfig(*sizes)), devices))


def output(config: ModelConfig, params, ids_bt) -> np.ndarray:
    with small.compiled_quickly():
        return np.asarray(jax.jit(verify.output, static_argnums=0)(config, params, ids_bt))


def same(a: dict, b: dict) -> bool:
    """Bitwise, on whatever meshes."""
    pairs = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return jax.tree.all(pairs)


# ----------------------------------------------------------------------------------------- layouts

AXES = {"layers": 3, "d_model": 4, "kv_heads": 2, "heads": 2, "d_head": 6, "experts": 2, "d_ff": 5}
ROWS = (
    (Row("x", "w", "l d (h k)"), ("layers", "d_model", "heads", "d_head")),
    (Row("x", "w.{l}", "(h k) d"), ("layers", "d_model", "heads", "d_head")),
    (Row("x", "w.{l}", "d (n g k)", (1, 3)), ("layers", "d_model", "kv_heads", "d_head")),
    (Row("x", "w.{l}", "(h n k) d", (2, 3)), ("layers", "d_model", "heads", "d_head")),
    (Row("x", "w.{l}.{e}", "f d", add=1.0), ("layers", "experts", "d_model", "d_ff")),
    (Row("x", "w.{l}", "e (n f) d", (0, 2)), ("layers", "experts", "d_model", "d_ff")),
    (Row("x", "w", "D d"), ("d_model", "d_model")),
)


@given(st.sampled_from(ROWS), st.data())
@settings(max_examples=100, deadline=None)
def test_a_slice_is_read_as_the_whole_was_written(case, data) -> None:
    row, axes = case
    one = layout(row, Declared(tuple(AXES[a] for a in axes), axes, "hidden", 1.0, 1.0))
    ours = np.random.default_rng(0).normal(size=one.shape).astype(np.float32)
    theirs = {t.name: np.full(t.shape, np.nan, np.float32) for t in one.tensors()}
    for tensor in one.tensors():
        one.write(ours[one.place(tensor.at)], theirs[tensor.name])
    index = []
    for n in one.shape:
        start = data.draw(st.integers(0, n - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, n))))
    read_sizes = []

    def read(name: str, slices: tuple[slice, ...]) -> np.ndarray:
        read_sizes.append(theirs[name][slices].size)
        return theirs[name][slices]

    got = one.read(index, read)
    np.testing.assert_allclose(got, ours[tuple(index)], rtol=1e-6)
    whole = one.read([slice(None)] * ours.ndim, read)
    np.testing.assert_allclose(whole, ours, rtol=1e-6)


def test_the_letters_mean_what_the_axes_say() -> None:
    """Against the reshapes written out, as one would convert GPT-2, NeoX and Llama by hand."""
    rng = np.random.default_rng(0)
    d, h, k = 4, 2, 6
    axes = ("d_model", "heads", "d_head")
    declared = Declared((d, h, k), axes, "hidden", 1.0, 1.0)
    everything = [slice(None)] * 3

    def read(row: Row, theirs: np.ndarray) -> np.ndarray:
        return layout(row, declared).read(everything, lambda _, at: theirs[at])

    llama = rng.normal(size=(h * k, d)).astype(np.float32)
    np.testing.assert_array_equal(
        read(Row("x", "w", "(h k) d"), llama), llama.reshape(h, k, d).transpose(2, 0, 1)
    )
    conv = rng.normal(size=(d, 3 * h * k)).astype(np.float32)
    key = np.split(conv, 3, axis=1)[1].reshape(d, h, k)
    np.testing.assert_array_equal(read(Row("x", "w", "d (n h k)", (1, 3)), conv), key)
    neox = rng.normal(size=(h * 3 * k, d)).astype(np.float32)
    value = neox.reshape(h, 3, k, d)[:, 2].transpose(2, 0, 1)
    np.testing.assert_array_equal(read(Row("x", "w", "(h n k) d", (2, 3)), neox), value)


# ------------------------------------------------------------------------------------------ golden


@pytest.mark.parametrize("name", NAMES)
def test_output_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    """Against what transformers gave (tests/golden/make.py); and a second trip changes nothing."""
    checkpoint = load.open_folder(GOLDEN / name)
    golden = np.load(GOLDEN / name / "output.npz")
    with on(checkpoint.config):
        params = load.load(checkpoint)
        got = output(checkpoint.config, params, golden["tokens"])
        assert np.abs(got - golden["output"]).max() <= 1e-4

        family = export.export(checkpoint.config, params, tmp_path / "out", shard_bytes=9_000)
        again = load.open_folder(tmp_path / "out")
        assert family is again.family is checkpoint.family
        back = load.load(again)
    assert same(params, back)
    one = load_file(GOLDEN / name / "model.safetensors")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    many = {k: v for file in files for k, v in load_file(file).items()}
    assert one.keys() == many.keys()
    for key, value in one.items():
        np.testing.assert_allclose(many[key], value, rtol=0, atol=3e-7, err_msg=key)


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2", "bert_base"])
def test_attention_maps_are_those_of_transformers(name: str) -> None:
    checkpoint = load.open_folder(GOLDEN / name)
    golden = np.load(GOLDEN / name / "output.npz")
    ids_bt = golden["tokens"]
    where_bt = np.broadcast_to(np.arange(ids_bt.shape[1], dtype=np.int32), ids_bt.shape)
    with on(checkpoint.config), small.compiled_quickly():
        run = jax.jit(transformer.attention_maps, static_argnums=0)
        _, maps = run(checkpoint.config, load.load(checkpoint), ids_bt, where_bt, where_bt * 0 + 1)
    assert np.abs(np.asarray(maps) - golden["maps"]).max() <= 1e-5


def test_every_family_has_a_golden_model() -> None:
    found = [load.open_folder(GOLDEN / name).family for name in NAMES]
    assert all(family in found for family in FAMILIES)


@pytest.mark.parametrize("name", ["llama3", "qwen3_moe"])
def test_weights_go_onto_a_mesh_part_by_part(name: str) -> None:
    checkpoint = load.open_folder(GOLDEN / name)
    with on(checkpoint.config):
        whole = load.load(checkpoint)
    largest = 0
    inner = checkpoint.source.read

    class Counting:
        where, shapes = checkpoint.source.where, checkpoint.source.shapes

        @staticmethod
        def read(name: str, slices: tuple[slice, ...]) -> np.ndarray:
            nonlocal largest
            piece = inner(name, slices)
            if len(slices) == 2 and "experts" not in name and "gate.weight" not in name:
                largest = max(largest, piece.size / np.prod(Counting.shapes()[name]))
            return piece

    with on(checkpoint.config, (1, 2, 2)):
        parted = load.load(dataclasses.replace(checkpoint, source=Counting))
        assert same(whole, parted)
        declared = transformer.table(checkpoint.config)
        rows = jax.tree.leaves(declared, is_leaf=lambda x: isinstance(x, Declared))
        for array, row in zip(jax.tree.leaves(parted), rows, strict=True):
            assert array.sharding.spec == row.spec or row.spec == jax.P()
    assert largest <= 0.5  # no matrix was read whole for any device


# -------------------------------------------------------------------------------- what is exported


def speaks(**fields) -> str:
    model = ModelConfig(d_model=16, n_layers=2, n_heads=4, vocab_size=64, seq_len=16, **fields)
    return export.family_of(model).model_type


def test_each_config_finds_the_family_that_computes_it() -> None:
    assert speaks() == "arcee"  # RMSNorm, rotary, ungated: our default
    assert speaks(activation="relu2", tie_embeddings=False) == "arcee"
    assert speaks(activation="swiglu", n_kv_heads=2) == "llama"
    assert speaks(activation="swiglu", sliding_window=4) == "mistral"
    assert speaks(activation="swiglu", qk_norm=True) == "qwen3"
    assert speaks(activation="swiglu", moe=MoE(n_experts=4)) == "mixtral"
    assert speaks(norm="layernorm", positions="learned", bias=True) == "gpt2"
    assert speaks(norm="layernorm", bias=True, rope_fraction=0.5) == "gpt_neox"
    for nobodys in ({"positions": "none"}, {"norm": "layernorm"}, {"rope_fraction": 0.5}):
        with pytest.raises(UserError, match="no family"):
            speaks(**nobodys)


def test_mup_is_exported_as_the_same_function(tmp_path: Path) -> None:
    config = small.config(
        model={"parametrization": "mup", "base_d_model": 4, "activation": "swiglu"}
    )
    ids_bt = np.arange(24, dtype=np.int32).reshape(2, 12) % 16
    with on(config.model):
        params = small.sharded(config, small.params(config))
        want = output(config.model, params, ids_bt)
        export.export(config.model, params, tmp_path / "out")
        again = load.open_folder(tmp_path / "out")
        got = output(again.config, load.load(again), ids_bt)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_export_leaves_what_is_there_alone(tmp_path: Path) -> None:
    config = small.config(model={"activation": "swiglu"})
    with on(config.model):
        params = small.sharded(config, small.params(config))
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        with pytest.raises(UserError, match="not empty"):
            export.export(config.model, params, tmp_path / "out")
        export.export(config.model, params, tmp_path / "half", dtype="bfloat16")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half", "out"]
    with safe_open(tmp_path / "half" / "model.safetensors", "np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


# ------------------------------------------------------------------------------- damaged and wrong


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "llama3", tmp_path / "llama"))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load.open_folder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder: Path, **config) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values |= config
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))


def test_all_missing_extra_and_misshapen_tensors_are_named(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.gate_proj.weight"] = np.zeros((24, 15), np.float32)
    tensors["model.layers.1.mlp.down_proj.weight"] = np.zeros((16, 24), np.int32)
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros(3, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)  # a buffer
    save_file(tensors, llama / "model.safetensors")
    line = refused(llama)
    for part in (
        "2 missing: ", "model.norm.weight [16]", "model.layers.1.mlp.up_proj.weight",
        "2 misshapen: ", "model.layers.0.mlp.gate_proj.weight is [24, 15], expected [24, 16]",
        "model.layers.1.mlp.down_proj.weight is ['I32'], expected [16, 24]",
        "1 unexpected: model.layers.7.mlp.up_proj.weight",
    ):  # fmt: skip
        assert part in line
    assert "inv_freq" not in line


def test_a_tied_output_may_be_there_and_an_untied_one_must(tmp_path: Path) -> None:
    qwen = Path(shutil.copytree(GOLDEN / "qwen3", tmp_path / "qwen"))  # tied
    tensors = load_file(qwen / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, qwen / "model.safetensors")
    load.open_folder(qwen)
    rewrite(qwen, tie_word_embeddings=False)
    load.open_folder(qwen)
    rewrite(qwen, tie_word_embeddings=True)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    save_file(tensors, qwen / "model.safetensors")
    assert "lm_head.weight is not model.embed_tokens.weight" in refused(qwen)
    rewrite(qwen, tie_word_embeddings=False)
    del tensors["lm_head.weight"]
    save_file(tensors, qwen / "model.safetensors")
    assert "missing: lm_head.weight" in refused(qwen)


def test_a_bare_base_model_is_read_too(tmp_path: Path) -> None:
    """The hub's gpt2 leaves `transformer.` out."""
    gpt2 = Path(shutil.copytree(GOLDEN / "gpt2", tmp_path / "gpt2"))
    tensors = load_file(gpt2 / "model.safetensors")
    bare = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    bare["h.0.attn.bias"] = np.tril(np.ones((1, 1, 4, 4), np.float32))
    save_file(bare, gpt2 / "model.safetensors")
    bare_one, whole = load.open_folder(gpt2), load.open_folder(GOLDEN / "gpt2")
    with on(whole.config):
        a, b = load.load(bare_one), load.load(whole)
    assert same(a, b)


def test_what_these_layers_do_not_compute_is_refused_by_key(llama: Path) -> None:
    for change, said in (
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
        ({"hidden_size": "wide"}, "d_model"),
        ({"num_attention_heads": 3, "head_dim": "absent"}, "n_heads"),
    ):
        saved = (llama / "config.json").read_bytes()
        rewrite(llama, **change)
        assert said in refused(llama)
        (llama / "config.json").write_bytes(saved)
    (llama / "config.json").write_text("{")
    assert "cannot be read" in refused(llama)
    (llama / "config.json").unlink()
    assert "config.json" in refused(llama)


def header(entries: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
TWICE = b'{"a":%s,"a":%s}' % (json.dumps(ONE).encode(), json.dumps(ONE).encode())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95",  # a pickle's first bytes
        header({"a": ONE}, b"0" * 7),
        header({"a": ONE}, b"0" * 9),
        header({"a": ONE, "b": ONE}, b"0" * 8),
        header({"a": ONE, "b": {**ONE, "data_offsets": [12, 20]}}, b"0" * 20),
        header({"a": {**ONE, "shape": [3]}}, b"0" * 8),
        header({"a": {**ONE, "shape": [2**62, 2**62]}}, b"0" * 8),
        header({"a": {**ONE, "shape": [-2]}}, b"0" * 8),
        header({"a": {**ONE, "dtype": "F99"}}, b"0" * 8),
        header(TWICE, b"0" * 8),
        header({"a": ONE}, b"0" * 8, length=2**63),
        header({"a": ONE}, b"0" * 8, length=200_000_000),
        header(b"[" * 100_000),
        header(b"\xff\xfe"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_told_in_one_line(llama: Path, content: bytes) -> None:
    (llama / "model.safetensors").write_bytes(content)
    assert str(llama / "model.safetensors") in refused(llama)


def test_no_flipped_bit_of_a_header_passes(llama: Path) -> None:
    """Each flip is refused, or leaves what is read as it was."""
    path = llama / "model.safetensors"
    good, rng = path.read_bytes(), np.random.default_rng(0)
    (length,) = struct.unpack("<Q", good[:8])
    shapes = load.open_folder(llama).source.shapes()
    seen = 0
    for bit in rng.choice((8 + length) * 8, 150, replace=False):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(bad)
        try:
            assert load.open_folder(llama).source.shapes() == shapes
        except UserError as e:
            seen += 1
            assert "\n" not in str(e)
    assert seen > 100


def test_a_cut_file_is_refused_wherever_it_is_cut(llama: Path) -> None:
    path = llama / "model.safetensors"
    good = path.read_bytes()
    for share in (0.001, 0.1, 0.5, 0.99, 1 - 1 / len(good)):
        path.write_bytes(good[: int(share * len(good))])
        assert str(path) in refused(llama)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_is_never_opened(llama: Path, tmp_path: Path) -> None:
    import pickle

    (llama / "model.safetensors").unlink()
    assert "no .safetensors" in refused(llama)
    bomb = llama / "pytorch_model.bin"
    bomb.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert "pytorch_model.bin" in refused(llama) and "code" in refused(llama)
    bomb.rename(llama / "model.safetensors")
    assert "safetensors" in refused(llama)
    assert not (tmp_path / "exploded").exists()


def test_an_index_that_disagrees_is_refused(tmp_path: Path) -> None:
    checkpoint = load.open_folder(GOLDEN / "llama3")
    folder = tmp_path / "out"
    with on(checkpoint.config):
        export.export(checkpoint.config, load.load(checkpoint), folder, shard_bytes=9_000)
    path = folder / "model.safetensors.index.json"
    good = json.loads(path.read_text())
    names = list(good["weight_map"])
    for change in (
        {names[0]: good["weight_map"][names[-1]]},  # in another file
        {"other": good["weight_map"][names[0]]},  # nowhere
        {names[0]: "../elsewhere.safetensors"},
        {names[0]: 3},
    ):
        path.write_text(json.dumps({"weight_map": good["weight_map"] | change}))
        assert "index.json" in refused(folder)
    path.write_text(json.dumps(good))
    (folder / good["weight_map"][names[0]]).unlink()
    assert good["weight_map"][names[0]] in refused(folder)
