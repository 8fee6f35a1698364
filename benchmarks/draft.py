"""What proposals of a draft gain: tokens per pass, acceptance, speed against plain steps.

    python benchmarks/draft.py --model=SmolLM2-135M-Instruct.Q4_1.gguf [--temperature=0]

Drafts that need no training: the model in 8 and in 4 bits, and its first layers under its own
unembedding. Prompts are beginnings of Python's help texts; all take turns in one process, compiled
first. Acceptance α solves (1 - α^(γ+1)) / (1 - α) = tokens per pass (Leviathan et al. 2023, eq. 1)
of γ proposals; "needed" is the one at which passes would cost what plain steps do, with the
measured times of a draft's step and of a pass. Run on a quiet machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from scipy.optimize import brentq

import jaxlm
from jaxlm.generate import decode, speculative
from jaxlm.generate.sampling import Sampling
from jaxlm.generate.speculative import WIDTH, Draft
from jaxlm.language_model import LanguageModel

PROMPTS, PROMPT, NEW = 3, 32, 64


def drafts(model: LanguageModel) -> dict[str, LanguageModel]:
    found = {"int8": model.in_bits(8), "int4": model.in_bits(4)}
    n = model.config.n_layers * 4 // 5
    layers = jax.tree.map(lambda w: w[:n], model.params["layers"])
    config = dataclasses.replace(model.config, n_layers=n)
    found[f"{n} layers"] = dataclasses.replace(
        model, config=config, params={**model.params, "layers": layers}
    )
    return found


def plain(model: LanguageModel, prompts: list[np.ndarray], how: Sampling) -> Callable[[], int]:
    def run() -> int:
        for prompt in prompts:
            decode.generate(model.config, model._alone, [prompt], NEW, None, how)
        return 0

    return run


def drafted(
    model: LanguageModel, small: LanguageModel, prompts: list[np.ndarray], how: Sampling
) -> Callable[[], int]:
    draft = Draft(small.config, small._alone)

    def run() -> int:
        given = draft, prompts, NEW, None, how
        found = speculative.generate(model.config, model._alone, *given)
        return sum(one.passes for one in found)

    return run


def acceptance(tokens_per_pass: float) -> float:
    """α of so many tokens per pass, 1 … WIDTH + 1."""
    gain = lambda a: sum(a**i for i in range(WIDTH + 1)) - tokens_per_pass  # noqa: E731
    return brentq(gain, 0.0, 1.0) if gain(0.0) < 0 < gain(1.0) else float(gain(1.0) <= 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = jaxlm.from_pretrained(options.model)
    texts = list(pydoc_data.topics.topics.values())[:PROMPTS]
    prompts = [model.tokenizer.encode(text)[:PROMPT] for text in texts]
    small = drafts(model)
    n, how = PROMPTS * NEW, Sampling(options.temperature)
    runs: dict[Any, Callable[[], int]] = {"plain": plain(model, prompts, how)}
    for name, draft in small.items():
        runs["step", name] = plain(draft, prompts, how)
        runs["draft", name] = drafted(model, draft, prompts, how)
    with jax.set_mesh(model.mesh):
        passes = {key: run() for key, run in runs.items()}
        seconds: dict[Any, list[float]] = {key: [] for key in runs}
        for _ in range(options.rounds):
            for key, run in runs.items():
                began = time.perf_counter()
                run()
                seconds[key].append(time.perf_counter() - began)
    s = {key: statistics.median(each) for key, each in seconds.items()}
    print(f"plain {n / s['plain']:.1f} tokens/s")
    for name in small:
        per_pass = n / passes["draft", name]
        cost = s["step", name] / s["plain"]  # of a draft's step, in steps of the model
        whole = s["draft", name] / passes["draft", name] * n / s["plain"]  # of a round
        needed = f"{acceptance(whole):.2f}" if whole <= WIDTH + 1 else "more than 1"
        print(
            f"{name:<10} {n / s['draft', name]:6.1f} tokens/s ({per_pass / whole:.2f} ×),"
            f" {per_pass:.2f} a pass: acceptance {acceptance(per_pass):.2f}, needed {needed};"
            f" a draft's step costs {cost:.2f}, a pass {whole - WIDTH * cost:.2f}"
        )


if __name__ == "__main__":
    main()
