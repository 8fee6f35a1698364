"""Files survive kills, torn writes and full disks; a folder at a URL comes back as it was sent."""

import json
import os
import random
import resource
import time

import numpy as np
import pytest
from faults import small_disk, start
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.files import (
    Mirror,
    append_jsonl,
    filter_jsonl,
    read_json,
    read_jsonl,
    write_bytes,
    write_json,
)
from jaxlm.schema import JaxlmError, UserError


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    return text


# ------------------------------------------------------------------------------------------- JSON


def test_json_comes_back_as_plain_values(tmp_path):
    path = tmp_path / "new" / "folder" / "record.json"
    row = {
        "format": "jaxlm.record/1",
        "loss": np.float32(0.5),
        "sizes": (np.int64(1), 2),
        "curve": np.arange(3),
        "at": tmp_path,
        "bad": [float("nan"), float("inf")],
        "names": {1: "青空"},
    }
    write_json(path, row)
    assert read_json(path, "record") == {
        "format": "jaxlm.record/1",
        "loss": 0.5,
        "sizes": [1, 2],
        "curve": [0, 1, 2],
        "at": str(tmp_path),
        "bad": [None, None],
        "names": {"1": "青空"},
    }
    assert os.listdir(path.parent) == ["record.json"]
    with pytest.raises(ValueError, match="format"):
        write_json(path, {"loss": 1.0})


def test_read_json_says_in_one_line_what_is_wrong(tmp_path):
    path = tmp_path / "run.json"
    with pytest.raises(UserError) as missing:
        read_json(path, "run")
    path.write_text('{"format": "jaxlm.run/1", "st')
    with pytest.raises(JaxlmError) as damaged:
        read_json(path, "run")
    path.write_bytes(b'{"format": "jaxlm.run/1", "s": "\xff"}')
    with pytest.raises(JaxlmError) as not_text:
        read_json(path, "run")
    path.write_text('{"format": "jaxlm.run/2"}')
    with pytest.raises(UserError) as newer:
        read_json(path, "run")
    path.write_text('{"format": "jaxlm.sweep/1"}')
    with pytest.raises(UserError) as other:
        read_json(path, "run")
    path.write_text("[]")
    with pytest.raises(UserError) as no_object:
        read_json(path, "run")
    for error in (missing, damaged, not_text, newer, other, no_object):
        assert str(path) in one_line(error)
    assert "newer" in one_line(newer) and "jaxlm.sweep/1" in one_line(other)
    assert damaged.value.exit_code == 1 and newer.value.exit_code == 2


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """A file-size limit stands for a full disk: the write stops half-way."""
    path, rows = tmp_path / "a.json", tmp_path / "a.jsonl"
    write_json(path, {"format": "jaxlm.a/1", "v": 1})
    append_jsonl(rows, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(JaxlmError) as error:
            write_json(path, {"format": "jaxlm.a/1", "v": "x" * 200_000})
        with pytest.raises(JaxlmError) as row_error:
            append_jsonl(rows, {"step": 2, "v": "x" * 200_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "disk full" in one_line(error) and "a.json" in one_line(error)
    assert "disk full" in one_line(row_error)
    assert read_json(path, "a")["v"] == 1
    assert read_jsonl(rows) == [{"step": 1}]
    append_jsonl(rows, {"step": 2})
    assert read_jsonl(rows) == [{"step": 1}, {"step": 2}]
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.jsonl"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    with small_disk(tmp_path) as folder:
        path = folder / "a.json"
        write_json(path, {"format": "jaxlm.a/1", "v": 1})
        with pytest.raises(JaxlmError, match="disk full"):
            write_bytes(path, bytes(64 << 20))
        assert read_json(path, "a")["v"] == 1 and os.listdir(folder) == ["a.json"]


def test_a_kill_leaves_the_old_or_the_new_file(tmp_path):
    code = """
        import sys
        from jaxlm.files import write_json
        n = 0
        while True:
            write_json(sys.argv[1], {"format": "jaxlm.a/1", "n": n, "v": str(n) * 20_000})
            print(n, flush=True)
            n += 1
    """
    path, draw = tmp_path / "a.json", random.Random(0)
    for _ in range(3):
        with start(code, path) as child:
            child.stdout.readline()
            time.sleep(draw.uniform(0, 0.05))
            child.kill()
            said = [int(line) for line in child.stdout.read().splitlines()] or [0]
        found = read_json(path, "a")
        assert found["v"] == str(found["n"]) * 20_000
        assert found["n"] in (said[-1], said[-1] + 1)


# ------------------------------------------------------------------------------------- JSON lines


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=9)), max_size=5),
    cut=st.integers(0, 400),
)
def test_a_torn_last_line_is_as_if_never_written(tmp_path_factory, rows, cut):
    path = tmp_path_factory.mktemp("rows") / "m.jsonl"
    ends = [0]
    for row in rows:
        append_jsonl(path, row)
        ends.append(path.stat().st_size)
    cut = min(cut, ends[-1])
    if path.exists():
        os.truncate(path, cut)
    whole = rows[: max(i for i, end in enumerate(ends) if end <= cut)]
    assert read_jsonl(path) == whole
    append_jsonl(path, {"step": 1})
    assert read_jsonl(path) == [*whole, {"step": 1}]


def test_filtered_rows_are_bytes_of_the_uninterrupted_file(tmp_path):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    rows = [{"note": "start"}, *({"step": s, "loss": 1 / (s + 1)} for s in range(10))]
    for row in rows:
        append_jsonl(whole, row)
    for row in rows[:9]:
        append_jsonl(resumed, row)
    with open(resumed, "a") as f:
        f.write('{"step": 8, "lo')
    filter_jsonl(resumed, lambda row: row.get("step", 0) <= 4)
    assert read_jsonl(resumed) == rows[:6]
    for row in rows[6:]:
        append_jsonl(resumed, row)
    assert resumed.read_bytes() == whole.read_bytes()
    filter_jsonl(tmp_path / "absent.jsonl", lambda row: True)
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_a_damaged_line_inside_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(JaxlmError) as error:
        read_jsonl(path)
    assert f"{path}:2:" in one_line(error)


# ----------------------------------------------------------------------------------- remote folders


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    yield fs
    if fs.exists("/bucket"):
        fs.rm("/bucket", recursive=True)


def commit(local, step):
    folder = local / "checkpoints" / str(step)
    (folder / "state" / "d").mkdir(parents=True)
    (folder / "state" / "d" / "array").write_bytes(bytes([step]) * 1000)
    (folder / "MANIFEST.json").write_text(json.dumps({"step": step}))


def contents(folder):
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if name != ".lock"}


def remote(fs):
    return {p.removeprefix("/bucket/run/"): fs.cat_file(p) for p in fs.find("/bucket/run")}


def test_a_path_is_its_own_mirror(tmp_path):
    (tmp_path / "kept").write_text("1")
    for url in (str(tmp_path), f"file://{tmp_path}", tmp_path):
        mirror = Mirror(url)
        assert mirror.local == tmp_path and not mirror.remote
        mirror.pull()
        mirror.push()
    assert contents(tmp_path) == {"kept": b"1"}


def test_a_remote_folder_comes_back_as_it_was_sent(bucket):
    mirror = Mirror("memory://bucket/run")
    mirror.pull()
    (mirror.local / ".lock").write_text("held")
    (mirror.local / "config.json").write_text("{}")
    commit(mirror.local, 1)
    commit(mirror.local, 2)
    (mirror.local / "checkpoints" / "3.tmp").mkdir()
    (mirror.local / "checkpoints" / "3.tmp" / "half").write_text("x")
    mirror.push()
    sent = contents(mirror.local)
    del sent["checkpoints/3.tmp/half"]
    assert remote(bucket) == sent and len(sent) == 5

    again = Mirror("memory://bucket/run/")
    assert again.local == mirror.local
    (again.local / "stale").write_text("from a killed process")
    again.pull()
    assert contents(again.local) == sent
    assert (again.local / ".lock").read_text() == "held"


def test_a_push_sends_what_changed_and_removes_only_its_own(bucket):
    bucket.pipe_file("/bucket/run/notes.txt", b"somebody else's")
    mirror = Mirror("memory://bucket/run")
    mirror.pull()
    commit(mirror.local, 1)
    mirror.push(["checkpoints"])
    bucket.pipe_file("/bucket/run/other.txt", b"written meanwhile")
    commit(mirror.local, 2)
    for name in ("state/d/array", "MANIFEST.json"):
        (mirror.local / "checkpoints" / "1" / name).unlink()
    (mirror.local / "notes.txt").unlink()
    sent = []
    put = bucket.put
    mirror._fs.put = lambda a, b, **kw: sent.extend(b) or put(a, b, **kw)
    try:
        mirror.push([mirror.local / "checkpoints"])
    finally:
        del mirror._fs.put
    assert [p.removeprefix("/bucket/run/") for p in sent] == [
        "checkpoints/2/state/d/array",
        "checkpoints/2/MANIFEST.json",
    ]
    assert sorted(remote(bucket)) == [
        "checkpoints/2/MANIFEST.json",
        "checkpoints/2/state/d/array",
        "notes.txt",  # gone here, but not below what was pushed
        "other.txt",
    ]


def test_a_push_that_fails_sends_no_manifest_and_removes_nothing(bucket):
    mirror = Mirror("memory://bucket/run")
    mirror.pull()
    commit(mirror.local, 1)
    mirror.push()
    before = remote(bucket)
    commit(mirror.local, 2)
    (mirror.local / "checkpoints" / "1" / "MANIFEST.json").unlink()

    def fails(local, remote, **_):
        raise OSError("connection lost\nsecond line")

    mirror._fs.put = fails
    try:
        with pytest.raises(JaxlmError) as error:
            mirror.push()
    finally:
        del mirror._fs.put
    assert "memory://bucket/run" in one_line(error) and "connection lost" in one_line(error)
    assert remote(bucket) == before
    mirror.push()
    assert remote(bucket) == contents(mirror.local)


def test_a_remote_name_cannot_leave_the_folder(bucket, tmp_path):
    bucket.pipe_file("/bucket/run/../../../escaped", b"x")
    mirror = Mirror("memory://bucket/run")
    mirror._fs.find, kept = (lambda root: ["/bucket/run/../../escaped"]), mirror._fs.find
    try:
        with pytest.raises(JaxlmError, match="refused"):
            mirror.pull()
    finally:
        mirror._fs.find = kept
    assert not list(tmp_path.rglob("escaped"))


def test_an_unknown_protocol_is_the_users_mistake():
    with pytest.raises(UserError, match="nowhere"):
        Mirror("nowhere://bucket/run")
