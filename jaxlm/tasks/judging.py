"""People's judgement: which pairs of answers they see, their votes, and Bradley–Terry strengths."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlm.data.rows import field, rows
from jaxlm.files import append_jsonl, read_json, read_jsonl, write_json
from jaxlm.schema import UserError

FORMAT = "jaxlm.judgement/1"
Side = Literal["left", "right", "tie"]
PRIOR = 0.5  # wins that each of a pair is given, so that no strength is infinite


@dataclass(frozen=True)
class Pair:
    """Two models' answers to one prompt, in the order in which they are shown."""

    number: int
    prompt: str
    left: str
    right: str
    models: tuple[str, str]  # never shown


def pairs(answers: dict[str, str], seed: int = 0) -> list[Pair]:
    """All pairs of models for each prompt that both answered, order and sides drawn by `seed`.

    `answers`: model → a file of records with "prompt" and "said" (`jaxlm evaluate --out` writes
    such). Raises UserError for fewer than two models and for no prompt in common.
    """
    if len(answers) < 2:
        raise UserError("--answers: expected two models or more, each as NAME=FILE")
    said = {name: _said(name, path) for name, path in answers.items()}
    rng, found = np.random.default_rng(seed), []
    for a, b in itertools.combinations(sorted(said), 2):
        for prompt in said[a]:
            if prompt in said[b]:
                left, right = (a, b) if rng.random() < 0.5 else (b, a)
                found.append((prompt, left, right))
    if not found:
        raise UserError("--answers: no prompt that two of the models answered")
    order = rng.permutation(len(found)).tolist()
    return [
        Pair(i, p, said[left][p], said[right][p], (left, right))
        for i, (p, left, right) in enumerate(found[k] for k in order)
    ]


def _said(name: str, path: str) -> dict[str, str]:
    where = f"--answers={name}"
    found = enumerate(rows(path, where))
    return {str(field(r, "prompt", i, where)): str(field(r, "said", i, where)) for i, r in found}


# -------------------------------------------------------------------------------------------- votes


class Judgement:
    """A folder with the votes on some pairs: judge.json says which, votes.jsonl has one a line.

    Raises UserError for a folder of other pairs.
    """

    def __init__(self, folder: Path, pairs: Sequence[Pair]) -> None:
        self.pairs, self.votes_file = list(pairs), folder / "votes.jsonl"
        text = json.dumps([[p.prompt, p.left, p.right, p.models] for p in pairs])
        mark = hashlib.sha256(text.encode()).hexdigest()[:16]
        path = folder / "judge.json"
        if path.exists():
            if read_json(path, "judgement")["pairs"] != mark:
                raise UserError(f"--workdir: {folder} has votes on other answers; choose another")
        else:
            models = sorted({m for p in pairs for m in p.models})
            write_json(path, {"format": FORMAT, "pairs": mark, "models": models})

    def votes(self) -> dict[int, Side]:
        """Number of a pair → the last vote on it."""
        if not self.votes_file.exists():
            return {}
        return {row["pair"]: row["vote"] for row in read_jsonl(self.votes_file)}

    def vote(self, number: int, side: str) -> None:
        """Raises UserError for what is no pair or no vote."""
        if side not in ("left", "right", "tie") or not 0 <= number < len(self.pairs):
            raise UserError(f"vote: expected left, right or tie on a pair, got {side!r}, {number}")
        append_jsonl(self.votes_file, {"pair": number, "vote": side})

    def next(self) -> Pair | None:
        """The first pair without a vote."""
        done = self.votes()
        return next((p for p in self.pairs if p.number not in done), None)

    def result(self, seed: int = 0, resamples: int = 1000) -> dict[str, Any]:
        """{"format", "votes", "pairs", "models": [{"model", "strength", "ci95", "wins"}]}, the best
        first; strengths as in `strengths`, intervals over resampled votes."""
        names = sorted({m for p in self.pairs for m in p.models})
        index = {name: i for i, name in enumerate(names)}
        votes = []
        for number, side in self.votes().items():
            left, right = (index[m] for m in self.pairs[number].models)
            share = {"left": 1.0, "right": 0.0, "tie": 0.5}[side]
            votes.append((left, right, share))
        table = np.array(votes or np.zeros((0, 3)), float)
        found = strengths(_wins(table, len(names)))
        rng, drawn = np.random.default_rng(seed), []
        for _ in range(resamples if len(table) > 1 else 0):
            some = table[rng.integers(0, len(table), len(table))]
            drawn.append(strengths(_wins(some, len(names))))
        bands = np.quantile(drawn, [0.025, 0.975], axis=0).T.tolist() if drawn else None
        wins = _wins(table, len(names)).sum(axis=1)
        models = [
            {"model": names[i], "strength": float(found[i]),
             "ci95": None if bands is None else bands[i], "wins": float(wins[i])}
            for i in np.argsort(-found, kind="stable").tolist()
        ]  # fmt: skip
        return {"format": FORMAT, "votes": len(votes), "pairs": len(self.pairs), "models": models}


def _wins(table: np.ndarray, n: int) -> np.ndarray:
    """float64 [n, n]: how often the row's model was held better than the column's; a tie: half."""
    wins = np.zeros((n, n))
    left, right = table[:, 0].astype(int), table[:, 1].astype(int)
    np.add.at(wins, (left, right), table[:, 2])
    np.add.at(wins, (right, left), 1.0 - table[:, 2])
    return wins


def strengths(wins: np.ndarray, sweeps: int = 10_000) -> np.ndarray:
    """Bradley–Terry strengths, in natural logarithms, with mean 0: P(i beats j) = σ(s_i - s_j).

    By minorisation–maximisation (Hunter 2004, eq. 30) after `PRIOR` more wins for each of a pair
    that was compared.
    """
    games = wins + wins.T
    won = wins + PRIOR * (games > 0)
    games = won + won.T
    p = np.ones(len(wins))
    for _ in range(sweeps):
        new = won.sum(axis=1) / np.maximum((games / (p[:, None] + p[None, :])).sum(axis=1), 1e-300)
        new = np.where(games.sum(axis=1) > 0, new, 1.0)
        new /= np.exp(np.log(new).mean())
        if np.abs(np.log(new / p)).max() < 1e-12:
            return np.log(new)
        p = new
    return np.log(p)
