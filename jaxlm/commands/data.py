"""`jaxlm data build|report|inspect|tokenizer`: from sources to shards, and what is in them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from absl import flags

from jaxlm.commands.common import Command
from jaxlm.config import Config, DataConfig, Sweep
from jaxlm.schema import UserError, hint, override

SAMPLE_TEXTS = 200  # of each language, for a comparison of tokenizers


def _flags_data(values: flags.FlagValues) -> None:
    flags.DEFINE_string("source", "", "", flag_values=values)
    flags.DEFINE_string("other", "", "", flag_values=values)
    flags.DEFINE_string("config", "", "an experiment file", flag_values=values)
    flags.DEFINE_string("workdir", "", "folder of the shards", flag_values=values)
    flags.DEFINE_multi_string(
        "sources", [], "folder, file, glob or URL; may be given again", flag_values=values
    )
    flags.DEFINE_multi_string(
        "tokenizer", [], "as data.tokenizer; tokenizer compares several", flag_values=values
    )
    flags.DEFINE_integer("vocab-size", 0, "token ids; 0: as the config", flag_values=values)
    flags.DEFINE_bool("clean", False, "all steps of cleaning", flag_values=values)
    flags.DEFINE_bool("append", False, "add the further sources", flag_values=values)
    flags.DEFINE_string("split", "train", "inspect: train or eval", flag_values=values)
    flags.DEFINE_integer("first", 0, "inspect: number of the document", flag_values=values)
    flags.DEFINE_integer("count", 3, "inspect: documents", flag_values=values)
    flags.DEFINE_bool("json", False, "speak to machines", flag_values=values)


def _data(values: dict[str, Any], overrides: list[tuple[str, str]]) -> int:
    actions = {"build": _build, "report": _report, "inspect": _inspect, "tokenizer": _tokenizer}
    action = values["source"]
    if action not in actions:
        raise UserError(f"jaxlm data: no such action: {action!r}; {hint(action, actions)}")
    return actions[action](values, overrides)


def _config(values: dict[str, Any], overrides: list[tuple[str, str]]) -> Config:
    from jaxlm.experiment import load

    config = load(values["config"]) if values["config"] else Config()
    config = config.base if isinstance(config, Sweep) else config
    found = config.data
    if values["sources"]:
        found = replace(found, sources=tuple(values["sources"]))
    if values["tokenizer"]:
        found = replace(found, tokenizer=values["tokenizer"][0])
    if values["clean"]:
        every = replace(
            found.clean,
            repair=True,
            language_id=True,
            quality=True,
            mask=True,
            near_duplicates=True,
        )
        found = replace(found, clean=every)
    size = values["vocab-size"] or config.model.vocab_size
    config = replace(config, data=found, model=replace(config.model, vocab_size=size))
    for dotted, text in overrides:
        config = override(config, dotted, text)
    return config


def _folder(values: dict[str, Any]) -> Path:
    folder = values["other"] or values["workdir"]
    if not folder:
        raise UserError(f"jaxlm data {values['source']}: expected a folder of shards")
    return Path(folder)


def _build(values: dict[str, Any], overrides: list[tuple[str, str]]) -> int:
    from jaxlm import show
    from jaxlm.data import card, shards
    from jaxlm.report.data_report import write_data_report

    config, out, lines = _config(values, overrides), _folder(values), show.Lines(values["json"])
    shards.build(config.data, config.model.vocab_size, out, lines.data, append=values["append"])
    card.write(out)
    page = write_data_report(out)
    if values["json"]:
        print(json.dumps(card.summary(out), ensure_ascii=False))
    else:
        _say(lines, card.summary(out))
        lines.say(f"report: {page}")
    return 0


def _say(lines: Any, found: dict[str, Any]) -> None:
    lines.say(
        f"{found['documents']:,} documents, {found['bytes'] / 1e6:,.1f} MB, "
        f"{found['tokens']:,} tokens; {sum(found['dropped'].values()):,} records left out"
    )
    for name in ("licences", "languages"):
        pairs = [f"{k} {v / found['bytes']:.0%}" for k, v in list(found[name].items())[:6]]
        lines.say(f"{name}: {', '.join(pairs)}")


def _report(values: dict[str, Any], overrides: list[tuple[str, str]]) -> int:
    from jaxlm.data import card
    from jaxlm.report.data_report import write_data_report

    out = _folder(values)
    page = write_data_report(out)
    print(json.dumps(card.summary(out), ensure_ascii=False) if values["json"] else page)
    return 0


def _inspect(values: dict[str, Any], overrides: list[tuple[str, str]]) -> int:
    from jaxlm.data import inspect

    split = values["split"]
    if split not in ("train", "eval"):
        raise UserError(f"--split: expected train or eval, got {split!r}")
    found = inspect.documents(_folder(values), split, values["first"], values["count"])
    for row in found:
        if values["json"]:
            print(json.dumps(row, ensure_ascii=False))
            continue
        about = {k: v for k, v in row.items() if k != "text" and v}
        print(" · ".join(f"{k} {v}" for k, v in about.items()))
        print(row["text"], "\n")
    return 0


def _tokenizer(values: dict[str, Any], overrides: list[tuple[str, str]]) -> int:
    from jaxlm import show
    from jaxlm.data import documents, inspect, tokenizer
    from jaxlm.data.documents import Reading

    config = _config({**values, "tokenizer": []}, overrides)
    d: DataConfig = config.data
    reading = Reading(d.licence, d.text_field, d.file_urls)
    texts: dict[str, list[str]] = {}
    sample: list[str] = []
    size = 0
    for document in documents.read(d.sources, reading=reading):
        some = texts.setdefault(document.language or "unknown", [])
        if len(some) < SAMPLE_TEXTS:
            some.append(document.text)
        if size < d.tokenizer_bytes:
            sample.append(document.text)
            size += len(document.text.encode())
    names = values["tokenizer"] or ["bytes", "bpe", "chars", "wordpiece"]
    vocab = values["vocab-size"] or max(4096, config.model.vocab_size)
    made = {}
    for name in names:
        limit = vocab if name in tokenizer.TRAINED else 1 << 31
        made[name] = tokenizer.create(name, limit, sample)
    rows = inspect.compare(made, texts)
    if values["json"]:
        print(json.dumps(rows, ensure_ascii=False))
    else:
        show.Lines().tokenizers(rows)
    return 0


VERBS = {"data": Command(_data, _flags_data, "build, report, inspect, tokenizer: text to shards")}
