"""A fine-tuning job: examples, the weights to begin with, and the loop, in one run's folder.

The step, the loop, checkpoints and records are those of every run; what is different is where a
batch comes from and what the parameters are before the first step.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm import job, loading, mesh
from jaxlm.config import Config, ModelConfig, validate
from jaxlm.data import chat, examples, loader, tokenizer
from jaxlm.data.examples import Examples, Labelled
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.evaluate import supervised
from jaxlm.files import write_json
from jaxlm.language_model import LanguageModel
from jaxlm.schema import UserError
from jaxlm.train import loop, parameters, workdir
from jaxlm.train.checkpoint import by_path
from jaxlm.train.digest import describe
from jaxlm.train.record import RunRecord
from jaxlm.train.run import Run
from jaxlm.train.trackers import Trackers

OBJECTIVES = ("classify", "regress", "next_token", "pairs")


@dataclass(frozen=True)
class Material:
    """All that a fine-tuning run is made from."""

    config: Config  # with the model that is trained
    words: Tokenizer
    training: Examples
    held_out: Examples
    labels: tuple[str, ...]
    fingerprint: str  # of the examples
    start: LanguageModel | None


def material(config: Config) -> Material:
    """Reads the examples and the weights to begin with. Raises UserError."""
    t, name = config.tune, config.train.objective
    if not t.examples:
        raise UserError("config.tune.examples: expected files of records")
    if name not in OBJECTIVES:
        raise UserError(
            f"config.train.objective: {name!r} is not learnt from examples;"
            f" expected one of {', '.join(OBJECTIVES)}"
        )
    found = examples.read(t.examples, t.input, t.target)
    training, held_out = examples.split(found, config.data.eval_fraction)
    labels = examples.classes(training, held_out) if name == "classify" else ()
    if t.lora.rank and not t.start:
        raise UserError("config.tune.lora.rank: adapters need weights to begin with (tune.start)")
    start = loading.of_any(t.start) if t.start else None
    if start is None:
        texts = (e.input for e in training)
        words = tokenizer.create(config.data.tokenizer, config.text_ids, texts)
        model = config.model
    else:
        words, model = start.tokenizer, start.config
    outputs = {"classify": len(labels), "regress": 1}.get(name, 0)
    model = _tuned(config, model, outputs)
    config = validate(replace(config, model=model))
    sides = (_encoded(config, words, start, some, labels) for some in (training, held_out))
    mine, theirs = sides
    return Material(config, words, mine, theirs, labels, examples.fingerprint(found), start)


def _tuned(config: Config, model: ModelConfig, outputs: int) -> ModelConfig:
    """The model with its classifier, and what `tune` says in place of its own."""
    t = config.tune
    said = {
        "pooling": t.pooling or None,
        "dropout": t.dropout,
        "seq_len": t.max_tokens and min(t.max_tokens, model.seq_len),
    }
    changes: dict[str, Any] = {k: v for k, v in said.items() if v is not None}
    if outputs:
        changes |= {"n_classes": outputs, "mlm_head": False}
    return replace(model, **changes)


def _encoded(
    config: Config,
    words: Tokenizer,
    start: LanguageModel | None,
    some: list[Labelled],
    labels: tuple[str, ...],
) -> Examples:
    t, name = config.model.seq_len, config.train.objective
    if name == "next_token":
        template = None if start is None else start.chat
        return examples.of_answers([_answer(words, template, e) for e in some], t)
    if name == "pairs":
        encode = words.encode_batch
        end = np.array([words.eos_id], np.int32)
        said = [np.concatenate([t, end]) for t in encode([e.target for e in some])]
        sources = encode([e.input for e in some])
        return examples.of_pairs(sources, said, t, config.model.decoder_len)
    reader = LanguageModel(words, config.model, {}, None, bos_id=start and start.bos_id)  # type: ignore[arg-type]
    ids = reader.read([e.input for e in some], t)
    if name == "regress":
        return examples.of_numbers(ids, some, t)
    return examples.of_classes(ids, some, labels, t)


def _answer(
    words: Tokenizer, template: chat.ChatTemplate | None, example: Labelled
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and which of them are to be said: the assistant's turns of a conversation, or a
    target text and its end after its input."""
    if isinstance(example.target, list):
        if template is None:
            raise UserError("config.tune.start: has no chat template, which messages need")
        return chat.conversation(words, template, example.target)
    before, after = words.encode(example.input), words.encode(example.target)
    ids = np.concatenate([before, after, np.array([words.eos_id], np.int32)])
    return ids, np.arange(len(ids)) >= len(before)


# ----------------------------------------------------------------------------------------- training


def tune(
    made: Material,
    folder: Path,
    stop: Any = False,
    progress: loop.Progress = lambda run, row: None,
) -> RunRecord:
    """Trains to the end, from wherever it is; returns the run's record. Raises what `loop.fit`
    raises, and UserError for a folder that holds another run or another process."""
    job.cache_compilations()
    config = made.config
    sequences = config.train.steps * config.train.global_batch_size
    loader.check_epochs(made.training, sequences, config.data.max_epochs)
    with contextlib.ExitStack() as held:
        held.enter_context(workdir.lock(folder))
        held.enter_context(jax.set_mesh(mesh.make(config)))
        given = _given(made)
        run = Run(config, folder, _identity(made, given))
        run.claim()
        found = run.record()
        if found is not None:
            return found
        made.words.save(folder / "tokenizer")
        write_json(folder / "labels.json", {"format": "jaxlm.labels/1", "labels": made.labels})
        trackers = held.enter_context(Trackers(config, folder))

        def send(run: Run, row: dict[str, Any]) -> None:
            trackers.row(row)
            progress(run, row)

        watch = [supervised.heldout(made.held_out, config.data.eval_sequences)]
        with contextlib.suppress(loop.Diverged):  # its record says so
            loop.fit([run], made.training, watch, stop, send, given=given)
        row = run.record()
        assert row is not None
        return row


def _given(made: Material) -> loop.Given:
    """The parameters to begin with; with adapters, those that stay."""
    if made.start is None:
        return loop.NOTHING
    params = loading.begun(made.config, made.start, made.labels)
    if made.config.tune.lora.rank:
        return loop.Given(None, parameters.frozen(made.config, params))
    return loop.Given(params)


def _identity(made: Material, given: loop.Given) -> str:
    """Of the examples and of the weights to begin with."""
    if made.start is None:
        return made.fingerprint
    arrays = {k: np.asarray(v) for k, v in by_path(given._asdict()).items()}
    parts = "".join(entry["digest"] for entry in describe(arrays).values())
    return examples.fingerprint([Labelled(made.fingerprint, parts)])
