"""Windows against a plain loop, and the order of samples: each once, whatever the interruptions."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import DataConfig
from jaxlm.data import loader, shards
from jaxlm.data.loader import Batch, Dataset
from jaxlm.schema import UserError


def dataset(lengths, seq_len, dtype=np.uint16):
    """Documents of these lengths; every token is another id, so that a misplaced one shows."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(1, offsets[-1] + 1).astype(dtype)
    token_bytes = np.arange(70_000, dtype=np.int32) % 5
    return Dataset(tokens, offsets, token_bytes, seq_len)


def window(data, number):
    """One window from the definition alone, token by token."""
    document = [
        d for d in range(len(data.offsets) - 1)
        for _ in range(data.offsets[d], data.offsets[d + 1])
    ]  # fmt: skip
    start = number * data.seq_len
    rows = []
    for i in range(start, start + data.seq_len):
        rows.append(
            (
                int(data.tokens[i]),
                int(data.tokens[i + 1]),
                float(document[i] == document[i + 1]),
                1 + document[i] - document[start],
                i - max(start, int(data.offsets[document[i]])),
            )
        )
    return Batch(*map(list, zip(*rows, strict=True)))


sizes = st.lists(st.integers(1, 9), min_size=3, max_size=30)


@settings(max_examples=200, deadline=None)
@given(lengths=sizes, seq_len=st.integers(1, 12), draw=st.data())
def test_windows_are_what_a_plain_loop_makes(lengths, seq_len, draw):
    data = dataset([*lengths, seq_len + 1], seq_len)
    numbers = draw.draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=8))
    found = data.windows(np.array(numbers))
    assert [x.dtype.name for x in found] == ["int32", "int32", "float32", "int32", "int32"]
    for row, number in enumerate(numbers):
        for leaf, want in zip(found, window(data, number), strict=True):
            assert leaf[row].tolist() == want


@settings(max_examples=50, deadline=None)
@given(lengths=sizes, seq_len=st.integers(1, 12))
def test_each_token_but_the_first_is_a_target_once(lengths, seq_len):
    data = dataset([*lengths, seq_len + 1], seq_len)
    targets = data.windows(np.arange(len(data))).targets.reshape(-1)
    assert targets.tolist() == list(range(2, 2 + len(data) * seq_len))
    assert len(data.tokens) - targets[-1] < seq_len  # and less than a window is left out


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_ids_survive_their_type(dtype):
    big = np.iinfo(dtype).max if dtype != np.uint32 else 2**31 - 1
    data = Dataset(np.full(9, big, dtype), np.array([0, 9]), np.zeros(1, np.int32), 4)
    assert (data.windows(np.array([[0], [1]])).tokens == big).all()


# ------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("windows", [1, 2, 3, 7, 64, 1000, 4097])
def test_an_epoch_holds_each_window_once_in_another_order_than_the_last(windows):
    epochs = loader.indices(windows, 3, np.arange(3 * windows)).reshape(3, windows)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(windows))
    if windows > 7:
        assert not (epochs[0] == epochs[1]).all() and not (epochs[1] == epochs[2]).all()


def test_seeds_and_epochs_have_orders_of_their_own():
    n = 500
    orders = [
        tuple(loader.indices(n, seed, np.arange(n) + epoch * n).tolist())
        for seed in (-1, 0, 1, 2, 2**40) for epoch in (0, 1, 2)
    ]  # fmt: skip
    assert len(set(orders)) == 15
    # Two random permutations agree in about one place.
    agreements = [
        sum(x == y for x, y in zip(a, b, strict=True)) for a in orders for b in orders if a < b
    ]
    assert max(agreements) < 10


def test_an_order_is_well_mixed():
    n = 10_000
    order = loader.indices(n, 0, np.arange(n))
    # Of a random permutation: correlation 0 ± 1/√n; a mean step of n/3.
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 4 / np.sqrt(n)
    assert abs(np.abs(np.diff(order)).mean() / (n / 3) - 1) < 0.05
    # Every tenth of the order sees every tenth of the data about equally.
    counts = np.histogram2d(order, np.arange(n), bins=10)[0]
    assert np.abs(counts - n / 100).max() < 5 * np.sqrt(n / 100)


def run(data, seed, cuts, splits, batch_size):
    """Targets of a run that stops at `cuts` (steps) and reads each batch in `splits` parts."""
    out = []
    for begin, end in zip([0, *cuts], [*cuts, 24], strict=True):
        parts = [
            loader.chunk(data, seed, begin * batch_size, end - begin, batch_size, (lo, hi))
            for lo, hi in zip([0, *splits], [*splits, batch_size], strict=True)
        ]
        out.append(np.concatenate([p.targets for p in parts], axis=1))
    return np.concatenate(out)


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 23), unique=True, max_size=5).map(sorted),
    splits=st.sampled_from([[], [4], [2, 4, 6], [1, 2, 3, 4, 5, 6, 7]]),
    seed=st.integers(0, 2**32),
)
def test_stops_and_hosts_do_not_change_the_sequence(cuts, splits, seed):
    data = dataset([11, 30, 5, 300, 7, 250], 5)
    whole = run(data, seed, [], [], 8)
    np.testing.assert_array_equal(run(data, seed, cuts, splits, 8), whole)
    # The same samples in batches of another size: only their grouping changes.
    other = loader.chunk(data, seed, 0, 16, 12).targets
    np.testing.assert_array_equal(other.reshape(192, 5), whole.reshape(192, 5))


def test_over_the_epochs_of_an_interrupted_run_each_sample_comes_once_an_epoch():
    data = dataset([11, 30, 5, 300, 7, 250], 5)
    steps = 3 * len(data) // 8
    seen = []
    rng = np.random.default_rng(0)
    cuts = sorted(rng.choice(np.arange(1, steps), 20, replace=False).tolist())
    for begin, end in zip([0, *cuts], [*cuts, steps], strict=True):
        for batch in loader.chunks(data, 5, begin * 8, end - begin, 8, steps_per_chunk=3):
            seen += batch.tokens[..., 0].reshape(-1).tolist()
    for epoch in range(2):
        part = seen[epoch * len(data) : (epoch + 1) * len(data)]
        assert sorted(part) == [1 + 5 * i for i in range(len(data))]


@pytest.mark.parametrize(("steps", "per_chunk"), [(7, 3), (6, 3), (2, 5), (0, 4), (5, 1)])
def test_chunks_read_ahead_are_the_chunks(steps, per_chunk):
    data = dataset([11, 30, 5, 300], 5)
    found = list(loader.chunks(data, 1, 40, steps, 4, per_chunk, rows=(1, 3)))
    want = loader.chunk(data, 1, 40, steps, 4, rows=(1, 3))
    lengths = [len(b.tokens) for b in found]
    assert lengths == [min(per_chunk, steps - i) for i in range(0, steps, per_chunk)]
    for i, leaf in enumerate(want):
        assert leaf.shape == (steps, 2, 5)
        if found:
            np.testing.assert_array_equal(np.concatenate([b[i] for b in found]), leaf)


def test_a_batch_is_a_pytree():
    batch = loader.chunk(dataset([30], 4), 0, 0, 2, 3)
    assert len(jax.tree.leaves(batch)) == 5
    assert isinstance(jax.tree.map(jax.numpy.asarray, batch), Batch)


def test_a_worker_process_may_stop_in_the_middle_without_noise():
    code = """
import numpy as np
from jaxlm.data.loader import Dataset, chunks
data = Dataset(np.zeros(99, np.uint8), np.array([0, 99]), np.zeros(256, np.int32), 4)
print(next(chunks(data, 0, 0, 10**6, 4, 10)).tokens.shape)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.stdout, run.stderr, run.returncode) == ("(10, 4, 4)\n", "", 0)


# -------------------------------------------------------------------------------------- evaluation


def test_evaluation_windows_are_even_and_count_their_bytes():
    data = dataset([3, 4, 50, 7, 100], 4)
    batch, target_bytes = loader.eval_batch(data, 10)
    starts = (batch.tokens[:, 0] - 1) // 4
    assert (np.diff(starts) >= len(data) // 10).all() and starts[0] == 0
    assert len(set(np.diff(starts).tolist())) <= 2
    for row, number in enumerate(starts):
        want = window(data, int(number))
        sizes = [t % 5 * int(w) for t, w in zip(want.targets, want.weights, strict=True)]
        assert target_bytes[row].tolist() == sizes
    again, _ = loader.eval_batch(data, 10)
    assert all((a == b).all() for a, b in zip(batch, again, strict=True))


def test_a_small_split_gives_each_window_once_and_fills_with_weight_zero():
    data = dataset([9, 12], 4)
    batch, target_bytes = loader.eval_batch(data, 8)
    assert batch.tokens.shape == target_bytes.shape == (8, 4)
    assert batch.tokens[:5, 0].tolist() == [1, 5, 9, 13, 17]
    assert batch.weights[:5].sum() == 20 - 1 and batch.weights[5:].sum() == 0
    assert target_bytes[5:].sum() == 0
    assert (batch.segment_ids > 0).all()


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_a_built_folder_is_served_and_its_bytes_add_up(name, tmp_path):
    texts = [f"document {i} 日本語\n" * (1 + i % 5) for i in range(200)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    data = DataConfig(sources=(str(tmp_path),), tokenizer=name, eval_fraction=0.3)
    manifest = shards.build(data, 300, tmp_path / "out")
    for split in ("train", "eval"):
        found = Dataset.open(tmp_path / "out", split, 16)
        assert len(found) == (getattr(manifest, split).tokens - 1) // 16
        batch, target_bytes = loader.eval_batch(found, len(found))
        # Per document everything but its first token is predicted; the tail is left out.
        served = found.tokens[: len(found) * 16 + 1]
        first = found.offsets[:-1][found.offsets[:-1] < len(served)]
        want = found.token_bytes[served].sum() - found.token_bytes[served[first]].sum()
        assert target_bytes.sum() == want
        assert (batch.weights == 0).sum() == len(first) - 1


def test_too_little_text_and_too_many_epochs_are_refused(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    shards.build(DataConfig(sources=(str(tmp_path),)), 256, tmp_path / "out")
    with pytest.raises(UserError, match=r"eval split has \d+ tokens, .*model\.seq_len=300"):
        Dataset.open(tmp_path / "out", "eval", 300)
    train = Dataset.open(tmp_path / "out", "train", 32)
    assert loader.check_epochs(train, len(train), 1.0) == 1.0
    with pytest.raises(UserError, match=r"2\.00 epochs .* more than max_epochs=1;"):
        loader.check_epochs(train, 2 * len(train), 1.0)
    with pytest.raises(UserError, match="no such file"):
        Dataset.open(tmp_path / "none", "train", 32)
