"""What the objectives ask for: properties of each, on any mesh, and that they can be learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from jaxlm import mesh
from jaxlm.config import Corruption
from jaxlm.data import examples, tokenizer
from jaxlm.data.windows import WordBatch
from jaxlm.data.words import word_starts
from jaxlm.model import transformer
from jaxlm.model.transformer import Source
from jaxlm.train import losses
from jaxlm.train.objectives import START, corrupted, noise_mask

ROWS, T, VOCAB = 64, 24, 100
BOTH = {"architecture": "encoder_decoder", "target_len": 20}


def made(objective, model=None, sizes=(1, 1, 1), key=0, words=None, **corruption):
    """(the batch, its example, the config) as numpy; row 0 has no weight."""
    config = small.config(
        {"seq_len": T, "vocab_size": VOCAB, **(model or {})},
        {
            "objective": objective,
            "global_batch_size": ROWS,
            "corruption": Corruption(**corruption),
        },
        sizes=sizes,
    )
    batch = small.batch(config)
    tokens = 1 + np.random.default_rng(key).integers(0, config.text_ids - 1, (ROWS, T + 1))
    tokens = tokens.astype(np.int32)
    batch = batch._replace(tokens=tokens[:, :-1], targets=tokens[:, 1:])
    # As the loader has it: a weight is 0 where another document begins, and in rows that fill up.
    last = np.ones((ROWS, 1), bool)
    ends = np.concatenate([np.diff(batch.segment_ids) != 0, ~last], axis=1)
    weights = (~ends).astype(np.float32)
    weights[0] = 0
    batch = batch._replace(weights=weights)
    if words is not None:
        batch = WordBatch(*batch, words)
    with small.on_mesh(config):
        placed = mesh.put_batch(batch, jax.sharding.get_mesh())
        run = jax.jit(lambda batch, key: corrupted(config, batch, key))
        return batch, jax.device_get(run(placed, jax.random.key(key))), config


def test_masked_lm_masks_as_bert_does():
    batch, example, config = made("masked_lm", {"architecture": "encoder"}, rate=0.3)
    chosen = example.weights > 0
    assert np.array_equal(example.targets, batch.tokens)
    assert not chosen[0].any()  # a row that only fills up
    chosen, tokens, was = chosen[1:], example.tokens[1:], batch.tokens[1:]
    n = chosen.sum()
    assert n / chosen.size == pytest.approx(0.3, abs=3 * (0.3 * 0.7 / chosen.size) ** 0.5)
    assert np.array_equal(tokens[~chosen], was[~chosen])
    masked = (tokens == VOCAB - 1)[chosen]
    kept = (tokens == was)[chosen]
    for found, share in ((masked, 0.8), (kept, 0.1 + 0.1 / VOCAB), (~masked & ~kept, 0.1)):
        assert found.mean() == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5)
    assert config.text_ids == VOCAB - 1 and was.max() < VOCAB - 1


def test_whole_words_are_masked_or_not():
    words = (np.random.default_rng(1).random((ROWS, T)) < 0.4).astype(np.int32)
    _, example, _ = made(
        "masked_lm", {"architecture": "encoder"}, words=words, rate=0.3, whole_words=True
    )
    chosen, goes_on = example.weights[1:] > 0, words[1:, 1:] == 0
    assert np.array_equal(chosen[:, 1:][goes_on], chosen[:, :-1][goes_on])
    assert (chosen[:, 1:] != chosen[:, :-1]).mean() > 0.1


def test_words_begin_with_spaces_signs_and_characters(tmp_path):
    starts = word_starts(tokenizer.Bytes())
    text = "the cat's café, 日本"
    found = [b for b, s in zip(text.encode(), starts[list(text.encode())], strict=True) if s]
    assert bytes(found).decode(errors="ignore").replace("\ufffd", "") == " ' , "
    assert starts[list("日本".encode())].tolist() == [1, 0, 0, 1, 0, 0]
    bpe = tokenizer.create("bpe", 300, ["the cat sat on the mat, the cat"] * 50)
    starts = word_starts(bpe)
    ids = bpe.encode("x the cats, 日")
    pieces = [bpe.inner.id_to_token(int(i)) for i in ids]
    expected = [int(piece[0] in "Ġ,") for piece in pieces[:-3]]
    assert starts[ids].tolist()[:-3] == expected and sum(expected) >= 3
    assert starts[ids].tolist()[-3:] == [1, 0, 0]  # the three bytes of one character


def spelled_out(source, target, sentinels):
    """The text that a source and a target stand for: each span in its sentinel's place."""
    spans, current = {}, None
    for token in target:
        if token in sentinels:
            current = token
            spans[current] = []
        else:
            spans[current].append(token)
    return [t for token in source for t in (spans[token] if token in sentinels else [token])]


@pytest.mark.parametrize("objective", ["span_corruption", "ul2", "prefix_lm"])
def test_source_and_target_make_up_the_text(objective):
    batch, example, config = made(objective, BOTH, rate=0.3)
    modes = set()
    for row in range(1, ROWS):
        source = example.source.tokens[row][example.source.segments[row] == 1].tolist()
        target = example.targets[row][example.weights[row] > 0].tolist()
        assert example.tokens[row].tolist() == [START, *example.targets[row][:-1]]
        assert (example.segment_ids[row] == (np.arange(20) < len(target))).all()
        sentinels = set(range(config.text_ids, VOCAB))
        if objective == "ul2":
            modes.add(source[0])
            source = source[1:]
        if target[0] not in sentinels:  # a prefix and what follows
            assert [*source, *target] == batch.tokens[row].tolist()
            continue
        assert spelled_out(source, target, sentinels) == batch.tokens[row].tolist()
        used = [t for t in target if t in sentinels]
        assert used == list(range(VOCAB - 1, VOCAB - 1 - len(used), -1))  # counted down
        if objective == "span_corruption":
            noise, spans = config.train.corruption.spans(T)
            assert (len(target), len(used)) == (noise + spans + 1, spans + 1)
    assert objective != "ul2" or modes == {94, 93, 92}  # after 99 … 95
    assert not example.weights[0].any()


def test_noise_falls_anywhere_in_so_many_spans():
    t, noise, spans = 20, 6, 3
    draw = jax.jit(jax.vmap(lambda key: noise_mask(key, t, noise, spans)))
    masks = np.asarray(draw(jax.random.split(jax.random.key(0), 3000)))
    begins = masks & ~np.pad(masks, ((0, 0), (1, 0)))[:, :-1]
    assert (masks.sum(1) == noise).all() and (begins.sum(1) == spans).all()
    assert not masks[:, 0].any() and masks[:, -1].all()  # as T5's code has it
    # All C(5, 2) ways to cut 6 tokens into 3 spans come equally often.
    ways = {}
    for mask in masks:
        lengths = tuple(len(s) for s in "".join("x" if m else " " for m in mask).split())
        ways[lengths] = ways.get(lengths, 0) + 1
    assert len(ways) == 10 and max(ways.values()) < 1.3 * min(ways.values())


def test_prefix_lm_of_a_decoder_asks_for_what_follows_the_prefix():
    batch, example, _ = made("prefix_lm", {"prefix_attention": True})
    cut = example.prefix.sum(1)
    assert len(set(cut.tolist())) > 15 and cut.min() >= 1
    for row in range(ROWS):
        assert example.prefix[row].tolist() == [True] * cut[row] + [False] * (T - cut[row])
        follows = np.arange(T) >= cut[row] - 1
        assert np.array_equal(example.weights[row], batch.weights[row] * follows)


def test_infilling_moves_the_middle_and_loses_nothing():
    batch, example, _ = made("fill_in_the_middle", rate=0.5)
    pre, suf, mid = VOCAB - 1, VOCAB - 2, VOCAB - 3
    turned = whole = 0
    for row in range(1, ROWS):
        segments = example.segment_ids[row]
        assert (np.diff(segments) >= 0).all() and segments[0] == 1
        for document in range(1, segments.max() + 1):  # the last one may be cut
            here = segments == document
            tokens = example.tokens[row][here].tolist()
            text = batch.tokens[row][batch.segment_ids[row] == document].tolist()
            complete = document < segments.max()
            assert example.positions[row][here].tolist() == list(range(len(tokens)))
            inside = example.weights[row][here]
            assert (inside[:-1] == 1).all() and (not complete or inside[-1] == 0)
            targets = example.targets[row][here].tolist()
            assert targets[:-1] == tokens[1:]
            if tokens[0] != pre:
                whole += 1
                assert tokens == text[: len(tokens)]
            elif complete:
                turned += 1
                a, b = tokens.index(suf), tokens.index(mid)
                prefix, suffix, middle = tokens[1:a], tokens[a + 1 : b], tokens[b + 1 :]
                assert middle[-1] == text[-1]  # the end of text stays last
                assert [*prefix, *middle[:-1], *suffix, middle[-1]] == text
    assert turned / (turned + whole) == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize(
    "objective, model",
    [("masked_lm", {"architecture": "encoder"}), ("ul2", BOTH), ("fill_in_the_middle", {})],
)
def test_the_mesh_changes_nothing_and_the_key_does(objective, model):
    one = made(objective, model)[1]
    many = made(objective, model, sizes=(4, 2, 1))[1]
    other = made(objective, model, key=1)[1]
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(one.tokens, other.tokens)


def test_an_objective_of_a_pretrained_vocabulary_counts_from_its_own_top():
    _, example, config = made("masked_lm", {"architecture": "encoder"}, rate=0.3, top_id=7)
    assert config.text_ids == VOCAB
    assert (example.tokens == 7)[example.weights > 0].mean() > 0.7


def test_dropout_drops_in_training_alone():
    config = small.config({"dropout": 0.5, "n_layers": 1})
    batch = small.batch(config)
    with small.on_mesh(config):
        params = small.sharded(config, small.params(config))
        run = jax.jit(lambda p, b, key: losses.next_token(config, p, b, key)[0])
        first, same, other = (float(run(params, batch, jax.random.key(seed))) for seed in (0, 0, 1))
        plain = small.config({"n_layers": 1})
        kept = float(losses.next_token(plain, params, batch, jax.random.key(0))[0])
    assert first == same and len({first, other, kept}) == 3


def test_pairs_in_one_row_are_said_as_if_each_were_alone():
    """Packed, and against the logits of each target after START and its own source."""
    c = small.config(
        {"architecture": "encoder_decoder", "n_layers": 1, "seq_len": 12, "target_len": 10},
        {"objective": "pairs"},
    )
    rng = np.random.default_rng(0)
    both = [[rng.integers(0, 16, rng.integers(1, 5)).astype(np.int32) for _ in range(7)]
            for _ in range(2)]  # fmt: skip
    some = examples.of_pairs(*both, 12, 10)
    assert len(some) < 5 and sorted(i for row in some.rows for i in row) == list(range(7))
    with small.on_mesh(c):
        params = small.sharded(c, small.params(c))
        batch = mesh.put_batch(some.windows(np.arange(len(some))), jax.sharding.get_mesh())

        def loss(p):
            seen = corrupted(c, batch, jax.random.key(0))
            return losses.cross_entropy(c, p, seen, jax.random.key(0))[0]

        got, want = float(jax.jit(loss)(params)), 0.0

        @jax.jit
        def said(p, tokens, read, n):
            at = jnp.arange(12)[None]
            source = Source(read, at, (at < n).astype(jnp.int32))
            return transformer.apply(c.model, p, tokens, source=source)

        for source, target in zip(*both, strict=True):
            tokens, read = np.zeros((1, 10), np.int32), np.zeros((1, 12), np.int32)
            tokens[0, : len(target)] = [START, *target[:-1]]
            read[0, : len(source)] = source
            logits = np.asarray(said(params, tokens, read, len(source))[0], np.float64)
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            want -= log_p[np.arange(len(target)), target].sum()
    assert got == pytest.approx(want, rel=1e-5)
