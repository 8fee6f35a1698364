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
from jaxlm.data.windows import Segment, best_fit
from jaxlm.schema import UserError


def dataset(lengths, seq_len, dtype=np.uint16):
    """Documents of these lengths; every token is another id, so that a misplaced one shows."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(1, offsets[-1] + 1).astype(dtype)
    token_bytes = np.arange(70_000, dtype=np.int32) % 5
    return Dataset((Segment(tokens, offsets),), token_bytes, seq_len)


def window(data, number):
    """One window from the definition alone, token by token."""
    tokens, offsets = data.segments[0].tokens, data.segments[0].offsets
    document = [
        d for d in range(len(offsets) - 1)
        for _ in range(offsets[d], offsets[d + 1])
    ]  # fmt: skip
    start = number * data.seq_len
    rows = []
    for i in range(start, start + data.seq_len):
        rows.append(
            (
                int(tokens[i]),
                int(tokens[i + 1]),
                float(document[i] == document[i + 1]),
                1 + document[i] - document[start],
                i - max(start, int(offsets[document[i]])),
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
    assert (
        len(data.segments[0].tokens) - targets[-1] < seq_len
    )  # and less than a window is left out


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_ids_survive_their_type(dtype):
    big = np.iinfo(dtype).max if dtype != np.uint32 else 2**31 - 1
    segment = Segment(np.full(9, big, dtype), np.array([0, 9]))
    data = Dataset((segment,), np.zeros(1, np.int32), 4)
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
            loader.chunk(data, seed, begin * batch_size, end - begin, batch_size, np.arange(lo, hi))
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
    rows = np.array([1, 3])
    found = list(loader.chunks(data, 1, 40, steps, 4, per_chunk, rows))
    want = loader.chunk(data, 1, 40, steps, 4, rows)
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
from jaxlm.data.windows import Segment, best_fit
segment = Segment(np.zeros(99, np.uint8), np.array([0, 99]))
data = Dataset((segment,), np.zeros(256, np.int32), 4)
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
        [segment] = found.segments
        served = segment.tokens[: len(found) * 16 + 1]
        first = segment.offsets[:-1][segment.offsets[:-1] < len(served)]
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


# ------------------------------------------------------------------------------- several segments


def joined(parts, seq_len, packing="split"):
    """Several datasets' segments as one; part k is source k."""
    segments = tuple(
        Segment(p.segments[0].tokens, p.segments[0].offsets, k) for k, p in enumerate(parts)
    )
    names = tuple(f"s{k}" for k in range(len(parts)))
    return Dataset(segments, parts[0].token_bytes, seq_len, packing, names)


def test_windows_of_several_segments_are_those_of_each():
    parts = [dataset([11, 30], 5), dataset([3], 5), dataset([40], 5)]
    data = joined(parts, 5)
    lengths = [len(p) for p in parts]
    assert lengths == [8, 0, 7] and len(data) == 15
    numbers = np.array([[14, 0], [7, 8]])
    found = data.windows(numbers)
    for i, (part, number) in enumerate([(2, 6), (0, 0), (0, 7), (2, 0)]):
        want = parts[part].windows(np.array([number]))
        for leaf, one in zip(found, want, strict=True):
            np.testing.assert_array_equal(leaf.reshape(4, 5)[i], one[0])


# --------------------------------------------------------------------------------------- packing


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=40), spare=st.integers(0, 4))
def test_best_fit_is_best_fit_decreasing(sizes, spare):
    capacity = max(sizes) + spare
    bins, room = [], []
    for size in sorted(sizes, reverse=True):  # from the definition
        fits = [(r, i) for i, r in enumerate(room) if r >= size]
        i = min(fits)[1] if fits else len(room)
        if not fits:
            room.append(capacity)
        room[i] -= size
        bins.append(i)
    found = best_fit(np.array(sizes, np.int32), capacity)
    filled = np.bincount(found, sizes)
    assert filled.max() <= capacity
    assert sorted(filled.tolist()) == sorted(capacity - r for r in room)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(2, 25), min_size=1, max_size=20), seq_len=st.integers(1, 12))
def test_packed_documents_are_whole_and_each_target_comes_once(lengths, seq_len):
    data = joined([dataset(lengths, seq_len)], seq_len, "best_fit")
    batch = data.windows(np.arange(len(data)))
    offsets = data.segments[0].offsets
    real = batch.weights > 0
    firsts = set((offsets[:-1] + 1).tolist())  # ids are 1, 2, … in order
    want = [i for i in range(1, offsets[-1] + 1) if i not in firsts]
    assert sorted(batch.targets[real].tolist()) == want
    assert (batch.targets[real] == batch.tokens[real] + 1).all()
    for row in range(len(data)):
        pieces = [np.flatnonzero(batch.segment_ids[row] == s) for s in range(1, seq_len + 2)]
        for piece in pieces:
            if len(piece) and real[row, piece[0]]:
                tokens = batch.tokens[row, piece]
                assert (np.diff(tokens) == 1).all() and (np.diff(piece) == 1).all()
                assert batch.positions[row, piece].tolist() == list(range(len(piece)))
                end = batch.targets[row, piece[-1]]
                assert end in offsets or len(piece) == seq_len  # cut only where a window ends


# --------------------------------------------------------------------------------------- mixtures


def test_weights_are_exact_in_each_block_and_epochs_are_permutations():
    data = joined([dataset([400], 4), dataset([1200], 4)], 4)
    mixed = loader.mixture_of(data, DataConfig(weights=(3, 1)), 4000)
    numbers = loader._numbers(data, mixed, 7, np.arange(4000))
    first = len(data.windows_of[0])
    for block in numbers.reshape(4, 1000):
        assert (block < first).sum() == 750
    own = numbers[numbers < first]
    for epoch in range(len(own) // first):
        assert sorted(own[epoch * first : (epoch + 1) * first]) == list(range(first))
    seen = loader.epochs(data, 7, 4000, mixed)
    assert seen == {"s0": 3000 / 99, "s1": 1000 / 299}
    with pytest.raises(UserError, match=r"30\.30 epochs of s0"):
        loader.check_epochs(data, 4000, 5.0, 7, mixed)


def test_a_curriculum_changes_the_weights_and_loses_no_place():
    data = joined([dataset([4000], 4), dataset([4000], 4)], 4)
    plan = DataConfig(weights=(1, 0), curriculum=((0.5, (1, 1)), (0.9, (0, 1))))
    mixed = loader.mixture_of(data, plan, 1700)
    source, ordinal = mixed.drawn(3, np.arange(1700))
    assert (source[:850] == 0).all() and (source[1530:] == 1).all()
    assert 200 < (source[850:1530] == 0).sum() < 480
    for k in (0, 1):  # each source's own samples come in order, none twice
        assert ordinal[source == k].tolist() == list(range((source == k).sum()))
        assert mixed.counts(3, 1700)[k] == (source == k).sum()
    some = np.array([1699, 3, 900])
    again = mixed.drawn(3, some)
    np.testing.assert_array_equal(again, (source[some], ordinal[some]))


@pytest.mark.parametrize(
    ("plan", "line"),
    [
        ({"weights": (1,)}, "data.weights: expected 2 weights"),
        ({"weights": (0, 0)}, "expected 2 weights"),
        ({"curriculum": ((0.5, (1, 1)),)}, "the weights that hold before"),
        ({"weights": (1, 1), "curriculum": ((1.5, (1, 1)),)}, r"data\.curriculum\[0\]: .* got 1.5"),
        ({"weights": (1, 1), "curriculum": ((0.5, (1, 1)), (0.5, (1, 2)))}, "curriculum.1.: "),
    ],
)
def test_a_wrong_mixture_is_refused(plan, line):
    data = joined([dataset([400], 4), dataset([400], 4)], 4)
    with pytest.raises(UserError, match=line):
        loader.mixture_of(data, DataConfig(**plan), 100)


def test_a_source_of_less_than_a_window_cannot_be_weighed():
    data = joined([dataset([400], 4), dataset([3], 4)], 4)
    with pytest.raises(UserError, match="'s1' has less than one sequence"):
        loader.mixture_of(data, DataConfig(weights=(1, 1)), 100)


# ---------------------------------------------------------------------------- the matrix of orders


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("how", ["split", "best_fit", "weighed"])
def test_hosts_workers_and_stops_change_nothing(hosts, workers, how):
    """20 random stops and resumes; `workers`: read at once, or ahead with 1 or 2 steps a chunk."""
    packing = "best_fit" if how == "best_fit" else "split"
    data = joined([dataset([11, 30, 5, 300, 7, 250], 5), dataset([90, 40, 500], 5)], 5, packing)
    batch_size, epoch = 8, len(data)
    steps = 2 * epoch // batch_size
    weights = (2.0, 1.0) if how == "weighed" else ()
    mixed = loader.mixture_of(data, DataConfig(weights=weights), steps * batch_size)
    whole = loader.chunk(data, 5, 0, steps, batch_size, None, mixed)
    rng = np.random.default_rng(hosts * 3 + workers)
    cuts = sorted(rng.choice(np.arange(1, steps), 20, replace=False).tolist())
    rows = batch_size // hosts
    seen = []
    for begin, end in zip([0, *cuts], [*cuts, steps], strict=True):
        parts = []
        for host in range(hosts):
            mine, at = (
                np.arange(host * rows, (host + 1) * rows),
                (5, begin * batch_size, end - begin),
            )
            if workers:
                read = loader.chunks(data, *at, batch_size, workers, mine, mixed)
                parts.append(np.concatenate([b.tokens for b in read]))
            else:
                parts.append(loader.chunk(data, *at, batch_size, mine, mixed).tokens)
        seen.append(np.concatenate(parts, axis=1))
    found = np.concatenate(seen)
    np.testing.assert_array_equal(found, whole.tokens)
    if how != "weighed":  # the multiset of an epoch is each window once
        flat = [row.tobytes() for row in found.reshape(-1, 5)[:epoch]]
        every = [row.tobytes() for row in data.windows(np.arange(epoch)).tokens]
        assert sorted(flat) == sorted(every)
