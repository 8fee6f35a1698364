"""What tests of the model and of training share: small configs, random batches and parameters."""

import contextlib
import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
from reference import flat, unflat

from jaxlm import mesh
from jaxlm.config import Config, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig, validate
from jaxlm.data import pretrained, tokenizer
from jaxlm.data.loader import Batch, Dataset
from jaxlm.data.windows import Segment
from jaxlm.model import transformer
from jaxlm.train import optimizer
from jaxlm.train.step import State

GOLDEN = Path(__file__).parent / "golden"
TEXT = ["the sky is blue and the sea is wide", "a bird sings in the tree, a fish swims"] * 20
MODEL = ModelConfig(d_model=8, n_layers=2, n_heads=2, vocab_size=16, seq_len=12)


def config(model=None, train=None, optimizer=None, sizes=(1, 1, 1), **rest) -> Config:
    return validate(
        Config(
            model=dataclasses.replace(MODEL, **(model or {})),
            train=TrainConfig(**{"global_batch_size": 4, "steps": 10, **(train or {})}),
            optimizer=OptimizerConfig(**(optimizer or {})),
            mesh=MeshConfig(*sizes),
            **rest,
        )
    )


@contextlib.contextmanager
def compiled_quickly():
    """Compile with little optimization, which takes half the time; what is computed is the same up
    to rounding."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@contextlib.contextmanager
def on_mesh(config: Config, quick: bool = True):
    """The config's mesh, set."""
    n = int(np.prod([getattr(config.mesh, axis) for axis in mesh.AXES]))
    how = compiled_quickly() if quick else contextlib.nullcontext()
    with how, jax.set_mesh(mesh.make(config, jax.devices()[:n])):
        yield


def batch(config: Config, seed: int = 0, steps: int = 0) -> Batch:
    """Random tokens [b, t] (or [steps, b, t]) in packed documents; ragged weights, one row 0."""
    rng = np.random.default_rng(seed)
    shape = (config.train.global_batch_size, config.model.seq_len)
    shape = (steps, *shape) if steps else shape
    starts = rng.random(shape) < 0.25
    starts[..., 0] = True
    where = np.broadcast_to(np.arange(shape[-1]), shape)
    began = np.maximum.accumulate(np.where(starts, where, 0), axis=-1)
    weights = (rng.random(shape) < rng.random((*shape[:-1], 1))).astype(np.float32)
    weights[..., 0, :] = 0.0
    vocab = config.model.vocab_size
    return Batch(
        tokens=rng.integers(0, vocab, shape, dtype=np.int32),
        targets=rng.integers(0, vocab, shape, dtype=np.int32),
        weights=weights,
        segment_ids=np.cumsum(starts, axis=-1, dtype=np.int32),
        positions=(where - began).astype(np.int32),
    )


def params(config: Config, seed: int = 0) -> dict:
    """Float32 arrays named and shaped as `init` makes them, all of them random, so that gains,
    biases and the zeros of muP's output count."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: transformer.init(config.model, jax.random.key(0)))
    return unflat(
        {
            path: (rng.normal(size=x.shape) * 0.4 + (path[-1] == "gain")).astype(np.float32)
            for path, x in flat(shapes).items()
        }
    )


def sharded(config: Config, params: dict) -> dict:
    """Host parameters on the current mesh, laid out as the table says."""
    devices = jax.sharding.get_mesh()
    return jax.tree.map(
        lambda x, row: jax.device_put(x, jax.NamedSharding(devices, row.spec)),
        params,
        transformer.table(config.model),
    )


def state(config: Config, params: dict) -> State:
    """A fresh state on the current mesh with these host parameters; nothing is compiled."""
    params = sharded(config, params)
    opt_state = optimizer.transform(config, 0.0, 0.0).init(params)
    return State(params, opt_state, jax.numpy.zeros((), jax.numpy.int32))


def dataset(config: Config, tokens: int = 4000, seed: int = 0) -> Dataset:
    """Documents over the vocabulary, of a Markov chain that a model can learn."""
    rng, vocab = np.random.default_rng(seed), config.model.vocab_size
    ids = np.cumsum(rng.integers(0, 3, tokens)) % vocab
    offsets = np.unique([0, *rng.integers(1, tokens, tokens // 40), tokens])
    one = np.ones(vocab, np.int32)
    segment = Segment(ids.astype(np.uint8), offsets.astype(np.int64))
    return Dataset((segment,), one, config.model.seq_len)


def assert_near(got: dict, want: dict, rel: float = 2e-5) -> None:
    """Every leaf within `rel` of its largest entry, plus rounding of the largest in the tree."""
    got, want = flat(jax.device_get(got)), flat(jax.device_get(want))
    assert got.keys() == want.keys()
    largest = max(np.abs(x).max() for x in want.values())
    for path, x in want.items():
        limit = rel * np.abs(x).max() + 2e-7 * largest
        worst = np.abs(np.asarray(got[path], np.float64) - x).max()
        assert worst <= limit, f"{'.'.join(path)}: off by {worst:.2e}, allowed {limit:.2e}"


def words() -> tokenizer.Subword:
    """A byte-level BPE as small as they get: the golden models have 64 ids, so it is cut down."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = ["<|endoftext|>", *sorted({c for t in TEXT for c in t.replace(" ", "Ġ")})]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "s"), ("Ġ", "is")]
    vocab = {w: i for i, w in enumerate([*letters, *(a + b for a, b in merges)])}
    inner = Tokenizer(models.BPE(vocab, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>"])
    return tokenizer.Subword(inner, "<|endoftext|>")


def golden(name: str, out: Path) -> Path:
    """A golden checkpoint with that tokenizer, in a new folder."""
    shutil.copytree(GOLDEN / name, out)
    for file, text in pretrained.as_files(words(), 32).items():
        (out / file).write_text(text)
    return out
