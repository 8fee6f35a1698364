"""Ten thousand damaged records, a line of 100 MB, bombs, killed workers, a Ray cluster."""

import contextlib
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxlm.config import DataConfig
from jaxlm.data import shards
from jaxlm.data.documents import Tally, read
from jaxlm.schema import UserError

GOOD = b'{"text": "fine %d"}'


def damaged(rng, i):
    """A record that cannot be used; what `read` must call it."""
    return rng.choice(
        [
            (b'{"text": "cut', "not JSON"),
            (b'{"text": "\xff\xfe %d"}' % i, "not UTF-8"),
            (b'{"text": "a\\u0000b %d"}' % i, "NUL character"),
            (b'{"text": "\\ud83d %d"}' % i, "not UTF-8"),
            (b'{"text": %d}' % i, "no string field 'text'"),
            (b'{"content": "x %d"}' % i, "no string field 'text'"),
            (b"[" * 50_000, "not JSON"),
            (bytes(rng.choices(range(1, 10), k=40)) + b"\x80", "not UTF-8"),
            (b'{"text": "   "}', "empty"),
            (b"null", "no string field 'text'"),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_ten_thousand_fuzzed_records_are_each_yielded_or_listed(seed, tmp_path):
    rng, lines, bad = random.Random(seed), [], []
    for i in range(10_000):
        if rng.random() < 0.5:
            raw, reason = damaged(rng, i)
            raw = raw.replace(b"\n", b" ").replace(b"\r", b" ")
            bad.append((f"{tmp_path}/x.jsonl.gz:{i + 1}", reason))
        else:
            raw = GOOD % i
        lines.append(raw)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    tally, texts = Tally(), []
    with pytest.raises(UserError, match="records are unusable") as e:
        for document in read([str(tmp_path)], tally=tally):
            texts.append(document.text)
    assert "\n" not in str(e.value)
    assert texts == [json.loads(x)["text"] for x in lines if x.startswith(b'{"text": "fine')]
    assert [(u.place, u.reason) for u in tally.listed] == bad


@pytest.mark.slow
def test_a_few_bad_records_are_quarantined_and_the_rest_is_built(tmp_path):
    rng = random.Random(7)
    lines = [GOOD % i for i in range(10_000)]
    at = sorted(rng.sample(range(10_000), 9))
    for i in at:
        lines[i] = damaged(rng, i)[0]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    shards.build(DataConfig(sources=(str(tmp_path / "x.jsonl"),)), 256, tmp_path / "out")
    rows = [json.loads(x) for x in (tmp_path / "out" / "quarantine.jsonl").open()][1:]
    assert [r["place"] for r in rows] == [f"{tmp_path}/x.jsonl:{i + 1}" for i in at]


PEAK = """
import resource, sys
from jaxlm.data.documents import Tally, read
tally, n = Tally(), 0
try:
    for d in read(sys.argv[1:], tally=tally):
        n += 1
except Exception as e:
    print(type(e).__name__, str(e)[:300].replace(chr(10), " "))
print(n, dict(tally.dropped), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000)
"""


def peak(*sources):
    args = [sys.executable, "-c", PEAK, *map(str, sources)]
    run = subprocess.run(args, capture_output=True, text=True, check=True)
    assert run.stderr == ""
    return run.stdout


@pytest.mark.slow
def test_a_line_of_100_mb_and_bombs_are_never_held_in_memory(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * 100_000_000 + b'"}\n' + GOOD % 1)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"0" * 500_000_000))
    out = peak(tmp_path)
    assert "decompression bomb" in out and "line too long" in out
    assert int(out.split()[-1]) < 600, out


@pytest.mark.slow
def test_a_zstandard_bomb_is_left_in_time(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    with (
        open(tmp_path / "c.jsonl.zst", "wb") as f,
        zstandard.ZstdCompressor().stream_writer(f) as w,
    ):
        for _ in range(2000):
            w.write(b"0" * 1_000_000)
    began = time.monotonic()
    out = peak(tmp_path)
    assert "decompression bomb" in out and int(out.split()[-1]) < 600, out
    assert time.monotonic() - began < 60


# ------------------------------------------------------------------------------ workers and nodes

CLEAN = """
import sys
from dataclasses import replace
from jaxlm.config import CleanConfig, DataConfig
from jaxlm.data import shards
if __name__ == "__main__":
    shards.SHARD_BYTES = 30_000
    data = DataConfig(sources=(sys.argv[1],), tokenizer="bpe", workers=2, engine=sys.argv[3],
                      clean=CleanConfig(quality=True, mask=True, near_duplicates=True))
    if sys.argv[3] == "ray":
        import ray
        from ray.cluster_utils import Cluster
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        node = cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, log_to_driver=False)
        if "kill" in sys.argv[4:]:
            import threading, time, pathlib
            def kill():
                while not list(pathlib.Path(sys.argv[2]).glob(".clean/1/*")):
                    time.sleep(0.05)
                cluster.remove_node(node, allow_graceful=False)
                cluster.add_node(num_cpus=2)
            threading.Thread(target=kill, daemon=True).start()
    shards.build(data, 600, sys.argv[2])
    print("built")
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Eight files with near-duplicates across them."""
    rng, folder = random.Random(3), tmp_path_factory.mktemp("many")
    words = [
        a + b
        for a in ["ba", "de", "fi", "go", "hu", "ka", "lo", "mi"]
        for b in ["n", "rest", "st", "ve", "ll", "nd"]
    ]
    for part in range(8):
        rows = []
        for _ in range(60):
            sentences = [" ".join(rng.choices(words, k=14)) + " and that." for _ in range(8)]
            rows.append(" the ".join(sentences))
        rows.append("The same text in every file, that is long enough to have words. " * 2)
        rows += [r + " more" for r in rows[:5]]
        lines = [json.dumps({"text": r}) + "\n" for r in rows]
        (folder / f"{part}.jsonl").write_text("".join(lines))
    return folder


def start(source, out, *how):
    script = out.parent / f"build-{'-'.join(how)}.py"
    script.write_text(CLEAN)
    args = [sys.executable, str(script), str(source), str(out), *how]
    return subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process, timeout=500):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0 and "built" in out, err[-2000:]


def contents(folder):
    paths = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def children(pid):
    """Worker processes below `pid`: those that a pool started to do its tasks."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"spawn_main" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


@pytest.fixture(scope="module")
def whole(many, tmp_path_factory):
    pytest.importorskip("datatrove")
    out = tmp_path_factory.mktemp("whole") / "out"
    finished(start(many, out, "local"))
    return contents(out)


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_and_doubles_nothing(many, whole, tmp_path):
    build = start(many, tmp_path / "out", "local")
    killed = 0
    while build.poll() is None and killed < 2:
        for pid in children(build.pid)[:1]:
            time.sleep(0.5)
            os.kill(pid, signal.SIGKILL)
            killed += 1
            time.sleep(3)
        time.sleep(0.05)
    finished(build)
    assert killed == 2 and contents(tmp_path / "out") == whole


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ("kill",)], ids=["two nodes", "a node is killed"])
def test_ray_makes_the_same_shards(how, many, whole, tmp_path):
    pytest.importorskip("ray")
    finished(start(many, tmp_path / "out", "ray", *how))
    assert contents(tmp_path / "out") == whole
