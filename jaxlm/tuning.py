"""A fine-tuning job: examples, the weights to begin with, and the loop, in one run's folder.

The step, the loop, checkpoints and records are those of every run; what is different is where a
batch comes from and what the parameters are before the first step.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm import job, loading, mesh
from jaxlm.config import Config, ModelConfig, validate
from jaxlm.data import chat, examples, loader, tokenizer
from jaxlm.data.examples import Examples, Labelled
from jaxlm.data.units import is_spaceless
from jaxlm.evaluate import supervised, teachers
from jaxlm.files import write_json
from jaxlm.language_model import LanguageModel
from jaxlm.schema import UserError
from jaxlm.train import loop, parameters, workdir
from jaxlm.train.checkpoint import by_path
from jaxlm.train.digest import describe
from jaxlm.train.record import RunRecord
from jaxlm.train.run import Run
from jaxlm.train.trackers import Trackers

OBJECTIVES = ("classify", "regress", "next_token", "pairs", "preference", "distill")


@dataclass(frozen=True)
class Material:
    """All that a fine-tuning run is made from."""

    config: Config  # with the model that is trained
    reads: LanguageModel  # without params: how texts and conversations are read
    training: Examples
    held_out: Examples
    labels: tuple[str, ...]
    fingerprint: str  # of the examples, and of what a teacher makes of them
    start: LanguageModel | None


def material(config: Config) -> Material:
    """Reads the examples and the weights to begin with. Raises UserError."""
    t, name = config.tune, config.train.objective
    _check(config)
    found = read(config)
    training, held_out = examples.split(found, config.data.eval_fraction)
    labels = examples.classes(training, held_out) if name == "classify" else ()
    start = loading.of_any(t.start) if t.start else None
    teacher = start if name == "preference" else None
    teacher = loading.of_any(t.teacher) if name == "distill" else teacher
    source = start or teacher
    if source is None:
        texts = (t for e in training for t in (e.input, e.target) if isinstance(t, str))
        words = tokenizer.create(config.data.tokenizer, config.text_ids, texts)
    else:
        words = source.tokenizer
    if teacher is not None and teacher.tokenizer.fingerprint != words.fingerprint:
        raise UserError("config.tune.teacher: its tokenizer is not that of config.tune.start")
    model = _tuned(config, start.config if start else config.model, len(labels))
    config = validate(replace(config, model=model))
    reads = LanguageModel(words, model, {}, mesh.make(config))
    if source is not None:
        reads = replace(reads, bos_id=source.bos_id, chat=source.chat)
    mine, theirs = (_encoded(config, reads, some, labels) for some in (training, held_out))
    if teacher is not None:
        mine, theirs = _taught(config, teacher, mine), _taught(config, teacher, theirs)
    mark = examples.fingerprint(found, mine.beside or ())
    return Material(config, reads, mine, theirs, labels, mark, start)


def read(config: Config) -> list[Labelled]:
    """All examples. Raises UserError."""
    t, name = config.tune, config.train.objective
    targets = {"preference": ("chosen", "rejected"), "distill": ()}.get(name, (t.target,))
    return examples.read(t.examples, t.input, targets)


def _check(config: Config) -> None:
    t, name = config.tune, config.train.objective
    if not t.examples:
        raise UserError("config.tune.examples: expected files of records")
    if name not in OBJECTIVES:
        raise UserError(
            f"config.train.objective: {name!r} is not learnt from examples;"
            f" expected one of {', '.join(OBJECTIVES)}"
        )
    if t.lora.rank and not t.start:
        raise UserError("config.tune.lora.rank: adapters need weights to begin with (tune.start)")
    if name == "preference" and not t.start:
        raise UserError("config.tune.start: 'preference' asks what the model to begin with prefers")
    if name == "distill" and not t.teacher:
        raise UserError("config.tune.teacher: expected the model to learn from")


def _tuned(config: Config, model: ModelConfig, classes: int) -> ModelConfig:
    """The model with its classifier, and what `tune` says in place of its own."""
    t = config.tune
    said = {
        "pooling": t.pooling or None,
        "dropout": t.dropout,
        "seq_len": t.max_tokens and min(t.max_tokens, model.seq_len),
    }
    changes: dict[str, Any] = {k: v for k, v in said.items() if v is not None}
    if config.train.objective in ("classify", "regress"):
        changes |= {"n_classes": classes or 1, "mlm_head": False}
    return replace(model, **changes)


# ----------------------------------------------------------------------------------------- examples


def _encoded(
    config: Config, reads: LanguageModel, some: list[Labelled], labels: tuple[str, ...]
) -> Examples:
    """The examples as the objective wants them."""
    t, name = config.model.seq_len, config.train.objective
    encode, end = reads.tokenizer.encode_batch, np.array([reads.tokenizer.eos_id], np.int32)
    inputs = [e.input for e in some]
    if name == "next_token":
        return examples.of_answers([_answer(reads, e) for e in some], t)
    if name == "pairs":
        said = [np.concatenate([ids, end]) for ids in encode([e.target for e in some])]
        sources = [reads.tokenizer.encode_with_special(text, t) for text in inputs]
        return examples.of_pairs(sources, said, t, config.model.decoder_len)
    if name == "preference":
        each = (Labelled(e.input, target) for e in some for target in e.target)
        return examples.of_preferences([_answer(reads, e) for e in each], t)
    if name == "distill":
        pieces = [p for ids in encode(inputs) for p in reads.pieces(np.concatenate([ids, end]))]
        return examples.of_answers([(p, np.ones(len(p), bool)) for p in pieces], t)
    if any(isinstance(e.target, tuple) for e in some):
        if name != "classify" or config.model.pooling != "each":
            raise UserError("config.tune.pooling: words and their classes need 'each' (classify)")
        return examples.of_tags([_by_word(reads, e) for e in some], some, labels, t)
    ids = reads.read(inputs, t)
    if name == "regress":
        return examples.of_numbers(ids, some, t)
    return examples.of_classes(ids, some, labels, t)


def _answer(reads: LanguageModel, example: Labelled) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and which of them are to be said: the assistant's turns of a conversation, or a
    target text and its end after its input."""
    words = reads.tokenizer
    if isinstance(example.target, list):
        if reads.chat is None:
            raise UserError("config.tune.start: has no chat template, which messages need")
        return chat.conversation(words, reads.chat, example.target)
    before, after = words.encode(example.input), words.encode(example.target)
    before = before if reads.bos_id is None else np.concatenate([[reads.bos_id], before])
    ids = np.concatenate([before, after, [words.eos_id]]).astype(np.int32)
    return ids, np.arange(len(ids)) >= len(before)


def _by_word(reads: LanguageModel, example: Labelled) -> list[np.ndarray]:
    """What stands before a text, each word's tokens, and what stands after it."""
    words = [word for word, _ in example.target]
    spaced = [w if i == 0 or is_spaceless(w) else f" {w}" for i, w in enumerate(words)]
    around = reads.read([""], None)[0]
    return [around[:1], *reads.tokenizer.encode_batch(spaced), around[1:]]


def _taught(config: Config, teacher: LanguageModel, some: Examples) -> Examples:
    """`some` with what a teacher, or the model to begin with, makes of it."""
    with jax.set_mesh(teacher.mesh):
        given = teacher.config, teacher.params, some
        if config.train.objective == "distill":
            return replace(some, beside=teachers.likeliest(*given, config.tune.teacher_tokens))
        own = teachers.log_p(*given)
    assert some.beside is not None
    pairs = zip(own, some.beside, strict=True)
    return replace(some, beside=[np.concatenate([a, b[:, 1:]], axis=1) for a, b in pairs])


# ----------------------------------------------------------------------------------------- training


def tune(
    made: Material,
    folder: Path,
    stop: Any = False,
    progress: loop.Progress = lambda run, row: None,
    watch: Sequence[loop.Observer] = (),
) -> RunRecord:
    """Trains to the end, from wherever it is, watched by these observers, too; returns the run's
    record. Raises what `loop.fit` raises, and UserError for a folder that holds another run or
    another process."""
    job.cache_compilations()
    config = made.config
    sequences = config.train.steps * config.train.global_batch_size
    loader.check_epochs(made.training, sequences, config.data.max_epochs)
    with contextlib.ExitStack() as held:
        held.enter_context(workdir.lock(folder))
        held.enter_context(jax.set_mesh(mesh.make(config)))
        begin = job.Begin(loop.NOTHING, "fresh")
        if made.start is not None:
            begin = beginning(config, made.start, made.labels)
        run = Run(config, folder, f"{made.fingerprint}-{begin.mark}")
        run.claim()
        found = run.record()
        if found is not None:
            return found
        made.reads.tokenizer.save(folder / "tokenizer")
        write_json(folder / "labels.json", {"format": "jaxlm.labels/1", "labels": made.labels})
        loading.keep(folder, made.reads.bos_id, made.reads.chat)
        trackers = held.enter_context(Trackers(config, folder))

        def send(run: Run, row: dict[str, Any]) -> None:
            trackers.row(row)
            progress(run, row)

        observers = [supervised.heldout(made.held_out, config.data.eval_sequences), *watch]
        with contextlib.suppress(loop.Diverged):  # its record says so
            loop.fit([run], made.training, observers, stop, send, given=begin.given)
        row = run.record()
        assert row is not None
        return row


def continued(config: Config) -> tuple[Config, LanguageModel]:
    """A run on text that begins with `tune.start`: its config, with that model's, and the model."""
    start = loading.of_any(config.tune.start)
    return validate(replace(config, model=_tuned(config, start.config, 0))), start


def beginning(config: Config, start: LanguageModel, labels: tuple[str, ...] = ()) -> job.Begin:
    """The parameters of `start` to begin with (with adapters, those that stay), on the mesh that is
    set, and their digest."""
    params = loading.begun(config, start, labels)
    given = loop.Given(params)
    if config.tune.lora.rank:
        given = loop.Given(None, parameters.frozen(config, params))
    arrays = {k: np.asarray(v) for k, v in by_path(given._asdict()).items()}
    digests = "".join(entry["digest"] for entry in describe(arrays).values())
    return job.Begin(given, hashlib.sha256(digests.encode()).hexdigest()[:16])
