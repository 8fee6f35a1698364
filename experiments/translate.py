"""English to Japanese, from the pages of a help system in both languages: a ladder of three sizes.

Data:     apt-get download libreoffice-help-en-us libreoffice-help-ja  (MPL-2.0), each unpacked by
          dpkg-deb -x; LIBREOFFICE_HELP names …/usr/share/libreoffice/help. Paragraphs and headings
          with the same id in the same page are a pair; those of at most 80 letters are taken, and
          a tenth of the sources is held out by hash.
Command:  jaxlm finetune --config=experiments/translate.py --workdir=runs/translate \
              --config.model.d_model=32     # then 64, 128
          jaxlm evaluate --workdir=runs/translate --task=experiments/translate.py=$LIBREOFFICE_HELP
          python experiments/translate.py $LIBREOFFICE_HELP    # copying, and the nearest neighbour
Result:   chrF 11.7 (95 %: 10.6 … 13.1) at d_model 32 in 2½ minutes of one shared core; the source
          itself 8.3, the nearest neighbour 41.3: it takes more. Wider ones were not run.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from jaxlm.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, TuneConfig
from jaxlm.data.examples import is_held_out
from jaxlm.tasks.task import Item, Task

HELP = os.environ.get("LIBREOFFICE_HELP", "usr/share/libreoffice/help")
HELD_OUT = 0.1
LETTERS = 80
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


def every(folder: str = HELP) -> Iterator[dict[str, str]]:
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
                yield {"source": f"{text}\n", "target": said}


def get_task() -> Task:
    """400 held-out sources, each with all its translations."""

    def items(folder: str) -> Iterator[Item]:
        found: dict[str, list[str]] = {}
        for pair in every(folder):
            if is_held_out(pair["source"], HELD_OUT):
                found.setdefault(pair["source"], []).append(pair["target"])
        for source in sorted(found, key=hash_of)[:400]:
            yield Item(source, references=tuple(found[source]))

    return Task("en-ja", "write", items, ("chrf", "bleu-char"), max_new_tokens=48)


def hash_of(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def get_config() -> Config:
    return Config(
        name="translate",
        model=ModelConfig(
            architecture="encoder_decoder", d_model=128, n_layers=2, n_heads=4, vocab_size=4096,
            seq_len=64, target_len=64, dropout=0.2, activation="swiglu", scan_layers=False,
        ),
        data=DataConfig(tokenizer="bpe", eval_fraction=HELD_OUT, eval_sequences=512, max_epochs=40),
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, schedule="linear"),
        train=TrainConfig(steps=600, global_batch_size=32, objective="pairs", log_every=50,
                          eval_every=300, checkpoint_every=50),
        tune=TuneConfig(examples=("translate.py:every",), input="source", target="target"),
    )  # fmt: skip


def baselines(folder: str) -> None:
    """The source itself, and the translation of the training source with the most letters' n-grams
    in common."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    from jaxlm.evaluate import intervals, metrics

    task = get_task()
    items = list(task.items(folder))
    training = [p for p in every(folder) if not is_held_out(p["source"], HELD_OUT)]
    words = TfidfVectorizer(analyzer="char", ngram_range=(2, 5))
    known = words.fit_transform([p["source"] for p in training])
    nearest = (words.transform([i.prompt for i in items]) @ known.T).toarray().argmax(axis=1)
    said = {
        "copy": [i.prompt.strip() for i in items],
        "nearest neighbour": [training[k]["target"] for k in nearest],
    }
    for name, texts in said.items():
        for metric in task.metrics:
            scored = metrics.sacrebleu(metric, texts, [i.references for i in items])
            print(json.dumps({"baseline": name, "metric": metric, "value": scored.value,
                              "ci95": intervals.interval(scored), "n": scored.n}))  # fmt: skip


if __name__ == "__main__":
    baselines(*sys.argv[1:])
