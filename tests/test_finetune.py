"""Fine-tuning: heads, adapters, examples; a run that begins with another's weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from test_main import call, refused

import jaxlm
from jaxlm import api, loading, mesh
from jaxlm.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TuneConfig,
)
from jaxlm.data import examples
from jaxlm.data.chat import ChatTemplate
from jaxlm.model import lora, transformer
from jaxlm.model.presets import preset
from jaxlm.schema import UserError
from jaxlm.tasks import leaks
from jaxlm.train import example_losses, parameters
from jaxlm.train.optimizer import hyper
from jaxlm.train.step import abstract_state, program
from jaxlm.tune_config import LoraConfig


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with small.compiled_quickly():
        yield


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts that are kind or not by one word."""
    rng = np.random.default_rng(0)
    filler = "the film was about a man and his dog in a town by the sea".split()  # noqa: SIM905
    path = tmp_path_factory.mktemp("reviews") / "reviews.jsonl"
    with path.open("w") as f:
        for i in range(400):
            words = rng.choice(filler, 12).tolist()
            words[rng.integers(12)] = ("dull", "fine")[i % 2]
            f.write(json.dumps({"text": " ".join(words), "label": ("no", "yes")[i % 2]}) + "\n")
    return path


@pytest.fixture(scope="module")
def kind(reviews: Path) -> str:
    """The same reviews as a task, NAME=PATH."""
    task = reviews.parent / "kind.py"
    task.write_text(
        "from jaxlm.data.rows import rows\nfrom jaxlm.tasks.task import Item, Task\n"
        "def items(path):\n"
        "    for r in rows(path):\n"
        "        yield Item(r['text'], ('no', 'yes'), answer=('no', 'yes').index(r['label']))\n"
        "def get_task():\n"
        "    return Task('kind', 'choose', items, ('accuracy', 'macro_f1'))\n"
    )
    return f"{task}={reviews}"


def config(reviews: Path, **more) -> Config:
    return replace(
        Config(
            model=ModelConfig(
                architecture="encoder", d_model=16, n_layers=1, n_heads=2, vocab_size=256,
                seq_len=16, pooling="mean", scan_layers=False,
            ),
            data=DataConfig(tokenizer="wordpiece", eval_fraction=0.3, max_epochs=20),
            optimizer=OptimizerConfig(learning_rate=2e-2, schedule="linear"),
            train=TrainConfig(steps=40, global_batch_size=16, objective="classify", log_every=20,
                              eval_every=20, checkpoint_every=20, steps_per_dispatch=10),
            tune=TuneConfig(examples=(str(reviews),)),
        ),
        **more,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("pooling", ["first", "last", "mean", "each"])
def test_a_head_reads_what_pooling_says_and_no_padding(pooling: str) -> None:
    c = small.config({"n_classes": 3, "pooling": pooling, "seq_len": 12})
    with small.on_mesh(c):
        params = small.params(c)
    x_btd = np.random.default_rng(1).normal(size=(3, 12, 8)).astype(np.float32)
    lengths = [12, 5, 1]
    segments = (np.arange(12) < np.array(lengths)[:, None]).astype(np.int32)
    with small.on_mesh(c):
        got = np.asarray(transformer.pooled(c.model, small.sharded(c, params), x_btd, segments))
    w, b = params["classifier"]["weight"], params["classifier"]["bias"]
    for x, n, row in zip(x_btd, lengths, got, strict=True):
        of = {"first": x[0], "last": x[n - 1], "mean": x[:n].mean(0), "each": x}[pooling]
        np.testing.assert_allclose(row, of @ w + b, rtol=2e-5, atol=2e-5)


# ----------------------------------------------------------------------------------------- adapters


def test_an_adapter_is_a_product_of_low_rank_for_every_kind_of_weight() -> None:
    c = small.config({"activation": "swiglu", "n_kv_heads": 1})
    how = LoraConfig(rank=2, alpha=6.0, on=("hidden",))
    with small.on_mesh(c):
        params = small.params(c)
        adapters = jax.jit(lambda: lora.init(c.model, how, jax.random.key(0)))()
        placed = small.sharded(c, params)
        small.assert_near(lora.merged(c.model, how, placed, adapters), params)  # B is 0
        adapters = jax.tree.map(lambda x: x + 0.1, adapters)
        got = jax.device_get(lora.merged(c.model, how, placed, adapters))
    pairs = jax.device_get(adapters)["layers"]
    cuts = {"attention": {"query": 1, "out": 2}, "feed_forward": {"gate": 1, "down": 1}}
    for module, name, cut in ((m, n, cut) for m, c in cuts.items() for n, cut in c.items()):
        w, pair = params["layers"][module][name], pairs[module][name]
        n_in = int(np.prod(w.shape[1 : 1 + cut]))
        a, b = pair["a"].reshape(2, n_in, 2), pair["b"].reshape(2, 2, -1)
        want = w + 3.0 * np.einsum("lir,lro->lio", a, b).reshape(w.shape)
        np.testing.assert_allclose(got["layers"][module][name], want, rtol=1e-5, atol=1e-5)
    assert set(pairs["attention"]) == {"query", "key", "value", "out"}
    with pytest.raises(UserError, match="did you mean 'query'"):
        lora.table(c.model, LoraConfig(rank=2, on=("quary",)))


def test_only_adapters_move_and_many_run_at_once() -> None:
    c = small.config({"n_classes": 2, "pooling": "last"}, {"objective": "classify"},
                     tune=TuneConfig(lora=LoraConfig(rank=2)))  # fmt: skip
    batch = small.batch(c, steps=1)
    batch = batch._replace(targets=batch.targets % 2)
    with small.on_mesh(c):
        base = small.params(c)
        run = program(c)
        state = run.init(hyper(c))
        frozen = parameters.frozen(c, small.sharded(c, base))
        state = state._replace(frozen=frozen)
        placed = mesh.put_batch(batch, jax.sharding.get_mesh(), leading=1)
        moved, metrics = run.chunk(hyper(c), state, placed)
        frozen = moved.frozen  # the state before was donated
        assert np.isfinite(metrics["train/loss"]).all()
        small.assert_near(moved.frozen, {k: v for k, v in base.items() if k != "classifier"})
        b = jax.device_get(moved.params["adapters"]["layers"]["attention"]["query"]["b"])
        assert np.abs(b).max() > 0
        # At first B is 0, and its gradient (alpha / rank) · Aᵀ times that of the whole weight.
        full = replace(c, tune=TuneConfig())
        one_batch = jax.tree.map(lambda x: x[0], placed)

        def loss(p, config):
            whole = parameters.whole(config, p, frozen)
            return example_losses.classify(config, whole, one_batch, jax.random.key(0))[0]

        start = run.init(hyper(c)).params
        gradient = jax.jit(jax.grad(loss), static_argnums=1)
        mine = gradient(start, c)["adapters"]["layers"]["attention"]["value"]["b"]
        theirs = gradient({**frozen, **start["whole"]}, full)["layers"]["attention"]["value"]
        a = start["adapters"]["layers"]["attention"]["value"]["a"]
        want = 8.0 * np.einsum("ldr,ldhk->lrhk", *map(np.asarray, (a, theirs)))
        np.testing.assert_allclose(np.asarray(mine), want, rtol=1e-4, atol=1e-5)
        # Three adapters in one forward: each as if it were alone.
        several = [jax.tree.map(lambda x, k=k: x * k, moved.params) for k in (0.0, 1.0, 2.0)]
        stacked = jax.tree.map(lambda *x: jax.numpy.stack(x), *several)
        tokens = batch.tokens[0]

        def forward(params, frozen=frozen):
            whole = parameters.whole(c, params, frozen)
            return transformer.apply(c.model, whole, tokens)

        together = np.asarray(jax.jit(jax.vmap(forward))(stacked))
        one = jax.jit(forward)
        for params, logits in zip(several, together, strict=True):
            np.testing.assert_allclose(np.asarray(one(params)), logits, atol=1e-5)


SGD = """
import optax

def sgd(config):
    return optax.identity()
"""


def test_adapters_of_full_rank_move_as_the_whole_weights_do(tmp_path: Path) -> None:
    """One step of plain gradient descent. With A square and orthogonal and B zero, A's gradient is
    zero and W moves by (alpha / rank)² · A Aᵀ times what it moves by when it is whole."""
    (tmp_path / "own.py").write_text(SGD)
    own = {"name": f"{tmp_path / 'own.py'}:sgd", "weight_decay": 0.0, "grad_clip": 0.0,
           "schedule": "constant", "warmup_fraction": 0.0}  # fmt: skip
    how = LoraConfig(rank=8, alpha=16.0, on=("query", "value"))  # d_model is 8
    c = small.config(optimizer={**own, "learning_rate": 1e-2}, tune=TuneConfig(lora=how))
    whole = small.config(optimizer={**own, "learning_rate": 4e-2})
    batch = small.batch(c, steps=1)
    with small.on_mesh(c):
        base = small.params(c)
        run = program(c)
        state = run.init(hyper(c))
        frozen = parameters.frozen(c, small.sharded(c, base))
        adapters = state.params["adapters"]["layers"]["attention"]
        q = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0].astype(np.float32)
        for pair in adapters.values():
            a = np.broadcast_to(q, pair["a"].shape)
            pair["a"] = jax.device_put(a, pair["a"].sharding)
        placed = mesh.put_batch(batch, jax.sharding.get_mesh(), leading=1)
        moved, mine = run.chunk(hyper(c), state._replace(frozen=frozen), placed)
        got = jax.device_get(parameters.whole(c, moved.params, moved.frozen))
        moved, theirs = program(whole).chunk(hyper(whole), small.state(whole, base), placed)
        want = jax.device_get(moved.params)
    np.testing.assert_allclose(mine["train/loss"], theirs["train/loss"], rtol=1e-6)
    for name in ("query", "value"):
        start = base["layers"]["attention"][name]
        step = want["layers"]["attention"][name] - start
        assert np.abs(step).max() > 1e-4
        close = {"rtol": 1e-3, "atol": 1e-3 * np.abs(step).max()}
        np.testing.assert_allclose(got["layers"]["attention"][name] - start, step, **close)


# ----------------------------------------------------------------------------------------- examples


def test_equal_texts_stand_on_one_side(reviews: Path) -> None:
    found = examples.read([str(reviews)], "text", ["label"])
    training, held_out = examples.split(found, 0.3)
    assert not {e.input for e in training} & {e.input for e in held_out}
    assert 0.2 < len(held_out) / len(found) < 0.4
    again = examples.split(found[::-1], 0.3)[1]
    assert {e.input for e in again} == {e.input for e in held_out}
    assert examples.classes(training, held_out) == ("no", "yes")


def test_bad_examples_are_told_before_anything_runs(
    reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(text: str, **more) -> str:
        (tmp_path / "x.jsonl").write_text(text)
        c = config(tmp_path / "x.jsonl")
        c = replace(c, **more)
        with pytest.raises(UserError) as e:
            api.finetune(c, tmp_path / "run")
        assert not (tmp_path / "run" / "checkpoints").exists()
        return str(e.value)

    good = reviews.read_text()
    assert "no field 'label'" in said(good + '{"text": "a"}\n')
    assert "record 400 has no 'label'" in said(good + '{"text": "a", "label": null}\n')
    assert "empty 'text'" in said(good + '{"text": " ", "label": "no"}\n')
    alone = next(f"odd {i}" for i in range(99) if examples.is_held_out(f"odd {i}", 0.3))
    line = json.dumps({"text": alone, "label": "maybe"})
    assert "'maybe' is in held-out examples alone" in said(good + line + "\n")
    assert "2 to 1000 classes" in said(good.replace('"yes"', '"no"'))
    assert "expected files" in said(good, tune=TuneConfig())
    bad = replace(config(reviews).tune, lora=LoraConfig(rank=2), examples=(str(reviews),))
    assert "tune.start" in said(good, tune=bad)
    tuned = replace(config(reviews).train, objective="masked_lm")
    assert "not learnt from examples" in said(good, train=tuned)


@pytest.fixture(scope="module")
def trained(reviews: Path, kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    c = config(reviews)
    api.finetune(replace(c, train=replace(c.train, tasks=(kind,), task_items=50)), folder)
    return folder


def test_a_classifier_learns_and_is_evaluated(reviews: Path, trained: Path, kind: str) -> None:
    whole = _record(trained)
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").open()]
    found = [r["eval/accuracy"] for r in rows if "eval/accuracy" in r]
    assert len(found) == 2 and found[-1] >= 0.95 and whole["loss"] < 0.3
    model = jaxlm.from_pretrained(trained)
    assert model.labels == ("no", "yes")
    logits = model.classify(["the film was fine", "a dull town"])
    assert logits.argmax(1).tolist() == [1, 0]
    scores = api.evaluate(trained, [kind])
    assert all(r["value"] >= 0.95 and r["n"] == 400 for r in scores["rows"])
    assert np.sum(scores["details"]["kind"]["confusion"]["right_by_said"]) == 400
    first = api.evaluate(trained, [kind], limit=50)["rows"]
    during = {k: v for r in rows for k, v in r.items() if k.startswith("task/")}  # the last ones
    assert during == {f"task/kind/{r['metric']}": r["value"] for r in first}


def test_items_that_were_trained_on_are_told(
    reviews: Path, trained: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the reviews a share was held out by the hash of their text: the others are a leak."""
    pytest.importorskip("xxhash")
    texts = [json.loads(line)["text"] for line in reviews.open()]
    seen = {t for t in texts if not examples.is_held_out(t, 0.3)}
    asked = f"--workdir={trained}", f"--task={kind}"
    assert call("evaluate", *asked, "--leaks", "--json") == 0
    out, err = capsys.readouterr()
    [row] = [r for r in map(json.loads, out.splitlines()) if r["metric"] == "leaked"]
    assert row["value"] == pytest.approx(np.mean([t in seen for t in texts])) and row["n"] == 400
    assert f"kind: {sum(t in seen for t in texts)} of 400 items stand in the training text" in err


def test_words_are_tagged_at_their_first_token() -> None:
    found = [
        examples.Labelled("ab c", (("ab", "X"), ("c", "O"))),
        examples.Labelled("d", (("d", "O"),)),
    ]
    pieces = [
        [np.array(p, np.int32) for p in row] for row in (([9], [1, 2], [3], [8]), ([9], [4], [8]))
    ]
    some = examples.of_tags(pieces, found, ("O", "X"), 12)
    batch = some.windows(np.arange(len(some)))
    assert len(some) == 1 and batch.tokens[0, :8].tolist() == [9, 1, 2, 3, 8, 9, 4, 8]
    said = {at: int(batch.targets[0, at]) for at in np.flatnonzero(batch.weights[0]).tolist()}
    assert said == {1: 1, 3: 0, 6: 0}
    assert examples.classes(found, found) == ("O", "X")


@pytest.mark.slow  # 7 s
def test_a_tagger_learns_words(tmp_path: Path) -> None:
    rng, names = np.random.default_rng(0), {"Ada": "PER", "Oslo": "LOC"}
    with (tmp_path / "t.jsonl").open("w") as f:
        for _ in range(200):
            words = rng.choice(["Ada", "Oslo", "went", "to", "and", "saw"], 6).tolist()
            tags = [names.get(w, "O") for w in words]
            f.write(json.dumps({"words": words, "tags": tags}) + "\n")
    c = config(tmp_path / "t.jsonl")
    tuned = replace(c.tune, input="words", target="tags", pooling="each")
    api.finetune(replace(c, tune=tuned), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [r["eval/accuracy"] for r in rows if "eval/accuracy" in r][-1] >= 0.99
    with pytest.raises(UserError, match="need 'each'"):
        api.finetune(replace(c, tune=replace(tuned, pooling="mean")), tmp_path / "other")
    (tmp_path / "t.jsonl").write_text('{"words": ["a"], "tags": []}\n')
    with pytest.raises(UserError, match="as many classes as words"):
        api.finetune(replace(c, tune=tuned), tmp_path / "other")


def test_the_command_finds_nothing_left_to_do(
    reviews: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from jaxlm.config import *\nfrom jaxlm.model_config import *\n"
        "from jaxlm.tune_config import *\n"
        f"def get_config():\n    return {config(reviews)!r}\n"
    )
    where = [f"--config={own}", f"--workdir={trained}"]
    assert call("finetune", *where, "--json") == 0
    assert json.loads(capsys.readouterr().out) == _record(trained)
    assert "jaxlm finetune" in refused(capsys, "train", *where)
    assert call("report", f"--workdir={trained}") == 0
    assert "eval" in (trained / "report.html").read_text()


def _record(folder: Path) -> dict:
    found = json.loads((folder / "record.json").read_text())
    found.pop("format")
    return found


@pytest.mark.slow  # 7 s
def test_adapters_go_on_from_a_classifier(reviews: Path, trained: Path, tmp_path: Path) -> None:
    """The same labels keep their classifier; a checkpoint holds the adapters alone."""
    c = config(reviews)
    tuned = replace(c.tune, start=str(trained), lora=LoraConfig(rank=2))
    short = replace(c.train, steps=10, eval_every=10, checkpoint_every=10)
    c = replace(c, tune=tuned, train=short, model=ModelConfig())
    template = ChatTemplate("{{ bos_token }}{{ messages[0]['content'] }}", {"bos_token": "<s>"})
    loading.keep(trained, None, template)
    row = api.finetune(c, tmp_path / "lora")
    assert row.loss < 0.3 and row.d_model == 16
    rows = [json.loads(line) for line in (tmp_path / "lora" / "metrics.jsonl").open()]
    [before, after] = [(r["step"], r["eval/accuracy"]) for r in rows if "eval/accuracy" in r]
    assert before[0] == 0 and before[1] >= 0.95 and after[0] == 10  # of what it began with, too
    adapted = jaxlm.from_pretrained(tmp_path / "lora")
    assert adapted.classify(["the film was fine"]).argmax() == 1
    assert adapted.chat == template and adapted.bos_id is None  # as what it began with
    stored = list((tmp_path / "lora" / "checkpoints" / "10").rglob("*"))
    size = sum(p.stat().st_size for p in stored if p.is_file())
    full = sum(p.stat().st_size for p in trained.rglob("*") if p.is_file())
    assert size < full / 2


@pytest.mark.slow  # 10 s
def test_training_on_text_goes_on_from_another_run(tmp_path: Path) -> None:
    """Both domains' losses are logged: one falls, of the other something is forgotten."""
    for name, letters in (("a", "abcd"), ("b", "wxyz")):
        (tmp_path / name).mkdir()
        rng = np.random.default_rng(0)
        for i in range(40):
            (tmp_path / name / f"{i}.txt").write_text("".join(rng.choice(list(letters), 200)))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    base = Config(
        model=ModelConfig(d_model=16, n_layers=1, n_heads=2, seq_len=16, scan_layers=False),
        data=DataConfig(sources=(a, b), weights=(1.0, 0.0), eval_fraction=0.3, eval_sequences=16,
                        max_epochs=19),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        train=TrainConfig(steps=30, global_batch_size=16, steps_per_dispatch=10, log_every=10),
    )  # fmt: skip
    api.train(base, tmp_path / "first")
    more = replace(
        base,
        data=replace(base.data, weights=(0.1, 0.9)),
        tune=TuneConfig(start=str(tmp_path / "first")),
    )
    api.train(more, tmp_path / "second")

    def losses(run: str) -> dict[str, float]:
        rows = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").open()]
        return next(r for r in rows if f"eval/loss/{a}" in r)

    first, second = losses("first"), losses("second")
    rows = [json.loads(line) for line in (tmp_path / "second" / "metrics.jsonl").open()]
    assert all(f"eval/loss/{a}" not in r for r in rows if r["step"] == 0)  # none was asked for
    texts = {p.read_text() for p in (tmp_path / "a").iterdir()}
    texts |= {p.read_text() for p in (tmp_path / "b").iterdir()}
    read = [t.rstrip("\0") for t in leaks.trained_on(tmp_path / "first")]
    assert len(set(read)) == len(read) and 40 < len(read) < 70 and set(read) < texts
    assert first[f"eval/loss/{a}"] < 2.0 < first[f"eval/loss/{b}"]
    assert second[f"eval/loss/{b}"] < first[f"eval/loss/{b}"] - 1.0
    assert second[f"eval/loss/{a}"] < 3.0  # from fresh weights it would be 5.5
    small.words().save(tmp_path / "words")
    other = replace(more, data=replace(more.data, tokenizer=str(tmp_path / "words")))
    with pytest.raises(UserError, match="not the tokenizer of"):
        api.train(other, tmp_path / "third")


@pytest.mark.slow  # compiles two steps of 135 M parameters
def test_adapters_need_a_third_of_the_memory() -> None:
    """Of SmolLM2-135M, 1 × 128 tokens: state (weights, adapters, moments), and a whole step."""
    state_mib, step_mib = {}, {}
    for rank in (0, 8):
        c = Config(
            model=replace(preset("smollm2-135m"), seq_len=128),
            train=TrainConfig(global_batch_size=1),
            tune=TuneConfig(lora=LoraConfig(rank=rank)),
            mesh=MeshConfig(data=1),
        )
        with small.on_mesh(c, quick=False):
            state = abstract_state(c, hyper(c))
            if rank:
                whole = abstract_state(replace(c, tune=TuneConfig()), hyper(c)).params
                state = state._replace(frozen=parameters.frozen(c, whole))
            batch = small.batch(c, steps=1)
            placed = mesh.put_batch(batch, jax.sharding.get_mesh(), leading=1)
            used = program(c).chunk.lower(hyper(c), state, placed).compile().memory_analysis()
        state_mib[rank] = sum(4 * x.size for x in jax.tree.leaves(state)) / 2**20
        step_mib[rank] = (used.argument_size_in_bytes + used.temp_size_in_bytes) / 2**20
    for name, mib in (("state", state_mib), ("step", step_mib)):
        print(f"\n{name}: {mib[8]:,.0f} MiB of {mib[0]:,.0f} ({mib[8] / mib[0]:.0%})")
    assert state_mib[8] <= 0.35 * state_mib[0]
