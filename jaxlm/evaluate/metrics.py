"""Metrics, each as statistics per item (`intervals.Scored`).

BLEU and chrF are sacrebleu's, ROUGE is rouge-score's; what is ours is accuracy, F1, calibration and
the SQuAD scores. Words of scripts without spaces (Japanese, Thai, …) are their single letters.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxlm.data.extras import library
from jaxlm.data.units import SPACELESS, units
from jaxlm.evaluate.intervals import Scored, mean_of

CALIBRATION_BINS = 15
Labels = Sequence[int] | np.ndarray

# ----------------------------------------------------------------------------------- classification


def accuracy(predicted: Labels, answers: Labels) -> Scored:
    return mean_of(np.asarray(predicted) == np.asarray(answers))


def confusion(predicted: Labels, answers: Labels, classes: int) -> np.ndarray:
    """int64 [classes, classes]: rows are the right class, columns what was said."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (np.asarray(answers), np.asarray(predicted)), 1)
    return counts


def macro_f1(predicted: Labels, answers: Labels, classes: int) -> Scored:
    """The mean of the classes' F1; a class that is neither right nor said anywhere counts 0."""
    cell = np.asarray(answers) * classes + np.asarray(predicted)
    one_hot = np.zeros((len(cell), classes * classes))
    one_hot[np.arange(len(cell)), cell] = 1.0
    return Scored(one_hot, lambda s: float(class_f1(s.reshape(classes, classes)).mean()))


def class_f1(confusion_cc: np.ndarray) -> np.ndarray:
    """F1 of each class of a confusion matrix: 2 tp / (2 tp + fp + fn)."""
    right = np.diag(confusion_cc)
    either = confusion_cc.sum(axis=0) + confusion_cc.sum(axis=1)
    return np.divide(2.0 * right, either, out=np.zeros(len(right)), where=either > 0)


def calibration_error(share_nc: np.ndarray, answers: Labels) -> Scored:
    """Expected calibration error (Guo et al. 2017, eq. 3) of the likeliest class: over 15 equal
    bins of confidence, the gap between mean confidence and accuracy, weighted by items."""
    said, confidence = share_nc.argmax(axis=1), share_nc.max(axis=1)
    right = said == np.asarray(answers)
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, None)
    rows = np.zeros((len(said), 2, CALIBRATION_BINS))
    rows[np.arange(len(said)), 0, bins] = confidence - right
    rows[np.arange(len(said)), 1, bins] = 1.0

    def error(s: np.ndarray) -> float:
        gaps, counts = s.reshape(2, CALIBRATION_BINS)
        return float(np.abs(gaps).sum() / counts.sum())

    return Scored(rows.reshape(len(said), -1), error)


# -------------------------------------------------------------------------------------- likelihood


def perplexity(nats: Sequence[float], tokens: Sequence[int]) -> Scored:
    """Per token; an item is a text."""
    rows = np.stack([np.asarray(nats, float), np.asarray(tokens, float)], axis=1)
    return Scored(rows, lambda s: math.exp(min(s[0] / s[1], 700.0)))


def bits_per_byte(nats: Sequence[float], n_bytes: Sequence[int]) -> Scored:
    rows = np.stack([np.asarray(nats, float), np.asarray(n_bytes, float)], axis=1)
    return Scored(rows, lambda s: s[0] / math.log(2) / s[1])


# --------------------------------------------------------------------------------- short answers

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


_WIDE = re.compile("[\u3000-\u303f\uff00-\uffef]")  # signs and full-width forms


def plainly(*texts: str) -> list[list[str]]:
    """The words of answers that are compared, as SQuAD has it (Rajpurkar et al. 2016, §5): lower
    case, without punctuation and articles. Where one of them is in a script without spaces, width
    and that script's punctuation do not count either, and its letters are words (as JSQuAD's)."""
    spaceless = any(SPACELESS.search(t) or _WIDE.search(t) for t in texts)
    return [_words(text, spaceless) for text in texts]


def _words(text: str, spaceless: bool) -> list[str]:
    if spaceless:
        text = unicodedata.normalize("NFKC", text)
        text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
    text = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return SPACELESS.sub(r" \g<0> ", text).split()


def exact_match(said: str, references: Sequence[str]) -> float:
    first, *others = plainly(said, *references)
    return float(first in others)


def word_f1(said: str, references: Sequence[str]) -> float:
    """The best F1 over the references of the words that they share with what was said."""
    first, *others = plainly(said, *references)
    return max(_f1(first, other) for other in others)


def _f1(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    shared = (Counter(said) & Counter(right)).total()
    return 2.0 * shared / (len(said) + len(right))


# ------------------------------------------------------------------------------------ longer texts


def sacrebleu(name: str, said: Sequence[str], references: Sequence[Sequence[str]]) -> Scored:
    """`name`: 'bleu' (13a), 'bleu-char', 'bleu-ja-mecab', … or 'chrf', 'chrf++'."""
    kind, _, tokenize = name.partition("-")
    library("sacrebleu", "eval")
    metrics = library("sacrebleu.metrics", "eval")
    if kind == "bleu":
        metric = metrics.BLEU(tokenize=tokenize or "13a")
    else:
        metric = metrics.CHRF(word_order=2 if kind == "chrf++" else 0)
    most = max(map(len, references))
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    rows = metric._extract_corpus_statistics(list(said), streams)
    whole = metric._aggregate_and_compute
    return Scored(np.array(rows, float), lambda s: whole([_counts(s, kind)]).score)


def _counts(sums: np.ndarray, kind: str) -> list[Any]:
    return [round(x) for x in sums.tolist()] if kind == "bleu" else sums.tolist()


class _Words:
    """What rouge-score cuts a text into: its own words, or `units` where its own would be none."""

    def __init__(self) -> None:
        tokenizers = library("rouge_score.tokenizers", "eval")
        self.plain = tokenizers.DefaultTokenizer(use_stemmer=False)

    def tokenize(self, text: str) -> list[str]:
        return units(text) if SPACELESS.search(text) else self.plain.tokenize(text)


def rouge(name: str, said: Sequence[str], references: Sequence[Sequence[str]]) -> Scored:
    """F-measure of 'rouge1', 'rouge2' or 'rougeL' with the best reference (Lin 2004), 0 … 1."""
    scorer = library("rouge_score.rouge_scorer", "eval").RougeScorer([name], tokenizer=_Words())
    pairs = zip(said, references, strict=True)
    return mean_of([scorer.score_multi(list(r), s)[name].fmeasure for s, r in pairs])


Written = Callable[[Sequence[str], Sequence[Sequence[str]]], Scored]


def written(name: str) -> Written | None:
    """The metric of that name for texts against references; None where there is none."""
    each = {"exact_match": exact_match, "f1": word_f1}.get(name)
    if each is not None:
        return lambda said, refs: mean_of([each(s, r) for s, r in zip(said, refs, strict=True)])
    if name in ("chrf", "chrf++", "bleu") or name.startswith("bleu-"):
        return lambda said, refs: sacrebleu(name, said, refs)
    if name in ("rouge1", "rouge2", "rougeL"):
        return lambda said, refs: rouge(name, said, refs)
    return None
