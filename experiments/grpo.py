"""Reinforcement from a reward that a program can verify: sums, and whether they are right.

Command:  python experiments/grpo.py runs/grpo     # a few minutes of one core
Result:   of 377 sums that were neither shown nor drawn, 20 % are right to begin with, 32 % after
          100 updates and 43 % after 200 (the last hundred was not run).

A small decoder first sees some sums of two numbers below 50 with their answers (`jaxlm finetune`),
too few to learn to add. Then it draws GROUP answers to each of PROMPTS other sums and learns from
whether they are right: an answer's advantage is its reward less its group's mean, over the group's
deviation (GRPO: Shao et al. 2024, §4.1.2; one update per draw, so that the ratio of policies is 1
and its clipping idle, and without a term that holds the policy to its beginning). That is the next
token's loss with the advantages as weights, so the step is `train.step.program`, as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

import jaxlm
from jaxlm import api, mesh
from jaxlm.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, TuneConfig
from jaxlm.data.examples import is_held_out
from jaxlm.data.loader import Batch
from jaxlm.language_model import LanguageModel
from jaxlm.schema import JaxlmError
from jaxlm.train.optimizer import hyper
from jaxlm.train.step import program

BELOW, HELD_OUT, SHOWN = 50, 0.2, 0.3
PROMPTS, GROUP, T = 64, 16, 12  # sums and draws of each in a step; tokens in a row
STEPS = 300


def sums() -> list[tuple[str, str]]:
    """("12+34=", "46") …"""
    return [(f"{a}+{b}=", str(a + b)) for a in range(BELOW) for b in range(BELOW)]


def shown() -> Iterator[dict[str, str]]:
    """Those that are learnt from as they are."""
    for asked, answer in sums():
        if is_held_out(asked, SHOWN):  # 735, of which finetune holds 261 out
            yield {"text": asked, "label": answer}


def get_config() -> Config:
    return Config(
        name="grpo",
        model=ModelConfig(vocab_size=256, seq_len=T, d_model=64, n_layers=2, n_heads=4,
                          scan_layers=False),
        data=DataConfig(eval_fraction=HELD_OUT, max_epochs=1000.0),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        train=TrainConfig(steps=400, global_batch_size=64, objective="next_token", log_every=100),
        tune=TuneConfig(examples=("grpo.py:shown",)),
    )  # fmt: skip


def right(model: LanguageModel, asked: list[tuple[str, str]]) -> float:
    """The share of sums whose likeliest answer is right."""
    prompts = [prompt for prompt, _ in asked]
    said = model.generate(prompts, max_new_tokens=3, temperature=0.0, return_full_text=False)
    return float(np.mean([text == answer for [text], (_, answer) in zip(said, asked, strict=True)]))


def rewarded(model: LanguageModel, asked: list[tuple[str, str]], seed: int) -> tuple[Batch, float]:
    """Drawn answers as rows, weighed by their advantages, and their mean reward."""
    said = model.generate([p for p, _ in asked], max_new_tokens=3, num_return_sequences=GROUP,
                          temperature=1.0, seed=seed, return_full_text=False)  # fmt: skip
    reward = np.array([[s == a for s in texts] for texts, (_, a) in zip(said, asked, strict=True)])
    deviation = reward.std(axis=1, keepdims=True)
    advantage = (reward - reward.mean(axis=1, keepdims=True)) / np.maximum(deviation, 1e-6)
    tokens, targets, segments = np.zeros((3, reward.size, T), np.int32)
    weights = np.zeros((reward.size, T), np.float32)
    drawn = ((p, s) for (p, _), texts in zip(asked, said, strict=True) for s in texts)
    for row, (prompt, text) in enumerate(drawn):
        if not text.isascii():  # half a letter, which is not the bytes that were drawn
            continue
        before = model.tokenizer.encode(prompt)
        ids = np.concatenate([before, model.tokenizer.encode(text), [model.tokenizer.eos_id]])
        n = len(ids) - 1
        tokens[row, :n], targets[row, :n], segments[row, :n] = ids[:-1], ids[1:], 1
        weights[row, len(before) - 1 : n] = advantage.flat[row] / (n + 1 - len(before))
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
    return Batch(tokens, targets, weights / reward.size, segments, positions), float(reward.mean())


def main(folder: str) -> None:
    first = get_config()
    experiment = f"{Path(__file__).resolve()}:shown"
    first = replace(first, tune=replace(first.tune, examples=(experiment,)))
    api.finetune(first, folder)
    model = jaxlm.from_pretrained(folder)
    unseen = [s for s in sums() if not is_held_out(s[0], SHOWN)]
    held_out = [s for s in unseen if is_held_out(f"held out: {s[0]}", HELD_OUT)]
    learnt = [s for s in unseen if s not in held_out]
    found = [{"step": 0, "right": right(model, held_out), "n": len(held_out)}]
    print(json.dumps(found[0]), flush=True)
    config = replace(
        first,
        optimizer=replace(first.optimizer, learning_rate=3e-4, schedule="constant"),
        train=replace(first.train, steps=STEPS, global_batch_size=PROMPTS * GROUP),
    )
    rng = np.random.default_rng(0)
    with jax.set_mesh(model.mesh):
        run = program(config)
        state = run.init(hyper(config))._replace(params=model.params)
        for step in range(1, STEPS + 1):
            drawn = rng.choice(len(learnt), PROMPTS, replace=False)
            batch, reward = rewarded(model, [learnt[i] for i in drawn], step)
            placed = mesh.put_batch(jax.tree.map(lambda x: x[None], batch), model.mesh, leading=1)
            state, _ = run.chunk(hyper(config), state, placed)
            model = replace(model, params=state.params)
            if step % 50 == 0:
                share = right(model, held_out)
                print(json.dumps({"step": step, "reward": reward, "right": share}), flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("grpo: expected a folder, as in python experiments/grpo.py runs/grpo")
    try:
        main(sys.argv[1])
    except JaxlmError as e:
        print(f"grpo: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
