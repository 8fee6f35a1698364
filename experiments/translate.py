"""English to Japanese, from the pages of a help system in both languages: a ladder of three sizes.

Data:     apt-get download libreoffice-help-en-us libreoffice-help-ja  (MPL-2.0), each unpacked by
          dpkg-deb -x; LIBREOFFICE_HELP names …/usr/share/libreoffice/help. Paragraphs and headings
          with the same id in the same page are a pair; those of at most 200 letters are taken, and
          a tenth of the sources is held out by hash. A model reads the English and the translation
          of the most similar training source (Bulte & Tezcan 2019); needs jaxlm[eval].
Command:  jaxlm finetune --config=experiments/translate.py --workdir=runs/translate \
              --config.model.d_model=32     # then 64, 128
          jaxlm evaluate --workdir=runs/translate --task=experiments/translate.py=$LIBREOFFICE_HELP
          python experiments/translate.py $LIBREOFFICE_HELP    # copying, and the nearest neighbour
Cost:     about 5, 7 and 11 minutes of one core at d_model 32, 64 and 128
Result:   chrF 19.2, 28.7, 34.7; BLEU of characters 22.1, 33.2, 39.5. The English itself: 6.1, 4.5;
          the most similar source's translation: 35.1, 37.4, which the widest only draws level with
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from jaxlm.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, TuneConfig
from jaxlm.data.examples import is_held_out
from jaxlm.tasks.task import Item, Task

HELP = os.environ.get("LIBREOFFICE_HELP", "usr/share/libreoffice/help")
HELD_OUT = 0.1
LETTERS = 200  # of an English paragraph
ITEMS = 400
JAPANESE = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")


class Paragraphs(HTMLParser):
    """Texts of what has an id like par_id… or hd_id…."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.name = self.tag = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        name = dict(attrs).get("id") or ""
        if name.startswith(("par_id", "hd_id")):
            self.name, self.tag = name, tag
            self.texts[name] = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == self.tag:
            self.name = ""

    def handle_data(self, data: str) -> None:
        if self.name:
            self.texts[self.name] += data


def paragraphs(page: Path) -> dict[str, str]:
    parser = Paragraphs()
    parser.feed(page.read_text("utf-8"))
    return {name: " ".join(text.split()) for name, text in parser.texts.items()}


def every(folder: str) -> Iterator[dict[str, str]]:
    """{"source", "target"}: each pair once."""
    root, seen = Path(folder), set()
    for page in sorted((root / "en-US").rglob("*.html")):
        theirs = root / "ja" / page.relative_to(root / "en-US")
        if not theirs.exists():
            continue
        japanese = paragraphs(theirs)
        for name, text in paragraphs(page).items():
            said = japanese.get(name, "")
            if 2 <= len(text) <= LETTERS and JAPANESE.search(said) and (text, said) not in seen:
                seen.add((text, said))
                yield {"source": text, "target": said}


def nearest(sources: list[str], memory: list[dict[str, str]]) -> list[str]:
    """Of each source the translation of that other source in `memory` which has most of its
    letters' trigrams and tetragrams in common, rare ones first (tf-idf)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(analyzer="char", ngram_range=(3, 4), dtype=np.float32)
    known = vectors.fit_transform([pair["source"] for pair in memory]).T.tocsr()
    found = []
    for i in range(0, len(sources), 256):
        some = sources[i : i + 256]
        alike = (vectors.transform(some) @ known).toarray()
        for source, row in zip(some, alike, strict=True):
            order = np.argpartition(-row, 9)[:10]
            others = [k for k in order if memory[k]["source"] != source]
            found.append(memory[max(others or order, key=lambda k: row[k])]["target"])
    return found


def prompt(source: str, like: str) -> str:
    return f"{source}\n{like}\n"


def half(folder: str, held_out: bool) -> list[dict[str, str]]:
    """The training half, or the other: {"source", "target", "english", "like"}, where `source` is
    what a model reads: the English, and `like`, its nearest neighbour's translation."""
    sides: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for pair in every(folder):
        sides[is_held_out(pair["source"], HELD_OUT)].append(pair)
    found = nearest([pair["source"] for pair in sides[held_out]], sides[False])
    return [
        {"source": f"{pair['source']}\n{like}\n", "target": pair["target"],
         "english": pair["source"], "like": like}
        for pair, like in zip(sides[held_out], found, strict=True)
    ]  # fmt: skip


def pairs() -> Iterator[dict[str, str]]:
    yield from half(HELP, held_out=False)


def get_task() -> Task:
    """400 held-out sources, each with all its translations."""

    def items(folder: str) -> Iterator[Item]:
        found: dict[str, list[str]] = {}
        for pair in half(folder, held_out=True):
            found.setdefault(pair["source"], []).append(pair["target"])
        for source in sorted(found, key=hash_of)[:ITEMS]:
            yield Item(source, references=tuple(found[source]))

    return Task("en-ja", "write", items, ("chrf", "bleu-char"), max_new_tokens=96)


def hash_of(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def get_config() -> Config:
    return Config(
        name="translate",
        model=ModelConfig(
            architecture="encoder_decoder", d_model=128, n_layers=2, n_heads=4, vocab_size=4096,
            seq_len=192, target_len=128, dropout=0.1, activation="swiglu", scan_layers=False,
        ),
        data=DataConfig(tokenizer="bpe", eval_fraction=0.02, eval_sequences=256, max_epochs=40),
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, schedule="linear"),
        train=TrainConfig(steps=1500, global_batch_size=16, objective="pairs", log_every=50,
                          eval_every=250, checkpoint_every=250),
        tune=TuneConfig(examples=("translate.py:pairs",), input="source", target="target"),
    )  # fmt: skip


def baselines(folder: str) -> None:
    """The English itself, and the nearest neighbour's translation."""
    from jaxlm.evaluate import intervals, metrics

    task = get_task()
    items = list(task.items(folder))
    english, like, _ = zip(*(item.prompt.split("\n") for item in items), strict=True)
    for name, said in {"copy": english, "nearest neighbour": like}.items():
        for metric in task.metrics:
            scored = metrics.sacrebleu(metric, said, [i.references for i in items])
            print(json.dumps({"baseline": name, "metric": metric, "value": scored.value,
                              "ci95": intervals.interval(scored), "n": scored.n}))  # fmt: skip


if __name__ == "__main__":
    baselines(*sys.argv[1:])
