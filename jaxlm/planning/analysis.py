"""Memory and collectives of a step, reckoned without a compiler: for GPUs, and to rank a search.

What jaxlm's own step does, counted (`model.parts.use` gathers a parameter over fsdp where it is
used; `mesh.RULES` says which axis cuts which dimension), and not what a compiler makes of it:
against TPU's compiler it is compared in docs/scaling.md.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import jax

from jaxlm.config import Config
from jaxlm.mesh import CONTEXT, DATA, EXPERT, FSDP, RULES, STAGE, TENSOR
from jaxlm.model.transformer import Declared, table
from jaxlm.planning.hlo import Collective

GIB = 2**30
BATCH = (DATA, FSDP, EXPERT)  # as mesh.RULES cuts a batch


@dataclass(frozen=True)
class Weights:
    """Elements of parameters on one device: as stored, and as used (gathered over fsdp); of all
    and of one scanned layer."""

    stored: float
    used: float
    layer_used: float
    n_layers: int


def weights(config: Config, shape: dict[str, int]) -> Weights:
    model = dataclasses.replace(config.model, remat="none")  # one table for all that a search tries
    rows = jax.tree.leaves(table(model), is_leaf=lambda x: isinstance(x, Declared))
    stored = used = layer = 0.0
    for row in rows:
        stored += math.prod(row.shape) / _cut(row, shape, gathered=False)
        here = math.prod(row.shape) / _cut(row, shape, gathered=True)
        used += here
        layer += here / row.shape[0] if row.axes[0] == "layers" else 0.0
    both = config.model.architecture == "encoder_decoder"
    n = config.model.n_layers + (config.model.encoder_layers if both else 0)
    return Weights(stored, used, layer / (2 if both else 1), n)


def _cut(row: Declared, shape: dict[str, int], gathered: bool) -> int:
    """Pieces that a parameter lies in."""
    rules = [RULES[axis] for axis in row.axes]
    names = [n for r in rules if r is not None for n in ((r,) if isinstance(r, str) else r)]
    return math.prod(shape.get(n, 1) for n in names if not (gathered and n == FSDP))


def rows_per_device(config: Config, shape: dict[str, int]) -> float:
    """Sequences of a micro-batch on one device; a part of one where `context` cuts them."""
    t, cut = config.train, math.prod(shape[axis] for axis in (*BATCH, CONTEXT))
    return t.global_batch_size / t.accumulation_steps / cut


def state_bytes(config: Config, shape: dict[str, int]) -> float:
    """Of one device: float32 parameters and the optimizer's moments (Adam: two; Muon's hidden
    matrices have one, which is left out of account)."""
    return 12 * weights(config, shape).stored


def host_bytes(config: Config, shape: dict[str, int]) -> float:
    """Of a device's `state_bytes`, what lies in the host's memory (`optimizer.offload`)."""
    return 8 * weights(config, shape).stored if config.optimizer.offload else 0.0


def temporaries_gib(config: Config, shape: dict[str, int]) -> float:
    """What lives within a step besides: gradients, what the backward pass keeps of the blocks, one
    block at work, and the logits with their gradient. How many copies of each there are was found
    by comparing with TPU's compiler (docs/results/aot.md)."""
    m, w = config.model, weights(config, shape)
    width, cut = (4 if m.compute_dtype == "float32" else 2), shape[TENSOR]
    rows = rows_per_device(config, shape)
    token = rows * m.seq_len * width  # bytes of one number per token
    inner = (2 * m.n_heads * m.head_dim + 2 * m.kv_heads * m.head_dim + 3 * m.ff_dim) / cut
    block = token * (12 * m.d_model + 2 * inner)
    kept = {"full": token * m.d_model, "dots": token * (2 * m.d_model + inner)}
    saved = w.n_layers * kept.get(m.remat, block)
    if m.remat == "none" and shape[FSDP] > 1:
        saved += width * w.layer_used * w.n_layers  # gathered weights are kept for the backward
    if m.architecture == "encoder_decoder":  # keys and values of every cross-attention
        saved += 2 * m.n_layers * token * 2 * m.kv_heads * m.head_dim / cut
    logits = 2.5 * 4 * rows * m.decoder_len * m.vocab_size / cut
    gradients = 2 * 4 * w.stored
    at_work = block / 2 + 2 * width * w.layer_used
    if m.moe.n_experts:  # a device keeps room for all that the others may send to its experts
        room = token * m.moe.experts_per_token * shape[EXPERT]
        at_work += room * (6 * m.d_model + 4 * m.expert_dim / cut)
    return (gradients + saved + max(at_work, logits)) / GIB


def collectives(config: Config, shape: dict[str, int]) -> tuple[Collective, ...]:
    """Of one step on one device: parameters gathered over fsdp for each micro-batch, and again for
    its backward pass where remat does not keep them; gradients reduced over data, context and fsdp
    in float32; the activations' sums over tensor: two per block forward, two backward, and with
    full remat attention's again; over context keys and values round the ring, forward, backward
    with their gradients, and again for remat; over expert each token's choices there and back; over
    stage each repeat's hand-overs and the last one's output for all, both ways."""
    m, t, w = config.model, config.train, weights(config, shape)
    width, n = (4 if m.compute_dtype == "float32" else 2), t.accumulation_steps
    layers = w.n_layers / shape[STAGE]
    tokens = rows_per_device(config, shape) * m.seq_len  # of a micro-batch
    again = m.remat == "full"
    found = []
    if shape[FSDP] > 1:
        gathers = n if m.remat == "none" else 2 * n
        found.append(Collective("all-gather", (FSDP,), gathers, gathers * width * w.used))
        found.append(Collective("reduce-scatter", (FSDP,), n, n * 4 * w.used))
    copies = tuple(axis for axis in (DATA, CONTEXT) if shape[axis] > 1)
    if copies:
        found.append(Collective("all-reduce", copies, 1, 4 * w.stored))
    if shape[TENSOR] > 1:
        sums = (5 if again else 4) * layers * n
        found.append(Collective("all-reduce", (TENSOR,), sums, sums * tokens * m.d_model * width))
    if shape[CONTEXT] > 1:
        turns = (shape[CONTEXT] - 1) * layers * n
        both = 2 * tokens * m.kv_heads * m.head_dim / shape[TENSOR]
        sent = (1 + again) * width + width + 4  # forward; backward, with float32 gradients
        found.append(
            Collective("collective-permute", (CONTEXT,), (2 + again) * turns, turns * both * sent)
        )
    if shape[STAGE] > 1:
        moved = m.pipeline_repeats * tokens * m.d_model * width
        found.append(Collective("collective-permute", (STAGE,), 2 * n, 2 * n * moved))
        found.append(Collective("all-reduce", (STAGE,), 2 * n, 2 * n * tokens * m.d_model * width))
    if shape[EXPERT] > 1:
        times = (6 if again else 4) * layers * n
        each = tokens * m.moe.experts_per_token * m.d_model * width
        found.append(Collective("all-to-all", (EXPERT,), times, times * each))
    return tuple(found)
