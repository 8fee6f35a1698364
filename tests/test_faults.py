"""`jaxlm train` killed, told to stop, on a full disk, amid damaged files: nothing is ever lost.

The resumed run is bitwise the uninterrupted one, in its rows (but for perf/…) and its parameters.
"""

import json
import os
import random
import shutil
import signal
import time

import faults
import pytest
from faults import Sittings, small_disk, words

from jaxlm.files import read_jsonl

STEPS = 240
EVERY = 20  # steps between checkpoints
EXPERIMENT = """
from jaxlm.config import *

def get_config():
    return Config(
        model=ModelConfig(d_model=16, n_layers=1, n_heads=2, seq_len=16),
        data=DataConfig(sources=({text!r},), eval_sequences=8, eval_fraction=0.2),
        train=TrainConfig(steps={steps}, global_batch_size=8, steps_per_dispatch=4, log_every=6,
                          eval_every=40, checkpoint_every={every}, probes=("the sky is",)),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an experiment in it."""
    folder = tmp_path_factory.mktemp("faults")
    text = str(words(folder / "text"))
    experiment = EXPERIMENT.format(text=text, steps=STEPS, every=EVERY)
    (folder / "tiny.py").write_text(experiment)
    return folder


@pytest.fixture(scope="module")
def sittings(place):
    found = Sittings(place / "log")
    yield found
    found.close()


def train(place, folder):
    return "train", f"--config={place / 'tiny.py'}", f"--workdir={folder}"


@pytest.fixture(scope="module")
def whole(place, sittings):
    """The folder of the run that nothing interrupted."""
    assert sittings.run(*train(place, place / "whole")) == 0, sittings.log.read_text()
    return place / "whole"


def committed(folder):
    kept = (folder / "checkpoints").glob("*/MANIFEST.json")
    return sorted(int(p.parent.name) for p in kept if p.parent.name.isdigit())


def events(folder):
    found = read_jsonl(folder / "events.jsonl")
    return [(row["event"], row["step"]) for row in found]


def assert_same(folder, whole):
    """Bitwise: a manifest holds a digest of every array's values."""
    ours, theirs = faults.assert_same(folder, whole, STEPS)
    assert {k: v for k, v in ours["meta"].items() if k != "seconds"} == {
        k: v for k, v in theirs["meta"].items() if k != "seconds"
    }
    timeless = [json.loads((f / "record.json").read_text()) for f in (folder, whole)]
    assert len({json.dumps({**r, "wall_time_s": 0}) for r in timeless}) == 1


def wait_for_step(folder, step, is_over):
    """Until a row of this step, or a later one, is on disk."""
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not is_over():
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            last = [line for line in lines[-4:] if line.endswith(b"\n")]
            if last and json.loads(last[-1])["step"] >= step:
                return
        time.sleep(0.001)
    raise AssertionError("the run was over before it could be interrupted")


def interrupted(sittings, place, folder, step, signum, delay):
    """A sitting that gets the signal `delay` seconds after it has logged `step`: (exit code,
    seconds it took to leave)."""
    shutil.copytree(place / "whole" / "data", folder / "data", dirs_exist_ok=True)
    before = len(read_jsonl(folder / "events.jsonl"))
    pid = sittings.begin(*train(place, folder))
    while len(read_jsonl(folder / "events.jsonl")) == before:
        time.sleep(0.01)  # rows of the sitting before say nothing
    wait_for_step(folder, step, lambda: (folder / "record.json").exists())
    time.sleep(delay)
    os.kill(pid, signum)
    told = time.monotonic()
    return sittings.end(), time.monotonic() - told


def interrupt_often(sittings, place, whole, folder, signum, times):
    draw = random.Random(f"{signum} {times}")
    steps = sorted(draw.sample(range(6, STEPS - 12, 6), times))
    began = ("start", 0)
    for step in steps:
        code, seconds = interrupted(sittings, place, folder, step, signum, draw.uniform(0, 0.03))
        kept = committed(folder)
        ends = events(folder)
        if signum == signal.SIGKILL:
            assert code == -signal.SIGKILL
            assert ends[-1] == began
            assert not kept or kept[-1] % EVERY == 0
        else:
            assert code == 143 and seconds < 10
            said = f"stopped at step {kept[-1]}, saved; the same command goes on from there"
            assert sittings.log.read_text().splitlines()[-1] == f"jaxlm: {said}"
            assert ends[-2:] == [began, ("stop", kept[-1])] and kept[-1] >= step
        # The next sitting begins where the newest committed step ends.
        began = ("resume", kept[-1]) if kept else ("start", 0)
    assert sittings.run(*train(place, folder)) == 0, sittings.log.read_text()
    assert events(folder)[-2:] == [began, ("finish", STEPS)]
    assert_same(folder, whole)
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("*.corrupt"))


@pytest.mark.parametrize(
    "signum", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_three_interruptions_leave_the_uninterrupted_run(sittings, place, whole, tmp_path, signum):
    interrupt_often(sittings, place, whole, tmp_path / "run", signum, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "times"), [(signal.SIGKILL, 20), (signal.SIGTERM, 10)])
def test_many_interruptions_leave_the_uninterrupted_run(
    sittings, place, whole, tmp_path, signum, times
):
    interrupt_often(sittings, place, whole, tmp_path / "run", signum, times)


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(
    sittings, place, whole, tmp_path
):
    run = tmp_path / "run"
    interrupted(sittings, place, run, 130, signal.SIGKILL, 0.0)
    good, newest = committed(run)[-2:]
    for path in (run / "checkpoints" / str(newest) / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 2000:  # the values
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    assert sittings.run(*train(place, run)) == 0, sittings.log.read_text()
    assert events(run)[-2:] == [("resume", good), ("finish", STEPS)]
    assert (run / "checkpoints" / f"{newest}.corrupt").is_dir()
    assert_same(run, whole)


def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_when_there_is_room(
    sittings, place, whole, tmp_path
):
    with small_disk(tmp_path) as disk:
        run, filler = disk / "run", disk / "filler"
        interrupted(sittings, place, run, 60, signal.SIGKILL, 0.0)
        kept = committed(run)
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - 300_000))
        assert sittings.run(*train(place, run)) == 1
        lines = sittings.log.read_text().splitlines()
        assert lines[-1].startswith(f"jaxlm: {run}/") and "disk full" in lines[-1], lines
        assert "Traceback" not in "".join(lines)
        assert committed(run) == kept
        filler.unlink()
        assert sittings.run(*train(place, run)) == 0, sittings.log.read_text()
        assert [e for e in events(run) if e[0] != "start"] == [
            ("resume", kept[-1]), ("resume", kept[-1]), ("finish", STEPS),
        ]  # fmt: skip
        assert_same(run, whole)


def test_damaged_files_are_named_in_one_line_and_left_as_they_are(sittings, place, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "record.json").unlink()  # else nothing is left to do
    newest = sorted((run / "checkpoints").glob("*/MANIFEST.json"))
    damages = [
        ([run / "config.json"], b'{"format": "jaxlm.config/1", ', 1, "config.json: damaged"),
        ([run / "config.json"], b'{"format": "jaxlm.config/1"}', 1, "no field 'fingerprint'"),
        ([run / "config.json"], b'{"format": "jaxlm.config/9"}', 2, "newer"),
        ([run / "record.json"], b"\x00" * 100, 1, "record.json"),
        ([run / "record.json"], b'{"format": "jaxlm.record/1"}', 2, "record.json.name: missing"),
        ([run / "data" / "manifest.json"], b"{", 1, "manifest.json: damaged"),
        (
            [run / "data" / "train-00000.tokens.npy"],
            b"no array",
            1,
            "train-00000.tokens.npy is damaged",
        ),
        (newest, b"{}", 1, "no checkpoint verifies"),
        ([run / "metrics.jsonl"], b"{}\n{\n{}\n", 1, "metrics.jsonl:2: damaged"),
    ]
    for paths, damage, code, said in damages:
        before = [p.read_bytes() if p.exists() else None for p in paths]
        for path in paths:
            path.write_bytes(damage)
        assert sittings.run(*train(place, run)) == code, (said, sittings.log.read_text())
        lines = sittings.log.read_text().splitlines()
        assert lines[-1].startswith("jaxlm: ") and said in lines[-1], lines
        assert "Traceback" not in "".join(lines)
        for path, content in zip(paths, before, strict=True):
            assert path.read_bytes() == damage
            path.unlink() if content is None else path.write_bytes(content)
    assert sittings.run(*train(place, run)) == 0
    assert_same(run, whole)
