"""A model told to people who did not make it: what it is, its data, its scores and its limits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import Config, ModelConfig
from jaxlm.data.card import CARD
from jaxlm.data.record import UNSTATED
from jaxlm.model.scale import size
from jaxlm.schema import to_dict
from jaxlm.train.run import read_config

Json = dict[str, Any]


def text(source: str, model: ModelConfig, run: Path | None, scores: Sequence[Json]) -> str:
    """The card, in Markdown. `run`: the folder it comes from, if it is one of ours; `scores`: what
    `evaluate` returned."""
    config = None if run is None else read_config(run)
    parts = [
        _what(source, model, config),
        _data(config, run),
        _scores(scores),
        _limits(model, config, scores),
        _commands(source, config, scores),
    ]
    return "\n".join(line for part in parts for line in [*part, ""])


def _what(source: str, model: ModelConfig, config: Config | None) -> list[str]:
    counts = size(model)
    start = config.tune.start if config else ""
    made = f" It began with the weights of `{start}`." if start else ""
    return [
        f"# {config.name if config else Path(source).name}",
        "",
        f"A Transformer ({model.architecture}) of {counts.params:,} parameters"
        f" ({counts.params_non_embedding:,} without embeddings), {model.n_layers} layers of width"
        f" {model.d_model}, {model.vocab_size:,} token ids, a context of {model.seq_len:,} tokens."
        + made,
    ]


def _data(config: Config | None, run: Path | None) -> list[str]:
    lines = ["## Data", ""]
    if config is None or run is None:
        return [*lines, "What it was trained on is not known here: see where it came from."]
    if config.tune.examples:
        told = (
            f"Labelled examples: {', '.join(config.tune.examples)}"
            f" (licence: {config.data.licence or UNSTATED}); a share of"
            f" {config.data.eval_fraction:g} was held out by hash of the input."
        )
        return [*lines, told]
    card = run / CARD
    if not card.exists():
        return [*lines, f"Sources: {', '.join(config.data.sources)}."]
    said = card.read_text("utf-8").splitlines()[1:]
    return [*lines, *("#" + line if line.startswith("#") else line for line in said)]


def _scores(scores: Sequence[Json]) -> list[str]:
    lines = ["## Scores", ""]
    rows = [row for found in scores for row in found["rows"]]
    if not rows:
        return [*lines, "It was not evaluated."]
    lines += ["| task | metric | value | 95 % | n |", "|---|---|---|---|---|"]
    for row in rows:
        band = "–" if row["ci95"] is None else "{:.4g} … {:.4g}".format(*row["ci95"])
        lines.append(
            f"| {row['task']} | {row['metric']} | {row['value']:.4g} | {band} | {row['n']:,} |"
        )
    return [*lines, "", "Intervals are percentile bootstraps over items."]


def _limits(model: ModelConfig, config: Config | None, scores: Sequence[Json]) -> list[str]:
    lines = ["## Limits", "", f"- It reads at most {model.seq_len:,} tokens at once."]
    if config is not None and not config.tune.start:
        lines.append(f"- It saw {config.tokens:,} tokens and nothing else.")
    if not scores:
        lines.append("- Nothing is known of how good it is.")
    return [*lines, "- It was not examined for harmful, biased or remembered text."]


def _commands(source: str, config: Config | None, scores: Sequence[Json]) -> list[str]:
    lines = ["## Commands", "", "```"]
    if config is not None:
        verb = "finetune" if config.tune.examples else "train"
        lines.append(f"jaxlm {verb} --config=EXPERIMENT --workdir={source}   # the config is below")
    for found in scores:
        tasks = " ".join(f"--task={name}" for name in found["tasks"])
        lines.append(f"jaxlm evaluate --workdir={found['model']} {tasks}")
    lines += [f"jaxlm export --workdir={source} --out=FOLDER", "```"]
    if config is not None:
        said = json.dumps(to_dict(config), indent=1)
        lines += [
            "",
            "<details><summary>Config</summary>",
            "",
            "```json",
            said,
            "```",
            "</details>",
        ]
    return lines
