"""One GPT-2 trained by jaxlm and by PyTorch, step against step: tokens per second and their ratio.

    pip install -e '.[bench]'
    python benchmarks/train.py [--vocab=256,50257] [--rounds=12] [--out=runs/benchmark-train]

6 layers, d_model 384, 6 heads, sequences of 256, batch 8, float32, the tied GPT-2 of both
libraries from the same initial weights on the same tokens: forward, backward, clipping at 1.0,
AdamW. Every contender lives in its own process with every core of the machine, compiles first, and
then they take turns, one step each round. Losses must agree, or it is not the same model. Prints a
table, with the share of the fastest matrix product that any of the libraries reached in the same
run; writes train.json. Run on a quiet machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import turns
from turns import CORES, Child

LAYERS, D_MODEL, HEADS, SEQ, BATCH = 6, 384, 6, 256, 8
LEARNING_RATE, BETAS, EPS, DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
GEMMS = ((1024, 1024, 1024), (2048, 384, 1536), (2048, 1536, 384), (2048, 2048, 2048))

Step = Callable[[np.ndarray], float]  # token ids [b, t + 1] -> loss before the update
Product = Callable[[np.ndarray, np.ndarray], Any]  # a finished matrix product

# ----------------------------------------------------------------------------------- contenders


def jaxlm_step(vocab: int, weights: Path) -> tuple[Step, Product, int]:
    """jaxlm's own step program; also writes the initial weights for PyTorch, and counts FLOPs."""
    import jax
    import jax.numpy as jnp

    from jaxlm import mesh
    from jaxlm.config import Config, ModelConfig, OptimizerConfig, TrainConfig, validate
    from jaxlm.data.loader import Batch
    from jaxlm.model.scale import size
    from jaxlm.train.optimizer import hyper
    from jaxlm.train.step import program

    model = ModelConfig(
        d_model=D_MODEL, n_layers=LAYERS, n_heads=HEADS, vocab_size=vocab, seq_len=SEQ,
        norm="layernorm", positions="learned", activation="gelu", bias=True, tie_embeddings=True,
        scan_layers=False,
    )  # fmt: skip
    optimizer = OptimizerConfig(
        learning_rate=LEARNING_RATE, schedule="constant", warmup_fraction=0.0, b1=BETAS[0],
        b2=BETAS[1], eps=EPS, weight_decay=DECAY, grad_clip=CLIP,
    )  # fmt: skip
    config = validate(
        Config(model=model, optimizer=optimizer, train=TrainConfig(global_batch_size=BATCH))
    )
    devices = mesh.make(config)
    jax.set_mesh(devices)
    run, h = program(config), hyper(config)
    state = run.init(h)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state.params))
    if not weights.exists():
        named = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
        np.savez(weights, **named)
    ones = np.ones((1, BATCH, SEQ), np.int32)
    where = np.broadcast_to(np.arange(SEQ, dtype=np.int32), ones.shape)

    def step(tokens: np.ndarray) -> float:
        nonlocal state
        ids = tokens[None].astype(np.int32)
        batch = Batch(ids[..., :-1], ids[..., 1:], ones.astype(np.float32), ones, where)
        state, metrics = run.chunk(h, state, mesh.put_batch(batch, devices, leading=1))
        return float(jax.block_until_ready((state, metrics))[1]["train/loss"][0])

    product = jax.jit(jnp.matmul)
    return step, lambda a, b: product(a, b).block_until_ready(), size(model).flops_per_token


def torch_step(vocab: int, weights: Path, compiled: bool) -> tuple[Step, Product, int]:
    """transformers' GPT-2 with sdpa attention, trained by torch's AdamW."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(CORES)
    config = GPT2Config(
        vocab_size=vocab, n_positions=SEQ, n_embd=D_MODEL, n_layer=LAYERS, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=None, eos_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    model.load_state_dict(_as_gpt2(np.load(weights)), strict=False)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name]
    rest = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".h." in name)]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)
    forward = torch.compile(model) if compiled else model

    def step(tokens: np.ndarray) -> float:
        ids = torch.from_numpy(tokens.astype(np.int64))
        logits = forward(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step, lambda a, b: torch.from_numpy(a) @ torch.from_numpy(b), 0


def _as_gpt2(ours: Any) -> dict[str, Any]:
    """jaxlm's parameters under GPT-2's names and shapes (its Conv1D holds [in, out])."""
    import torch

    names = {
        "ln_1.weight": "attention_norm.gain", "ln_1.bias": "attention_norm.bias",
        "ln_2.weight": "feed_forward_norm.gain", "ln_2.bias": "feed_forward_norm.bias",
        "attn.c_proj.weight": "attention.out", "attn.c_proj.bias": "attention.out_bias",
        "mlp.c_fc.weight": "feed_forward.up", "mlp.c_fc.bias": "feed_forward.up_bias",
        "mlp.c_proj.weight": "feed_forward.down", "mlp.c_proj.bias": "feed_forward.down_bias",
    }  # fmt: skip
    out = {
        "transformer.wte.weight": ours["embedding"],
        "lm_head.weight": ours["embedding"],
        "transformer.wpe.weight": ours["positions"],
        "transformer.ln_f.weight": ours["norm.gain"],
        "transformer.ln_f.bias": ours["norm.bias"],
    }
    for i in range(LAYERS):
        qkv = [ours[f"layers.attention.{n}"][i] for n in ("query", "key", "value")]
        bias = [ours[f"layers.attention.{n}_bias"][i] for n in ("query", "key", "value")]
        layer = {name: ours[f"layers.{ours_name}"][i] for name, ours_name in names.items()}
        layer["attn.c_proj.weight"] = layer["attn.c_proj.weight"].reshape(D_MODEL, D_MODEL)
        layer["attn.c_attn.weight"] = np.concatenate([w.reshape(D_MODEL, -1) for w in qkv], axis=1)
        layer["attn.c_attn.bias"] = np.concatenate([b.reshape(-1) for b in bias])
        out.update({f"transformer.h.{i}.{name}": x for name, x in layer.items()})
    return {name: torch.from_numpy(np.array(x)) for name, x in out.items()}


def contender(name: str, vocab: int, weights: Path) -> None:
    """Child process: compiles, then answers each line on stdin ('step' or 'gemm') with JSON."""
    rng = np.random.default_rng(0)

    def start() -> tuple[dict[str, Any], Callable[[str], dict[str, Any]]]:
        began = time.perf_counter()
        if name.startswith("jaxlm"):
            step, product, flops = jaxlm_step(vocab, weights)
        else:
            step, product, flops = torch_step(vocab, weights, compiled="compile" in name)

        def take_step() -> dict[str, float]:
            tokens = rng.integers(0, vocab, (BATCH, SEQ + 1))
            began = time.perf_counter()
            loss = step(tokens)
            return {"step_s": time.perf_counter() - began, "loss": loss}

        ready = {"first": take_step()["loss"], "flops_per_token": flops}
        return {
            **ready,
            "compile_s": time.perf_counter() - began,
        }, lambda line: take_step() if line == "step" else {"gflops": best_product(product)}

    turns.serve(start)


def best_product(product: Product) -> float:
    """GFLOP/s of the fastest float32 matrix product among GEMMS, best of 5 each."""
    best = 0.0
    for m, k, n in GEMMS:
        a, b = np.ones((m, k), np.float32), np.ones((k, n), np.float32)
        for _ in range(5):
            began = time.perf_counter()
            product(a, b)
            best = max(best, 2e-9 * m * k * n / (time.perf_counter() - began))
    return best


# ---------------------------------------------------------------------------------------- parent


def environments() -> dict[str, dict[str, str]]:
    """Contender → environment. jaxlm also runs as one single-threaded device per core."""
    flags = "--xla_cpu_multi_thread_eigen=false"
    many = {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={CORES}"}
    one = {"JAX_PLATFORMS": "cpu"}
    return {
        "jaxlm": one,
        f"jaxlm, {CORES} devices": {**one, **many},
        "torch eager": {},
        "torch.compile": {},
    }


def measure(vocab: int, rounds: int, folder: Path) -> dict[str, Any]:
    children: list[Child] = []
    weights = folder / f"weights-{vocab}.npz"
    weights.unlink(missing_ok=True)
    for name, env in environments().items():
        children.append(Child(__file__, name, [str(vocab), weights], env))
        print(f"vocabulary {vocab}: {name} ready", file=sys.stderr, flush=True)
    for i in range(rounds + 1):  # the first round warms up
        for child in children:
            row = child.ask("step")
            if i > 0:
                child.rows.append(row)
    peak = max([child.ask("gemm")["gflops"] for child in children] + [best_product(np.matmul)])
    for child in children:
        child.close()
    flops = max(child.ready["flops_per_token"] for child in children)
    return {
        "vocab_size": vocab,
        "gemm_gflops": peak,
        "flops_per_token": flops,
        "contenders": {child.name: summary(child, flops, peak) for child in children},
    }


def summary(child: Child, flops: float, peak: float) -> dict[str, Any]:
    rates = [BATCH * SEQ / row["step_s"] for row in child.rows]
    return {
        "tokens_per_s": statistics.median(rates),
        "share_of_gemm": statistics.median(rates) * flops / peak / 1e9,
        "each": rates,
        "losses": [child.ready["first"]] + [row["loss"] for row in child.rows],
        "compile_s": child.ready["compile_s"],
    }


def show(result: dict[str, Any]) -> None:
    rows = result["contenders"]
    best = max((n for n in rows if "torch" in n), key=lambda n: rows[n]["tokens_per_s"])
    print(f"\nvocabulary {result['vocab_size']:,}; GEMM peak {result['gemm_gflops']:.0f} GFLOP/s")
    print(f"{'':<18}{'tokens/s':>9}{'of peak':>9}{'compile':>9}   × {best} (quartiles)")
    for name, row in rows.items():
        middle, low, high = turns.ratio(row["each"], rows[best]["each"])
        print(
            f"{name:<18}{row['tokens_per_s']:>9.0f}{row['share_of_gemm']:>9.0%}"
            f"{row['compile_s']:>8.1f}s   {middle:.2f} ({low:.2f}–{high:.2f})"
        )
    losses = np.array([row["losses"] for row in rows.values()])
    off = np.abs(losses - losses[0]).max(axis=0)
    print(f"losses differ by at most {off[0]:.1e} at first, {off.max():.1e} after {len(off)} steps")
    if off[0] > 1e-4 * losses[0, 0]:
        sys.exit("the first losses differ: these are not the same model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", default="256,50257")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    missing = [m for m in ("torch", "transformers") if importlib.util.find_spec(m) is None]
    if missing:
        sys.exit(f"{' and '.join(missing)} missing: pip install -e '.[bench]'")
    folder = Path(options.out or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for vocab in map(int, options.vocab.split(",")):
        results.append(measure(vocab, options.rounds, folder))
        show(results[-1])
    path = folder / "train.json"
    about = {"machine": platform.machine(), "cores": CORES, "python": platform.python_version()}
    document = {"format": "jaxlm.benchmark_train/1", **about, "results": results}
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contender"]:
        contender(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
