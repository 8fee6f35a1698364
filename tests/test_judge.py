"""People's judgement: strengths against the model's likelihood, votes that survive, and the page in
a real browser, by keyboard."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import chromium
import numpy as np
import pytest
from scipy.optimize import minimize

from jaxlm.report.judge_page import server
from jaxlm.schema import UserError
from jaxlm.tasks import judging
from jaxlm.tasks.judging import Judgement

EVIL = "<img src=x onerror='window.bad=1'><script>window.bad=1</script>"


def test_strengths_are_the_likeliest_ones() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 3, 5):
        wins = rng.integers(0, 20, (n, n)).astype(float)
        np.fill_diagonal(wins, 0)
        won = wins + judging.PRIOR * ((wins + wins.T) > 0)

        def loss(s, won=won):
            s = np.append(s, -s.sum())
            return (won * np.logaddexp(0, -(s[:, None] - s[None, :]))).sum()

        best = minimize(loss, np.zeros(n - 1), tol=1e-12).x
        want = np.append(best, -best.sum())
        np.testing.assert_allclose(judging.strengths(wins), want, atol=1e-4)
    assert np.isfinite(judging.strengths(np.array([[0.0, 9.0], [0.0, 0.0]]))).all()


@pytest.fixture
def answers(tmp_path: Path) -> dict[str, str]:
    out = {}
    for model in ("alpha", "beta"):
        path = tmp_path / f"{model}.jsonl"
        said = {f"question {i}": f"{model} says {i}" for i in range(4)}
        said["question 2"] = EVIL
        rows = [json.dumps({"prompt": p, "said": s}) for p, s in said.items()]
        path.write_text("\n".join(rows))
        out[model] = str(path)
    return out


def test_pairs_are_blind_and_drawn_by_the_seed(answers: dict[str, str], tmp_path: Path) -> None:
    pairs = judging.pairs(answers, 3)
    assert pairs == judging.pairs(answers, 3) != judging.pairs(answers, 4)
    assert len(pairs) == 4 and [p.number for p in pairs] == [0, 1, 2, 3]
    lefts = {p.models[0] for s in range(9) for p in judging.pairs(answers, s)}
    assert lefts == {"alpha", "beta"}
    with pytest.raises(UserError, match="two models"):
        judging.pairs({"alpha": answers["alpha"]})
    judgement = Judgement(tmp_path / "votes", pairs)
    judgement.vote(0, "left")
    judgement.vote(1, "tie")
    judgement.vote(1, "right")  # thought again
    with (tmp_path / "votes" / "votes.jsonl").open("a") as f:
        f.write('{"pair": 3, "vo')  # killed while writing
    again = Judgement(tmp_path / "votes", pairs)
    assert again.votes() == {0: "left", 1: "right"}
    following = again.next()
    assert following is not None and following.number == 2
    again.vote(2, "tie")
    assert again.votes() == {0: "left", 1: "right", 2: "tie"}
    found = again.result()
    assert found["votes"] == 3 and sum(m["wins"] for m in found["models"]) == 3
    with pytest.raises(UserError, match="other answers"):
        Judgement(tmp_path / "votes", judging.pairs(answers, 4))
    with pytest.raises(UserError, match="left, right or tie"):
        again.vote(9, "left")


@pytest.fixture
def served(answers: dict[str, str], tmp_path: Path) -> Iterator[tuple[Judgement, str]]:
    judgement = Judgement(tmp_path / "votes", judging.pairs(answers, 0))
    with server(judgement) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield judgement, f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()


def test_the_page_is_judged_by_keyboard(served: tuple[Judgement, str], tmp_path: Path) -> None:
    judgement, url = served
    with chromium.opened(url, tmp_path / "profile") as page:
        shown = "document.getElementById('progress').textContent"
        page.until(shown, "0 of 4 judged")
        for i, (key, vote) in enumerate(
            (("ArrowLeft", "left"), ("ArrowDown", "tie"), ("ArrowRight", "right"))
        ):
            pair = judgement.pairs[i]
            for name in ("prompt", "left", "right"):
                text = page.run(f"document.getElementById('{name}').textContent")
                assert text == getattr(pair, name)
            whole = page.run("document.body.innerText")
            assert "alpha" not in whole.replace("alpha says", "")  # blind but for the answers
            page.press("x")  # no vote
            page.press(key)
            page.until(shown, f"{i + 1} of 4 judged")
            assert judgement.votes()[i] == vote
        page.picture(tmp_path / "pair.png")
        page.press("Backspace")
        page.until("document.getElementById('prompt').textContent", judgement.pairs[2].prompt)
        page.press("ArrowLeft")
        page.until("pair.number", 3)
        assert judgement.votes()[2] == "left"
        page.press("ArrowRight")
        page.until("document.getElementById('done').hidden", False)
        table = page.run("document.querySelector('tbody').innerText")
        assert "alpha" in table and "beta" in table
        assert page.run("window.bad") is None  # answers are text


def test_the_server_answers_its_own_page_alone(served: tuple[Judgement, str]) -> None:
    judgement, url = served

    def code(path: str, headers: dict[str, str], data: bytes | None = None) -> int:
        request = urllib.request.Request(url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status
        except urllib.error.HTTPError as e:
            return e.code

    vote = b'{"pair": 0, "vote": "left"}'
    with urllib.request.urlopen(url, timeout=5) as answer:
        policy, page = answer.headers["Content-Security-Policy"], answer.read().decode()
    token = page.split('const token = "')[1].split('"')[0]
    assert "default-src 'none'" in policy and "unsafe-inline'; script" in policy
    assert code("/", {"Host": "evil.example:80"}) == 403
    assert code("/vote", {}, vote) == 403
    assert code("/vote", {"X-Token": token, "Host": "evil.example:80"}, vote) == 403
    assert code("/vote", {"X-Token": token}, b"x" * 5000) == 413
    assert code("/vote", {"X-Token": token}, b'{"pair": 0, "vote": "both"}') == 400
    assert code("/pair/99", {}) == code("/../etc/passwd", {}) == 404
    assert judgement.votes() == {}
    assert code("/vote", {"X-Token": token}, vote) == 200
    assert judgement.votes() == {0: "left"}
