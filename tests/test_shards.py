"""Shards against a slow, plain construction of the same; rebuilds, kills, races and refusals."""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlm.config import DataConfig
from jaxlm.data import shards, tokenizer
from jaxlm.schema import JaxlmError, UserError


def write_corpus(path, texts, **fields):
    path.write_text("".join(json.dumps({"text": t, **fields}) + "\n" for t in texts))
    return str(path)


def texts(n):
    return [f"text {i}: " + "日本語 and code " * (i % 7) for i in range(n)]


def contents(folder):
    """Name → bytes of every visible file below a folder."""
    paths = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


@pytest.fixture
def corpus(tmp_path):
    return DataConfig(sources=(write_corpus(tmp_path / "x.jsonl", texts(300)),))


# ------------------------------------------------------------------------------- what is written


def slowly(texts, fraction):
    """Split → (bytes with an end after each document, starts), from the definition alone."""
    hashed = sorted((hashlib.sha256(t.encode()).hexdigest(), t) for t in set(texts))
    below = [t for h, t in hashed if int(h[:16], 16) / 16**16 < fraction]
    above = [t for h, t in hashed if t not in below]
    if not below:
        below, above = above[:1], above[1:]
    if not above:
        below, above = below[:-1], below[-1:]
    out = {}
    for name, docs in (("train", above), ("eval", below)):
        tokens, starts = [], [0]
        for t in docs:
            tokens += [*t.encode(), 0]
            starts.append(len(tokens))
        out[name] = (tokens, starts)
    return out


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(
        st.text(
            st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1
        ).filter(str.strip),
        min_size=2,
        max_size=12,
    ),
    fraction=st.floats(0.01, 0.99),
)
def test_shards_are_what_their_definition_says(tmp_path_factory, texts, fraction):
    if len(set(texts)) < 2:
        return
    folder = tmp_path_factory.mktemp("data")
    source = write_corpus(folder / "x.jsonl", texts)
    data = DataConfig(sources=(source,), eval_fraction=fraction)
    manifest = shards.build(data, 256, folder / "out")
    for name, (tokens, starts) in slowly(texts, fraction).items():
        split = getattr(manifest, name)
        found = np.load(folder / "out" / f"{name}-00000.tokens.npy", mmap_mode="r")
        offsets = np.load(folder / "out" / f"{name}-00000.offsets.npy")
        assert found.dtype == np.uint8 and offsets.dtype == np.int64
        assert found.tolist() == tokens and offsets.tolist() == starts
        assert (split.tokens, split.documents) == (len(tokens), len(starts) - 1)
        assert split.bytes == len(tokens) - split.documents
        assert split.shards[0].tokens_sha256 == hashlib.sha256(bytes(tokens)).hexdigest()
    assert manifest.dropped.get("duplicate", 0) == len(texts) - len(set(texts))
    assert shards.verify(folder / "out") == manifest


def test_a_subword_shard_decodes_to_its_documents(corpus, tmp_path):
    bpe = DataConfig(sources=corpus.sources, tokenizer="bpe")
    manifest = shards.build(bpe, 300, tmp_path / "out")
    found = tokenizer.load(tmp_path / "out" / "tokenizer")
    assert found.fingerprint == manifest.tokenizer["fingerprint"]
    assert manifest.dtype == "uint16"
    decoded = []
    for name in ("train", "eval"):
        tokens = np.load(tmp_path / "out" / f"{name}-00000.tokens.npy")
        offsets = np.load(tmp_path / "out" / f"{name}-00000.offsets.npy")
        for a, b in itertools.pairwise(offsets):
            assert tokens[b - 1] == found.eos_id
            decoded.append(found.decode(tokens[a : b - 1]))
    assert sorted(decoded) == sorted(texts(300))


def test_neither_split_nor_order_depends_on_the_order_of_reading(corpus, tmp_path):
    first = shards.build(corpus, 256, tmp_path / "a")
    mixed = np.random.default_rng(0).permutation(texts(300)).tolist()
    other = DataConfig(sources=(write_corpus(tmp_path / "y.jsonl", mixed + mixed[:5]),))
    second = shards.build(other, 256, tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    assert first.inputs_sha256 == second.inputs_sha256
    assert second.dropped == {"duplicate": 5}


def test_no_text_changes_sides_when_others_are_added(tmp_path):
    held = []
    for n in (400, 2000):
        source = write_corpus(tmp_path / f"{n}.jsonl", texts(n))
        shards.build(DataConfig(sources=(source,), eval_fraction=0.1), 256, tmp_path / str(n))
        tokens = np.load(tmp_path / str(n) / "eval-00000.tokens.npy").tobytes()
        held.append(set(tokens.decode().split("\0")[:-1]))
    assert held[0] == held[1] & set(texts(400))
    assert 140 < len(held[1]) < 260  # 200 expected, sd 13


def test_the_manifest_says_what_was_read_under_which_licence(tmp_path):
    rows = [{"text": "a", "licence": "MIT"}, {"text": "bb", "language": "ja"}, {"text": "bb"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"text": ""}]))
    (tmp_path / "y.txt").write_text("今日は")
    sources = (str(tmp_path / "x.jsonl"), str(tmp_path / "y.txt"))
    shards.build(DataConfig(sources=sources, licence="CC0-1.0"), 256, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "manifest.json").read_text())
    origins = [
        (o["source"], o["language"], o["text_licence"], o["documents"], o["bytes"])
        for o in written["origins"]
        if o["documents"]
    ]
    assert origins == [
        (sources[0], "", "MIT", 1, 1),
        (sources[0], "ja", "CC0-1.0", 1, 2),  # the first of two equal texts stays
        (sources[1], "", "CC0-1.0", 1, 9),
    ]
    assert {o["package_licence"] for o in written["origins"]} == {"LicenseRef-unstated"}
    assert written["format"] == "jaxlm.data/1" and written["records"] == 5
    assert written["dropped"] == {"duplicate": 1, "empty": 1}
    assert list(written["locations"]) == list(sources)
    lines = [json.loads(x) for x in (tmp_path / "out" / "quarantine.jsonl").open()]
    assert lines[1:] == [{"place": f"{sources[0]}:4", "reason": "empty", "detail": ""}]


def test_progress_reaches_its_total_in_every_step(corpus, tmp_path):
    seen = []
    bpe = DataConfig(sources=corpus.sources, tokenizer="bpe")
    shards.build(bpe, 300, tmp_path / "out", lambda *call: seen.append(call))
    assert all(0 <= done <= total for done, total, _ in seen)
    last = {step: (done, total) for done, total, step in seen}
    assert list(last) == ["collecting", "training the tokenizer", "tokenising"]
    assert all(done == total > 0 for done, total in last.values())


# ------------------------------------------------------------------------------- again, and again


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_a_rebuild_is_byte_identical_also_in_another_process(name, corpus, tmp_path):
    data = DataConfig(sources=corpus.sources, tokenizer=name)
    shards.build(data, 300, tmp_path / "a")
    code = f"""
from jaxlm.config import DataConfig
from jaxlm.data import shards
shards.build(DataConfig(sources={data.sources!r}, tokenizer={name!r}), 300, {str(tmp_path / "b")!r})
"""
    env = {**os.environ, "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_finished_folder_is_reused_without_its_sources(corpus, tmp_path):
    built = shards.build(corpus, 256, tmp_path / "out")
    before = contents(tmp_path / "out")
    os.unlink(corpus.sources[0])
    watched = DataConfig(sources=corpus.sources, seed=3, max_epochs=9.0, eval_sequences=7)
    assert shards.build(watched, 512, tmp_path / "out") == built
    assert contents(tmp_path / "out") == before
    with pytest.raises(UserError, match="more than the 100"):
        shards.build(corpus, 100, tmp_path / "out")


def test_a_different_request_in_the_same_folder_is_refused(corpus, tmp_path):
    shards.build(corpus, 256, tmp_path / "out")
    with pytest.raises(UserError) as e:
        shards.build(DataConfig(sources=corpus.sources, eval_fraction=0.2), 256, tmp_path / "out")
    assert "was built for eval_fraction=0.05, now 0.2 is asked for" in str(e.value)
    assert "\n" not in str(e.value)


def test_an_edited_source_function_is_a_different_request(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("def docs():\n    return ['a', 'b']\n")
    data = DataConfig(sources=(f"{own}:docs",))
    shards.build(data, 256, tmp_path / "out")
    own.write_text("def docs():\n    return ['a', 'b', 'c']\n")
    with pytest.raises(UserError, match=r"was built for sha256 of .*own\.py="):
        shards.build(data, 256, tmp_path / "out")


# -------------------------------------------------------------------------------- kills and races

BUILD = """
import os, signal, sys
from jaxlm.config import DataConfig
from jaxlm.data import shards
from jaxlm.data import spool
spool.GROUP_BYTES = 2000
shards.SHARD_BYTES = 4000
calls = 0
def progress(done, total, step):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
data = DataConfig(sources=(sys.argv[1],), tokenizer="bpe", workers=1)
shards.build(data, 300, sys.argv[2], progress)
print(calls)
"""


def run_build(source, out, kill_at=0):
    args = [sys.executable, "-c", BUILD, source, str(out), str(kill_at)]
    return subprocess.run(args, capture_output=True, text=True)


def check_kills(corpus, tmp_path, points):
    source = corpus.sources[0]
    whole = run_build(source, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    for kill_at in points(int(whole.stdout)):
        out = tmp_path / f"killed-{kill_at}"
        assert run_build(source, out, kill_at).returncode == -signal.SIGKILL
        with pytest.raises(UserError, match="no such file"):
            shards.read_manifest(out)
        again = run_build(source, out)
        assert again.returncode == 0 and int(again.stdout) <= int(whole.stdout)
        assert contents(out) == contents(tmp_path / "whole")
        shards.verify(out)


def test_a_folder_left_by_a_kill_is_rebuilt(corpus, tmp_path):
    check_kills(corpus, tmp_path, lambda calls: (calls // 2, calls - 1))


@pytest.mark.slow
def test_a_folder_left_by_a_kill_anywhere_is_rebuilt(corpus, tmp_path):
    check_kills(corpus, tmp_path, lambda calls: range(1, calls + 1))


def test_what_is_whole_is_not_made_again(tmp_path):
    """A build that was killed goes on with the shards that are missing, and reads nothing anew."""
    (tmp_path / "own.py").write_text(
        SLOW_SOURCE.replace("0.05", "0").replace("range(20)", "range(4000)")
    )
    source, out = f"{tmp_path}/own.py:docs", tmp_path / "out"
    calls = int(run_build(source, tmp_path / "whole").stdout)
    (tmp_path / "reads").unlink()
    assert run_build(source, out, calls - 1).returncode == -signal.SIGKILL
    made = {p.name: p.stat().st_mtime_ns for p in out.glob("*.documents.npy")}
    assert run_build(source, out).returncode == 0
    assert (tmp_path / "reads").read_text() == "read\n"
    assert len(made) > 2
    again = [n for n in made if (out / n).stat().st_mtime_ns != made[n]]
    assert len(again) <= 2  # the shard it was at
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("workers", [1, 2])
def test_several_shards_hold_what_one_does(workers, corpus, tmp_path, monkeypatch):
    one = shards.build(corpus, 256, tmp_path / "one")
    monkeypatch.setattr(shards, "SHARD_BYTES", 6000)
    many = shards.build(replace(corpus, workers=workers), 256, tmp_path / "many")
    assert len(many.train.shards) > 2 and len(one.train.shards) == 1
    for split in ("train", "eval"):
        pieces = getattr(many, split).shards
        joined = [np.load(tmp_path / "many" / f"{p.name}.tokens.npy") for p in pieces]
        whole = np.load(tmp_path / "one" / f"{split}-00000.tokens.npy")
        np.testing.assert_array_equal(np.concatenate(joined), whole)
        sizes = [replace(getattr(m, split), shards=()) for m in (one, many)]
        assert sizes[0] == sizes[1]
    assert many.origins == one.origins and shards.verify(tmp_path / "many") == many


def test_the_texts_of_each_source_stand_together(tmp_path):
    sources = tuple(
        write_corpus(tmp_path / f"{n}.jsonl", [f"{n} {i}" for i in range(50)]) for n in "ba"
    )
    manifest = shards.build(DataConfig(sources=sources), 256, tmp_path / "out")
    tokens = np.load(tmp_path / "out" / "train-00000.tokens.npy").tobytes().decode()
    [piece] = manifest.train.shards
    b, a = piece.segments
    assert (b.source, a.source) == (0, 1) and b.documents + a.documents == piece.documents
    assert set(tokens[: b.tokens].replace("\0", "")) <= set("b 0123456789")
    assert tokens[b.tokens :].startswith("a ") and "b" not in tokens[b.tokens :]


def test_append_adds_shards_and_leaves_the_others_alone(tmp_path):
    old, new = texts(200), [f"newer {i}" for i in range(100)]
    first = write_corpus(tmp_path / "1.jsonl", old)
    second = write_corpus(tmp_path / "2.jsonl", new + old[:30])
    small = DataConfig(sources=(first,), eval_fraction=0.1, tokenizer="bpe")
    both = replace(small, sources=(first, second))
    before = shards.build(small, 300, tmp_path / "out")
    files = contents(tmp_path / "out")
    with pytest.raises(UserError, match="was built for sources="):
        shards.build(both, 300, tmp_path / "out")
    after = shards.build(both, 300, tmp_path / "out", append=True)
    kept = contents(tmp_path / "out")
    assert all(kept[n] == files[n] for n in files if n.endswith((".npy", "tokenizer.json")))
    assert after.dropped == {"duplicate": 30}
    assert after.train.documents + after.eval.documents == 300
    assert after.train.shards[0] == before.train.shards[0] and len(after.train.shards) == 2
    assert [o.documents for o in after.origins] == [200, 100]
    assert shards.verify(tmp_path / "out") == after
    assert shards.build(both, 300, tmp_path / "out") == after  # and it is what was asked for
    whole = shards.build(both, 300, tmp_path / "whole")
    assert whole.eval.documents == after.eval.documents  # the split is the same


SLOW_SOURCE = """
import pathlib, time
def docs():
    with open(pathlib.Path(__file__).parent / "reads", "a") as f:
        f.write("read\\n")
    for i in range(20):
        time.sleep(0.05)
        yield f"text {i}"
"""


def test_of_two_builders_one_builds_and_the_other_waits(tmp_path):
    (tmp_path / "own.py").write_text(SLOW_SOURCE)
    args = [sys.executable, "-c", BUILD, f"{tmp_path}/own.py:docs", str(tmp_path / "out"), "0"]
    both = [subprocess.Popen(args, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate(timeout=60)[1] for p in both] == ["", ""]
    assert [p.returncode for p in both] == [0, 0]
    assert (tmp_path / "reads").read_text() == "read\n"
    shards.verify(tmp_path / "out")


def test_a_builder_that_waits_says_so_and_goes_on_when_the_other_is_killed(corpus, tmp_path):
    (tmp_path / "own.py").write_text(SLOW_SOURCE.replace("0.05", "60"))
    args = [sys.executable, "-c", BUILD, f"{tmp_path}/own.py:docs", str(tmp_path / "out"), "0"]
    holder = subprocess.Popen(args)
    while not (tmp_path / "reads").exists():
        time.sleep(0.01)
    said = []

    def progress(done, total, step):
        said.append(step)
        if "waiting" in step:
            holder.kill()
            holder.wait()

    shards.build(corpus, 256, tmp_path / "out", progress)
    assert said[0] == f"waiting for another process to build {tmp_path}/out"
    shards.verify(tmp_path / "out")


def test_a_full_disk_is_one_line_and_leaves_no_manifest(corpus, tmp_path):
    # A limit on the size of a file makes writing fail like a full disk.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))\n"
    code = limit + BUILD.replace(
        "shards.build(",
        "from jaxlm.schema import JaxlmError\ntry:\n  shards.build(",
    ).replace("print(calls)", "except JaxlmError as e: sys.exit(f'{e.exit_code} {e}')")
    args = [sys.executable, "-c", code, corpus.sources[0], str(tmp_path / "out"), "0"]
    run = subprocess.run(args, capture_output=True, text=True)
    assert run.stderr.startswith(f"1 {tmp_path}/out: disk full") and run.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run_build(corpus.sources[0], tmp_path / "out").returncode == 0


# ----------------------------------------------------------------------------- damage and refusals


def test_damage_is_found(corpus, tmp_path):
    out = tmp_path / "out"
    shards.build(corpus, 256, out)
    file = out / "train-00000.tokens.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(JaxlmError, match=r"train-00000\.tokens\.npy is damaged"):
        shards.build(corpus, 256, out)
    flipped = bytearray(whole)
    flipped[-10] ^= 4
    file.write_bytes(flipped)
    with pytest.raises(JaxlmError, match="does not match its manifest"):
        shards.verify(out)
    file.unlink()  # unfinished, as after half a copy: built anew
    shards.build(corpus, 256, out)
    assert file.read_bytes() == whole
    (out / "manifest.json").write_text("{")
    with pytest.raises(JaxlmError, match="damaged"):
        shards.build(corpus, 256, out)
    (out / "manifest.json").write_text('{"format": "jaxlm.run/1"}')
    with pytest.raises(UserError, match=r"expected format jaxlm\.data"):
        shards.build(corpus, 256, out)


def test_what_cannot_be_built_is_refused_and_leaves_no_manifest(corpus, tmp_path):
    one = DataConfig(sources=(write_corpus(tmp_path / "one.jsonl", ["a", "a"]),))
    with pytest.raises(UserError, match="one distinct document only"):
        shards.build(one, 256, tmp_path / "out")
    with pytest.raises(UserError, match="more than the 255"):
        shards.build(corpus, 255, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(UserError, match="on this machine"):
        shards.build(corpus, 256, "gs://bucket/data")
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxlmError, match="cannot be written"):
        shards.build(corpus, 256, tmp_path / "file")


def test_an_id_beyond_the_vocabulary_never_reaches_a_shard(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer.Bytes, "vocab_size", 100)
    with pytest.raises(JaxlmError, match="not below"):
        shards.build(corpus, 256, tmp_path / "out")
