"""The tables of docs/scaling.md: what each mesh moves and how far it can scale, on paper.

    python benchmarks/scaling.py        # prints them, in seconds; no chip, no compiler

Volumes and bounds are those that `jaxlm plan --search` ranks by; next to them the formulas of
Austin et al. 2025, How to Scale Your Model, part 5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxlm import chips
from jaxlm.config import Config, MeshConfig, TrainConfig
from jaxlm.model.presets import preset
from jaxlm.planning import analysis, roofline
from jaxlm.planning.search import memory_gib
from jaxlm.planning.target import reckoned

V5P = (  # chips along the three axes
    "1x1x1", "2x2x1", "2x2x4", "4x4x4", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16",
       "16x16x32")  # fmt: skip


def config(name: str, batch: int, seq_len: int, mesh: MeshConfig) -> Config:
    model = dataclasses.replace(preset(name), seq_len=seq_len, remat="full")
    model = dataclasses.replace(model, vocab_size=-(-model.vocab_size // 128) * 128)
    return Config(name=name, model=model, train=TrainConfig(global_batch_size=batch), mesh=mesh)


def fitting(c: Config, topology: chips.Topology) -> Config | None:
    """With the fewest micro-batches that fit."""
    rows = c.train.global_batch_size
    for k in (k for k in range(1, rows + 1) if rows % k == 0):
        tried = dataclasses.replace(c, train=dataclasses.replace(c.train, accumulation_steps=k))
        gib = memory_gib(tried, topology)
        if gib is not None and gib <= topology.chip.hbm_gib:
            return tried
    return None


def cell(c: Config, topology: chips.Topology) -> str:
    """GB moved per step and device by axis; MFU at most, and if nothing overlapped; with the fewest
    micro-batches that fit; of a pipeline the share of time in which no stage idles."""
    found = fitting(c, topology)
    if found is None:
        return "does not divide" if memory_gib(c, topology) is None else "does not fit"
    k, s, r = found.train.accumulation_steps, c.mesh.stage, c.model.pipeline_repeats
    told = bounds(found, topology) + (f" ({k} micro-batches)" if k > 1 else "")
    if s == 1:
        return told
    rows = c.train.global_batch_size // k // c.mesh.data
    parts = max(n for n in range(1, min(4 * s, rows) + 1) if rows % n == 0)  # `model.pipeline`
    return f"{told} × {r * parts / (r * parts + s - 1):.0%}"


def bounds(c: Config, topology: chips.Topology) -> str:
    on = reckoned(c, topology)
    found = analysis.collectives(c, on.shape)
    bound = roofline.roofline(c, on, found, analysis.state_bytes(c, on.shape))
    moved: dict[str, float] = {}
    for x in found:
        within, outside, _ = on.crossed(x.axes)
        moved["+".join(x.axes)] = moved.get("+".join(x.axes), 0.0) + x.moved(within * outside)
    volume = ", ".join(f"{a} {b / 1e9:,.0f}" if b > 1e10 else f"{a} {b / 1e9:.1f}"
                       for a, b in moved.items())  # fmt: skip
    serial = bound.mfu_bound * bound.step_s / bound.serial_s
    return f"{volume or 0}: **{bound.mfu_bound:.0%}** … {serial:.0%}"


def one_pod(name: str, batch: int, seq_len: int, shapes: Sequence[str], wide: int) -> None:
    """A model on ever more chips of v5p at one global batch."""
    print(f"| chips | tokens per chip | data | fsdp | fsdp × tensor 8 | fsdp × tensor {wide} |")
    print("|---|---|---|---|---|---|")
    for shape in shapes:
        topology = chips.topology(f"v5p:{shape}")
        n = topology.devices
        meshes = [MeshConfig(n, 1, 1), MeshConfig(1, n, 1)]
        meshes += [MeshConfig(1, -1, min(tensor, n)) for tensor in (8, wide)]
        cells = [cell(config(name, batch, seq_len, m), topology) for m in meshes]
        print(f"| {n:,} | {batch * seq_len / n:,.0f} | {' | '.join(cells)} |")


def two_pods(name: str, batch: int, seq_len: int) -> None:
    two = chips.topology("v5p:16x16x20", 2)
    wide = cell(config(name, batch, seq_len, MeshConfig(10, 128, 8)), two)
    print(f"| {two.devices:,} in 2 slices, batch {batch:,} | {batch * seq_len / two.devices:,.0f}"
          f" | | | × data 10: {wide} | |")  # fmt: skip


def slices(name: str, per_slice: int, seq_len: int) -> None:
    """A model on ever more v5e pods, data over the slices, at one batch and at one per slice."""
    print(f"| chips | slices | batch {per_slice} × slices | batch {per_slice * 4} in all |")
    print("|---|---|---|---|")
    for n in (1, 2, 4, 8, 16, 40):
        topology, mesh = chips.topology("v5e:16x16", n), MeshConfig(n, 64, 4)
        weak = cell(config(name, per_slice * n, seq_len, mesh), topology)
        strong = cell(config(name, per_slice * 4, seq_len, mesh), topology)
        print(f"| {topology.devices:,} | {n} | {weak} | {strong} |")


def contexts(name: str, batch: int, seq_len: int) -> None:
    """A model on long sequences, which are cut where rows alone do not suffice."""
    ways = (4, 16, 64)
    print(f"| chips | tokens per chip | {' | '.join(f'fsdp × context {k}' for k in ways)} |")
    print("|---|---|---|---|---|")
    for shape in V5P[3:]:
        topology = chips.topology(f"v5p:{shape}")
        n = topology.devices
        meshes = [MeshConfig(1, n // k, context=k) for k in ways]
        cells = [cell(config(name, batch, seq_len, m), topology) for m in meshes]
        print(f"| {n:,} | {batch * seq_len / n:,.0f} | {' | '.join(cells)} |")


def stages(name: str, batch: int, seq_len: int, shapes: Sequence[str]) -> None:
    """A model in a pipeline beside tensor 8 and data; MFU less what idles."""
    ways = ((4, 1), (8, 1), (8, 4))
    heads = " | ".join(f"stage {s}, {r} repeat{'s' * (r > 1)}" for s, r in ways)
    print(f"| chips | tokens per chip | {heads} |\n|---|---|---|---|---|")
    for shape in shapes:
        topology, row = chips.topology(f"v5p:{shape}"), []
        n = topology.devices
        for s, r in ways:
            c = config(name, batch, seq_len, MeshConfig(n // (8 * s), 1, 8, stage=s))
            c = dataclasses.replace(c, model=dataclasses.replace(c.model, pipeline_repeats=r))
            row.append(cell(c, topology))
        print(f"| {n:,} | {batch * seq_len / n:,.0f} | {' | '.join(row)} |")


def thresholds(name: str, chip: chips.Chip, batch_tokens: int) -> None:
    """Where the book's formulas say that wires bind, on this chip."""
    m = preset(name)
    alpha = chip.flops_per_s / (2 * chip.link_bytes_per_s)
    print("| | |\n|---|---|")
    for label, value in (
        ("C / W: FLOP per byte of one axis, both ways", alpha),
        (f"data or fsdp over {chip.axes} axes: tokens per chip at least", alpha / chip.axes),
        (f"so of {batch_tokens:,} tokens, chips at most", batch_tokens * chip.axes / alpha),
        ("tensor over one axis: ways at most, F / (C / W)", m.ff_dim / alpha),
        (f"fsdp over {chip.axes - 1} axes × tensor over one: tokens per chip at least",
         4 * alpha**2 / ((chip.axes - 1) * m.ff_dim)),
    ):  # fmt: skip
        print(f"| {label} | {value:,.0f} |")


def main() -> None:
    print("\n### Pythia 1.4B, 512 × 2,048 tokens a step, v5p\n")
    one_pod("pythia-1.4b", 512, 2048, V5P[:6], 2)
    for batch in (2048, 512):
        print(f"\n### GPT-3 175B, {batch:,} × 2,048 tokens a step, v5p\n")
        one_pod("gpt3-175b", batch, 2048, V5P[3:], 32)
    two_pods("gpt3-175b", 2560, 2048)
    print("\n### Llama-3 8B, 16 sequences of 131,072 a step, v5p\n")
    contexts("llama3-8b", 16, 131072)
    print("\n### GPT-3 175B in a pipeline × tensor 8 × data, 2,048 × 2,048 tokens a step, v5p\n")
    stages("gpt3-175b", 2048, 2048, V5P[5:])
    print("\n### GPT-3 175B on v5p: the book's thresholds\n")
    thresholds("gpt3-175b", chips.CHIPS["v5p"], 2048 * 2048)
    print("\n### Llama-3 8B, sequences of 4,096, v5e pods of 256: data × fsdp 64 × tensor 4\n")
    slices("llama3-8b", 256, 4096)


if __name__ == "__main__":
    main()
