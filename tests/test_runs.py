"""The table that fits read: from CSVs and run folders, with one clear line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.scaling import runs
from jaxlm.schema import JaxlmError, UserError

HEADER = "Model Size,Training FLOP,loss,color\n"
ROWS = "1e6,6e13,3.5,red\n2e6,24e13,3.1,blue\n"
COLUMNS = {"params": "Model Size", "flops": "Training FLOP", "loss": "loss"}


def csv_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    return path


# -------------------------------------------------------------------------------------------- CSV


def test_csv_with_a_column_map(tmp_path: Path) -> None:
    points = runs.from_csv(csv_file(tmp_path, HEADER + ROWS), COLUMNS)
    assert points.params.tolist() == [1e6, 2e6]
    assert points.params.dtype == np.float64
    assert points.loss.tolist() == [3.5, 3.1]
    assert points.tokens.tolist() == [1e7, 2e7]
    assert points.name == ("line 2", "line 3")
    assert points.warnings == ("no tokens given: D = C/(6N) assumed",)


def test_usual_headings_are_recognised_and_said(tmp_path: Path) -> None:
    points = runs.from_csv(csv_file(tmp_path, "\ufeff" + HEADER + "\n" + ROWS))
    assert points.flops.tolist() == [6e13, 24e13]
    assert "read column 'Model Size' as params" in points.warnings
    assert points.name == ("line 3", "line 4")  # as an editor counts


def test_groups_names_and_seeds_come_along(tmp_path: Path) -> None:
    text = "run,N,D,loss,budget,seed\na,1e6,1e7,3.5,small,0\nb,2e6,2e7,3.1,large,1\n"
    points = runs.from_csv(csv_file(tmp_path, text))
    assert points.name == ("a", "b")
    assert points.group is not None
    assert points.group.tolist() == ["small", "large"]
    assert points.seed is not None
    assert points.seed.tolist() == [0, 1]
    assert "no FLOPs given: C = 6ND assumed" in points.warnings


@given(st.floats(1e3, 1e12), st.floats(1e3, 1e13), st.sampled_from(["params", "tokens", "flops"]))
def test_two_of_three_suffice(tmp_path_factory, params: float, tokens: float, gone: str) -> None:
    values = {"params": params, "tokens": tokens, "flops": 6 * params * tokens}
    kept = {k: v for k, v in values.items() if k != gone}
    text = ",".join([*kept, "loss"]) + "\n" + ",".join([*map(repr, kept.values()), "2.5"]) + "\n"
    points = runs.from_csv(csv_file(tmp_path_factory.mktemp("csv"), text))
    found = [getattr(points, k)[0] for k in values]
    np.testing.assert_allclose(found, list(values.values()), rtol=1e-12)
    assert len(points.warnings) == 1


@pytest.mark.parametrize(
    ("text", "columns", "said"),
    [
        (HEADER + ROWS, {**COLUMNS, "params": "Modl Size"}, "did you mean 'Model Size'?"),
        (HEADER + ROWS, {**COLUMNS, "parms": "Model Size"}, "did you mean 'params'?"),
        (HEADER + "1e6,6e13,3.5,red\n2e6,lots,3.1,blue\n", COLUMNS,
         "runs.csv:3: column 'Training FLOP': expected a number above 0, got 'lots'"),
        (HEADER + "1e6,6e13,,red\n", COLUMNS, "runs.csv:2: column 'loss'"),
        (HEADER + "1e6,6e13,,crashed\n", COLUMNS, "--where=COLUMN=VALUE leaves rows out"),
        (HEADER + "-1e6,6e13,3.5,red\n", COLUMNS, "got '-1e6'"),
        (HEADER + "1e6,6e13,nan,red\n", COLUMNS, "got 'nan'"),
        (HEADER + "1e6,6e13\n", COLUMNS, "runs.csv:2: expected 4 cells, got 2"),
        (HEADER, COLUMNS, "at least one row"),
        ("", COLUMNS, "at least one row"),
        ("params,loss\n1,2\n", {}, "two of params, tokens, flops"),
        ("params,flops,perplexity\n1,2,3\n", {}, "no column for loss"),
        ("params,flops,loss,seed\n1,2,3,x\n", {}, "column 'seed': expected a number, got 'x'"),
    ],
)  # fmt: skip
def test_mistakes_in_a_csv_are_one_line(
    tmp_path: Path, text: str, columns: dict[str, str], said: str
) -> None:
    with pytest.raises(UserError) as e:
        runs.from_csv(csv_file(tmp_path, text), columns)
    assert said in str(e.value)
    assert "\n" not in str(e.value)


def test_files_that_are_no_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        runs.from_csv(tmp_path / "absent.csv")
    binary = tmp_path / "x.csv"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="cannot be read as a CSV"):
        runs.from_csv(binary)


# ------------------------------------------------------------------------------------ a run folder


def write_run(folder: Path, name: str, **changed: object) -> None:
    row = {
        "format": "jaxlm.record/1", "name": name, "fingerprint": name, "role": "fit",
        "status": "finished", "params": 900, "params_non_embedding": 500,
        "params_effective": 1000.0, "tokens": 50_000, "flops": 3e8, "loss": 2.5, "seed": 0,
        "budget": 3e8, "steps": 2000, **changed,
    }  # fmt: skip
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "record.json").write_text(json.dumps(row))


def test_what_enters_a_fit_and_what_does_not(tmp_path: Path) -> None:
    write_run(tmp_path, "a")
    write_run(tmp_path / "deep" / "er", "b", role="replicate", seed=1)
    write_run(tmp_path, "c", role="holdout", status="finished", loss=1.0)
    write_run(tmp_path, "d", status="diverged", loss=None)
    write_run(tmp_path, "e", fingerprint="a")
    points = runs.from_folder(tmp_path)
    assert points.name == ("a", "b")
    assert points.seed is not None
    assert points.seed.tolist() == [0, 1]
    assert {d["name"]: d["reason"] for d in points.dropped} == {
        "c": "held out: never fitted",
        "d": "not finished (diverged)",
        "e": "the same run as a",
    }
    assert points.group is not None
    assert set(points.group) == {"3e+08"}
    assert points.warnings == ()


@pytest.mark.parametrize(
    ("convention", "params"), [("effective", 1000), ("all", 900), ("non_embedding", 500)]
)
def test_conventions_of_n(tmp_path: Path, convention: runs.Convention, params: float) -> None:
    write_run(tmp_path, "a")
    points = runs.from_folder(tmp_path, convention)
    assert points.params.tolist() == [params]
    assert points.convention == convention
    assert points.flops_per_param_token == pytest.approx(3e8 / params / 50_000)


def test_single_runs_have_no_budget_label(tmp_path: Path) -> None:
    write_run(tmp_path, "a", role="single")
    assert runs.from_folder(tmp_path).group is None


def test_short_runs_are_warned_of(tmp_path: Path) -> None:
    write_run(tmp_path, "a", steps=999)
    (warning,) = runs.from_folder(tmp_path).warnings
    assert "1 of 1 runs" in warning


def test_mistakes_in_a_folder_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run"):
        runs.from_folder(tmp_path)
    write_run(tmp_path, "a")
    with pytest.raises(UserError, match="did you mean 'effective'"):
        runs.from_folder(tmp_path, "effectiv")  # type: ignore[arg-type]
    write_run(tmp_path, "a", tokens="many")
    with pytest.raises(UserError, match="tokens: expected a number above 0, got 'many'"):
        runs.from_folder(tmp_path)
    write_run(tmp_path, "a", status="diverged")
    with pytest.raises(UserError, match=r"none of its 1 runs.*diverged"):
        runs.from_folder(tmp_path)
    (tmp_path / "a" / "record.json").write_text('{"format": "jaxlm.record/1", "name": "a"}')
    with pytest.raises(UserError, match="no field 'fingerprint'"):
        runs.from_folder(tmp_path)
    (tmp_path / "a" / "record.json").write_text("{")
    with pytest.raises(JaxlmError, match="damaged"):
        runs.from_folder(tmp_path)


# ------------------------------------------------------------------------------------- from Python


def test_points_are_checked() -> None:
    with pytest.raises(UserError, match=r"points\.tokens: expected 2 values"):
        runs.Points([1, 2], [1], [1, 2], [1, 2])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"points\.loss\[1\]: expected a number above 0"):
        runs.Points([1, 2], [1, 2], [1, 2], [1, np.inf])  # type: ignore[arg-type]


def test_dropped_rows_are_listed() -> None:
    points = runs.Points(*(np.arange(1.0, 5),) * 4, group=np.array(list("aabb")))
    left = points.drop([3], "too large")
    assert left.loss.tolist() == [1, 2, 3]
    assert left.group is not None
    assert left.group.tolist() == ["a", "a", "b"]
    assert left.dropped == ({"name": "point 3", "index": 3, "loss": 4.0, "reason": "too large"},)
