"""The command line: exit codes, one clear line per mistake, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from jaxlm.main import main

TINY = """
from jaxlm.config import *

def get_config():
    return Config(
        model=ModelConfig(d_model=16, n_layers=1, n_heads=2, seq_len=16),
        data=DataConfig(sources=({source!r},), eval_sequences=4, eval_fraction=0.3),
        train=TrainConfig(steps=20, global_batch_size=8, steps_per_dispatch=5, log_every=5,
                          checkpoint_every=10, sample_prompts=("a",), sample_tokens=4,
                          probes=("the sky is",)),
    )
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"document {i}: the sky is blue and the sea is wide. " * 4)
    return folder


@pytest.fixture(scope="module")
def experiment(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experiment") / "tiny.py"
    path.write_text(textwrap.dedent(TINY.format(source=str(text))))
    return path


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a mistake gives, the last on stderr; the exit code is 2."""
    assert call(*arguments) == 2
    out = capsys.readouterr()
    line = out.err.splitlines()[-1]
    assert line.startswith("jaxlm: ") and "Traceback" not in out.err, out.err
    return line


def test_misspelt_things_are_named_with_a_hint(
    capsys: pytest.CaptureFixture[str], experiment: Path, tmp_path: Path
) -> None:
    config, workdir = f"--config={experiment}", f"--workdir={tmp_path / 'run'}"
    assert "did you mean 'train'" in refused(capsys, "trian")
    assert "config" in refused(capsys, "train", "--confg=x")
    line = refused(capsys, "train", config, workdir, "--config.optimizer.learning_rat=1")
    assert "config.optimizer.learning_rat" in line and "'learning_rate'" in line
    line = refused(capsys, "train", config, workdir, "--config.model.d_model=wide")
    assert "config.model.d_model" in line and "int" in line and "'wide'" in line
    line = refused(capsys, "train", config, workdir, "--config.model.n_heads=3")
    assert "n_heads" in line and "nearest" in line
    line = refused(capsys, "train", config, workdir, "--config.mesh.data=7")
    assert "config.mesh" in line and "7" in line
    assert "no such file" in refused(capsys, "train", "--config=missing.py", workdir)
    assert "use 'jaxlm train'" in refused(capsys, "sweep", config, workdir)
    assert "--workdir" in refused(capsys, "train", config)
    for name in ("optimizer.name=adamv", "optimizer.schedule=wds", "train.objective=next"):
        assert name.partition("=")[0] in refused(
            capsys, "train", config, workdir, f"--config.{name}"
        )
    assert not (tmp_path / "run" / "data").exists()  # all of it before any text is read


def test_an_empty_corpus_is_refused(
    capsys: pytest.CaptureFixture[str], experiment: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    line = refused(
        capsys, "train", f"--config={experiment}", f"--workdir={tmp_path / 'run'}",
        f"--config.data.sources={tmp_path / 'empty'}",
    )  # fmt: skip
    assert "data.sources" in line and "empty" in line


def test_help_lists_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--help") == 0
    out = capsys.readouterr().out
    assert "--config.model.d_model" in out and "--config.train.steps" in out
    assert call("sweep", "--help") == 0
    assert "--config.base.model.d_model" in capsys.readouterr().out
    assert call("--help") == 0


def test_a_run_from_the_command_line_ends_goes_on_and_speaks(
    capsys: pytest.CaptureFixture[str], experiment: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ("train", f"--config={experiment}", f"--workdir={run}", "--json")
    assert call(*arguments) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["status"] == "finished" and first["tokens"] == 20 * 8 * 16
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "train/loss" in r] == [5, 10, 15, 20]
    assert {"eval/loss", "eval/bpb", "probe/top", "sample/text"} <= {k for r in rows for k in r}

    before = (run / "metrics.jsonl").read_bytes()
    assert call(*arguments) == 0  # nothing left to do
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == first
    assert (run / "metrics.jsonl").read_bytes() == before

    line = refused(capsys, *arguments, "--config.model.d_model=32")
    assert "model.d_model was 16, is 32" in line
    line = refused(capsys, *arguments, "--config.data.eval_fraction=0.5")
    assert "eval_fraction" in line

    words = ("generate", f"--workdir={run}", "--prompt=the sky", "--max_new_tokens=5", "--json")
    ways = ("--frequency_penalty=-0.5", "--presence_penalty=0.1", "--typical_p=0.9")
    assert call(*words, *ways, "--logit_bias=97=1e9", "--logit_bias=98=-1") == 0
    row = json.loads(capsys.readouterr().out)
    assert row == {"prompt": "the sky", "text": "aaaaa"}
    assert "--logit_bias: expected ID=NUMBER, got '7'" in refused(capsys, *words, "--logit_bias=7")
    assert "expected --num_beams" in refused(capsys, *words, "--length_penalty=2")

    other = ("train", f"--config={experiment}", f"--workdir={tmp_path / 'watched'}", "--json")
    assert call(*other, "--track=tensorboard", "--profile=5:10") == 0
    assert list((tmp_path / "watched" / "tensorboard").glob("events*"))
    assert any((tmp_path / "watched" / "profile").rglob("*.pb"))
    capsys.readouterr()

    assert call("report", f"--workdir={run}") == 0
    assert (run / "report.html").stat().st_size > 1000


def test_a_second_process_in_the_workdir_is_turned_away(experiment: Path, tmp_path: Path) -> None:
    from jaxlm.train.workdir import lock

    run = tmp_path / "run"
    run.mkdir()
    command = [sys.executable, "-m", "jaxlm", "train", f"--config={experiment}", f"--workdir={run}"]
    with lock(run):
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1 and str(os.getpid()) in done.stderr, done.stderr
