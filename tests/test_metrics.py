"""Metrics against the libraries that define them and against definitions written out, on 1,000
random cases each, Japanese among them; intervals and the paired test against simulation."""

from __future__ import annotations

import collections
import re
import string

import numpy as np
import pytest

from jaxlm.evaluate import intervals, metrics

CASES = 1000
FEW = 100  # in the fast suite, where a reference is slow
CASES_OF = [FEW, pytest.param(CASES, marks=pytest.mark.slow)]
ENGLISH = "the a an cat sat on mat, Dog's it's 3.14 U.S. naïve (run) well-known the. A"
JAPANESE = "猫 が 座っ た。 東京 は、 「首都」 です ＡＢＣ データ １２３ を 読む GPU ・ ！"


def texts(rng: np.random.Generator, japanese: bool, most: int = 8, fewest: int = 1) -> str:
    words = rng.choice((JAPANESE if japanese else ENGLISH).split(), rng.integers(fewest, most + 1))
    return ("" if japanese else " ").join(words)


def corpus(rng: np.random.Generator, japanese: bool) -> tuple[list[str], list[list[str]]]:
    """Hypotheses that share words with their one to three references."""
    said, references = [], []
    for _ in range(rng.integers(1, 5)):
        references.append([texts(rng, japanese) for _ in range(rng.integers(1, 4))])
        said.append(references[-1][0] if rng.random() < 0.3 else texts(rng, japanese))
    return said, references


# ------------------------------------------------------------------------------------- SQuAD scores


def squad_words(text: str, japanese: bool) -> list[str]:
    """Rajpurkar et al.'s normalisation, step by step; Japanese by characters, as JSQuAD is."""
    kept = []
    for c in text.lower():
        if c not in string.punctuation and not (japanese and c in "。、「」・！"):
            kept.append(c)
    words = re.sub(r"\b(a|an|the)\b", " ", "".join(kept)).split()
    if not japanese:
        return words
    wide = {chr(c + 0xFEE0): chr(c) for c in range(0x21, 0x7F)}
    out: list[str] = []
    for word in words:
        latin = ""
        for c in ("".join(wide.get(c, c) for c in word)).lower():
            if c in string.ascii_letters + string.digits:
                latin += c
                continue
            out += [latin] * bool(latin) + [c]
            latin = ""
        out += [latin] * bool(latin)
    return out


def squad_f1(said: list[str], right: list[str]) -> float:
    common = collections.Counter(said) & collections.Counter(right)
    same = sum(common.values())
    if not said or not right:
        return float(said == right)
    if not same:
        return 0.0
    precision, recall = same / len(said), same / len(right)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("japanese", [False, True])
def test_squad_scores_are_those_of_its_definition(japanese: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(CASES):
        said, references = texts(rng, japanese, 5), [texts(rng, japanese, 5) for _ in range(2)]
        if rng.random() < 0.3:
            said = references[1].upper() + ("。" if japanese else "!")
        cut = [squad_words(t, japanese) for t in (said, *references)]
        want = max(squad_f1(cut[0], c) for c in cut[1:])
        assert metrics.word_f1(said, references) == pytest.approx(want, abs=1e-12)
        assert metrics.exact_match(said, references) == float(cut[0] in cut[1:])


def test_japanese_answers_are_compared_by_letters_without_their_punctuation() -> None:
    assert metrics.exact_match("「東京」。", ["東京"]) == 1.0
    assert metrics.exact_match("ＧＰＵ", ["gpu"]) == 1.0
    assert metrics.word_f1("東京都", ["東京"]) == pytest.approx(0.8)


# ------------------------------------------------------------------------------------ BLEU and chrF


@pytest.mark.parametrize("cases", CASES_OF)
@pytest.mark.parametrize("name", ["bleu", "chrf", "chrf++", "bleu-char"])
@pytest.mark.parametrize("japanese", [False, True])
def test_bleu_and_chrf_are_sacrebleu_s(name: str, japanese: bool, cases: int) -> None:
    theirs = pytest.importorskip("sacrebleu.metrics")
    kind, _, tokenize = name.partition("-")
    rng = np.random.default_rng(2)
    for _ in range(cases):
        said, references = corpus(rng, japanese)
        metric = (
            theirs.BLEU(tokenize=tokenize or "13a")
            if kind == "bleu"
            else theirs.CHRF(word_order=2 if kind == "chrf++" else 0)
        )
        most = max(map(len, references))
        streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
        want = metric.corpus_score(said, streams).score
        assert metrics.sacrebleu(name, said, references).value == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("cases", CASES_OF)
def test_bleu_of_japanese_words_is_sacrebleu_s(cases: int) -> None:
    theirs = pytest.importorskip("sacrebleu.metrics")
    pytest.importorskip("MeCab")
    rng = np.random.default_rng(3)
    for _ in range(cases):
        said, references = corpus(rng, True)
        one = [r[:1] for r in references]
        want = theirs.BLEU(tokenize="ja-mecab").corpus_score(said, [[r[0] for r in one]]).score
        assert metrics.sacrebleu("bleu-ja-mecab", said, one).value == pytest.approx(want)


# ------------------------------------------------------------------------------------------- ROUGE


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_rouge_score_s(name: str) -> None:
    theirs = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer([name])
    rng = np.random.default_rng(4)
    said = [texts(rng, False) for _ in range(CASES)]
    references = [[texts(rng, False) for _ in range(rng.integers(1, 3))] for _ in said]
    each = [theirs.score_multi(r, s)[name].fmeasure for s, r in zip(said, references, strict=True)]
    assert metrics.rouge(name, said, references).value == pytest.approx(np.mean(each))


@pytest.mark.parametrize("cases", CASES_OF)
def test_rouge_of_japanese_is_that_of_its_letters_set_apart(cases: int) -> None:
    """rouge-score by itself finds no word in Japanese and gives 0. Here letters stand for words: as
    many Latin ones in their place, cut apart, give its own score."""
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge2", "rougeL"])
    rng = np.random.default_rng(5)
    letters = "猫が座った東京は首都です"
    latin = {c: f"w{i}" for i, c in enumerate(letters)}
    for _ in range(cases):
        a, b = ("".join(rng.choice(list(letters), rng.integers(1, 12))) for _ in range(2))
        spelled = [" ".join(latin[c] for c in t) for t in (b, a)]
        want = scorer.score(*spelled)
        for name in ("rouge2", "rougeL"):
            assert metrics.rouge(name, [a], [[b]]).value == pytest.approx(want[name].fmeasure)


# ----------------------------------------------------------------------------------- classification


@pytest.mark.parametrize("cases", CASES_OF)
def test_accuracy_f1_and_confusion_are_scikit_learn_s(cases: int) -> None:
    theirs = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(6)
    for _ in range(cases):
        classes, n = int(rng.integers(2, 6)), int(rng.integers(2, 30))
        answers, said = rng.integers(0, classes, n), rng.integers(0, classes, n)
        labels = list(range(classes))
        how = {"average": "macro", "labels": labels, "zero_division": 0}
        assert metrics.accuracy(said, answers).value == pytest.approx(
            theirs.accuracy_score(answers, said)
        )
        assert metrics.macro_f1(said, answers, classes).value == pytest.approx(
            theirs.f1_score(answers, said, **how)
        )
        want = theirs.confusion_matrix(answers, said, labels=labels)
        np.testing.assert_array_equal(metrics.confusion(said, answers, classes), want)


def test_calibration_error_is_its_definition() -> None:
    """Guo et al. 2017, eq. 3, written out; scikit-learn has the bins' means alone (below)."""
    rng = np.random.default_rng(7)
    for _ in range(CASES):
        n, classes = int(rng.integers(1, 40)), int(rng.integers(2, 4))
        shares = rng.dirichlet(np.ones(classes), n)
        answers = rng.integers(0, classes, n)
        bins: dict[int, list[tuple[float, bool]]] = collections.defaultdict(list)
        for share, answer in zip(shares, answers, strict=True):
            k = next(k for k in range(15) if share.max() <= (k + 1) / 15 + 1e-15)
            bins[k].append((share.max(), share.argmax() == answer))
        want = 0.0
        for members in bins.values():
            confidence, right = np.mean(members, axis=0)
            want += len(members) / n * abs(right - confidence)
        assert metrics.calibration_error(shares, answers).value == pytest.approx(want)


@pytest.mark.parametrize("cases", CASES_OF)
def test_calibration_error_is_that_of_scikit_learn_s_bins(cases: int) -> None:
    """`calibration_curve` gives each bin's mean confidence and share of right answers."""
    curve = pytest.importorskip("sklearn.calibration").calibration_curve
    rng = np.random.default_rng(11)
    for _ in range(cases):
        n, classes = int(rng.integers(1, 40)), int(rng.integers(2, 4))
        shares, answers = rng.dirichlet(np.ones(classes), n), rng.integers(0, classes, n)
        confidence, right = shares.max(axis=1), shares.argmax(axis=1) == answers
        share_right, mean = curve(right, confidence, n_bins=15, pos_label=True)
        sizes = np.bincount(np.minimum((confidence * 15).astype(int), 14), minlength=15)
        want = (sizes[sizes > 0] / n * np.abs(share_right - mean)).sum()
        assert metrics.calibration_error(shares, answers).value == pytest.approx(want)


# ---------------------------------------------------------------------------------------- intervals


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(8)
    covered = 0
    for trial in range(300):
        scored = intervals.mean_of(rng.random(150) < 0.8)
        low, high = intervals.interval(scored, trial, 300)
        covered += low <= 0.8 <= high
    assert 0.90 <= covered / 300 <= 0.99


def test_a_paired_test_finds_a_difference_and_no_more_than_its_level_where_there_is_none() -> None:
    rng = np.random.default_rng(9)
    false = 0
    for trial in range(200):
        easy = rng.random(80)
        a, b = (intervals.mean_of(rng.random(80) < easy) for _ in range(2))
        false += intervals.paired(a, b, trial, 2, 199)["p"] <= 0.05
    assert false / 200 <= 0.10
    easy = rng.random(400)
    a, b = (
        intervals.mean_of(rng.random(400) < easy),
        intervals.mean_of(rng.random(400) < easy + 0.2),
    )
    found = intervals.paired(a, b)
    assert found["p"] < 0.01 and found["ci95"][0] > 0
    assert found["difference"] == pytest.approx(b.value - a.value)


def test_a_score_of_sums_is_resampled_by_items() -> None:
    """Perplexity is no mean over texts: its interval is that of sums over resampled texts."""
    rng = np.random.default_rng(10)
    tokens = rng.integers(5, 200, 60)
    nats = tokens * rng.normal(2.0, 0.3, 60)
    low, high = intervals.interval(metrics.perplexity(nats, tokens), 0, 2000)
    whole = []
    for _ in range(2000):
        some = rng.integers(0, 60, 60)
        whole.append(np.exp(nats[some].sum() / tokens[some].sum()))
    want = np.quantile(whole, [0.025, 0.975])
    assert [low, high] == pytest.approx(want, rel=0.02)
