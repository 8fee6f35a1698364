"""Config and its parts, and what makes one valid. Knows nothing of jax or of devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from jaxlm import model_config
from jaxlm.data_config import CleanConfig as CleanConfig  # experiments take it from here
from jaxlm.data_config import DataConfig
from jaxlm.model_config import ModelConfig, Ranges
from jaxlm.schema import UserError, checked, doc, part
from jaxlm.tune_config import TuneConfig

# ------------------------------------------------------------------------------------------ parts


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters move. Steps are given as shares, so that they follow the horizon."""

    name: str = doc("adamw", "'adamw', 'muon', or own 'file.py:function'")
    learning_rate: float = doc(3e-3, "peak learning rate")
    schedule: str = doc("wsd", "'wsd', 'cosine', 'linear', 'constant', or own 'file.py:function'")
    warmup_fraction: float = doc(0.05, "share of steps with a linear rise from 0")
    decay_fraction: float = doc(0.3, "wsd: share of steps with the final fall")
    final_fraction: float = doc(0.0, "learning rate at the end, as a share of the peak")
    b1: float = doc(0.9, "Adam: decay of the first moment")
    b2: float = doc(0.95, "Adam: decay of the second moment")
    eps: float = doc(1e-8, "Adam: added to the root of the second moment")
    weight_decay: float = doc(0.1, "decoupled, on matrices only, times the learning rate")
    grad_clip: float = doc(1.0, "largest global gradient norm; 0: no clipping")
    muon_momentum: float = doc(0.95, "muon: momentum of the orthogonalised matrices")
    offload: bool = doc(False, "its state lies in the host's memory between two updates")


OBJECTIVES = {
    "decoder": (
        *("next_token", "prefix_lm", "fill_in_the_middle"),
        *("classify", "regress", "preference", "distill"),
    ),
    "encoder": ("masked_lm", "classify", "regress"),
    "encoder_decoder": ("span_corruption", "ul2", "prefix_lm", "pairs"),
}

# Share of the text and mean length of the spans taken out (Tay et al. 2022, table 1); a seventh
# denoiser continues a prefix. The first two are "regular", the other four "extreme".
UL2 = ((0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.5, 8.0), (0.15, 64.0), (0.5, 64.0))
UL2_MODES = 3  # regular, extreme, sequential: a token before the text says which


@dataclass(frozen=True)
class Corruption:
    """How the objectives change a text that is to be restored."""

    rate: float = doc(0.15, "share of the tokens to restore; fill_in_the_middle: of the documents")
    mean_span: float = doc(3.0, "span_corruption: mean length of a span")
    whole_words: bool = doc(False, "masked_lm: whole words are masked or not")
    top_id: int | None = doc(
        None, "the mask, or the first of the sentinels, others downwards; None: the last id"
    )

    def spans(self, t: int) -> tuple[int, int]:
        """Tokens taken out of `t`, and in how many spans."""
        return _spans(t, self.rate, self.mean_span)

    def ul2_spans(self, t: int) -> list[tuple[int, int]]:
        return [_spans(t, *denoiser) for denoiser in UL2]

    def marks(self, vocab_size: int) -> tuple[int, int, int]:
        """fill_in_the_middle: what stands before the prefix, the suffix and the middle."""
        top = vocab_size - 1 if self.top_id is None else self.top_id
        return top, top - 1, top - 2

    def special_ids(self, objective: str, t: int) -> int:
        """Ids that an objective needs besides those of text, for rows of `t` tokens."""
        return {
            "masked_lm": 1,
            "span_corruption": self.spans(t)[1] + 1,
            "ul2": max(n for _, n in self.ul2_spans(t)) + 1 + UL2_MODES,
            "fill_in_the_middle": 3,
        }.get(objective, 0)


def _spans(t: int, rate: float, mean: float) -> tuple[int, int]:
    noise = min(max(round(t * rate), 1), max(t - 1, 1))
    return noise, min(max(round(noise / mean), 1), noise, max(t - noise, 1))


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, how often, what is watched."""

    steps: int = doc(1000, "optimizer steps")
    global_batch_size: int = doc(16, "sequences per step, over all devices")
    accumulation_steps: int = doc(1, "micro-batches per step, weighted by their tokens")
    deterministic_reduce: int = doc(
        0,
        "virtual shards of a batch, added up in one order: the same bits on any number of devices"
        " along mesh.data (docs/pods.md); 0: off",
    )
    objective: str = doc(
        "next_token",
        "'next_token', 'prefix_lm', 'fill_in_the_middle'; encoder: 'masked_lm'; encoder_decoder:"
        " 'span_corruption', 'ul2', 'prefix_lm'; or own 'file.py:function'; of examples (finetune):"
        " 'classify', 'regress', 'preference', 'distill', encoder_decoder: 'pairs'",
    )
    corruption: Corruption = part(Corruption)
    z_loss: float = doc(0.0, "weight of log(Z)^2 in the loss")
    steps_per_dispatch: int = doc(1, "steps in one lax.scan; every interval is a multiple of it")
    log_every: int = doc(50, "steps between lines in metrics.jsonl")
    eval_every: int = doc(0, "steps between evaluations; 0: at the end only")
    checkpoint_every: int = doc(0, "steps between checkpoints; 0: at the end only")
    keep_checkpoints: int = doc(2, "newest checkpoints kept")
    probes: tuple[str, ...] = doc((), "prompts whose next-token distribution is logged")
    sample_prompts: tuple[str, ...] = doc((), "prompts continued at each evaluation")
    sample_tokens: int = doc(64, "tokens per sample")
    tasks: tuple[str, ...] = doc((), "'NAME=PATH', scored at each evaluation as `evaluate` does")
    task_items: int = doc(200, "items of each of them, the first ones; 0: all")
    track: tuple[str, ...] = doc((), "besides metrics.jsonl: 'tensorboard', 'wandb', 'trackio'")
    xla_preset: Literal["none", "chip"] = doc(
        "none", "'chip': compiler options that others found useful on this TPU (jaxlm/xla.py)"
    )
    profile: str = doc("", "'START:STOP': a JAX profiler trace of these steps")


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; -1 takes what is left. The product must be the device count."""

    data: int = doc(-1, "batch over devices, parameters copied; over slices (DCN) first")
    fsdp: int = doc(1, "batch over devices, parameters and optimizer state cut up (ZeRO-3)")
    tensor: int = doc(1, "heads, feed-forward and vocabulary cut up")
    context: int = doc(1, "sequences cut up (ring attention)")
    expert: int = doc(1, "batch over devices, experts of a mixture cut up (all-to-all)")
    stage: int = doc(1, "layers cut up (a pipeline)")


@dataclass(frozen=True)
class Config:
    """One training run."""

    name: str = doc("run", "shown in reports; not part of the fingerprint")
    seed: int = doc(0, "initial weights, and sample order unless data.seed is set")
    model: ModelConfig = part(ModelConfig)
    data: DataConfig = part(DataConfig)
    optimizer: OptimizerConfig = part(OptimizerConfig)
    train: TrainConfig = part(TrainConfig)
    tune: TuneConfig = part(TuneConfig)
    mesh: MeshConfig = part(MeshConfig)

    @property
    def text_ids(self) -> int:
        """How many ids of the vocabulary are for text: the objective may keep some at the top."""
        c = self.train.corruption
        kept = c.special_ids(self.train.objective, self.model.seq_len) if c.top_id is None else 0
        return self.model.vocab_size - kept

    @property
    def batch_tokens(self) -> int:
        return self.train.global_batch_size * self.model.seq_len

    @property
    def tokens(self) -> int:
        """Training tokens D."""
        return self.train.steps * self.batch_tokens


@dataclass(frozen=True)
class Shape:
    """One model size of a ladder; heads follow from the base's d_head."""

    d_model: int = doc(64, "width")
    n_layers: int = doc(2, "depth")


@dataclass(frozen=True)
class Rung:
    """One compute budget and the sizes that share it (an IsoFLOP slice)."""

    flops: float = doc(3e11, "training FLOPs of each member")
    shapes: tuple[Shape, ...] = doc((), "sizes; their minimum in loss should lie inside")
    replicates: int = doc(1, "runs (seeds) of the middle size, for the noise floor")


@dataclass(frozen=True)
class Horizon:
    """How batch and learning rate of a ladder's runs follow their tokens D. The best batch grows
    with D alone (Bergsma et al. 2025, arXiv 2505.13738), the best rate with the root of the batch
    (Malladi et al. 2022, arXiv 2205.10287) and falls with D at a given batch:

        global_batch_size = base x (D/tokens)^batch_power, to a factor of 2^k
        learning_rate     = base x (global_batch_size/base)^(1/2) x (D/tokens)^rate_power
    """

    tokens: float = doc(0.0, "where the base's batch and rate are right; 0: every run takes them")
    batch_power: float = doc(0.4, "of the batch in D")
    rate_power: float = doc(-0.3, "of the learning rate in D, at a given batch")


@dataclass(frozen=True)
class Sweep:
    """A ladder of runs, the fit they carry, and the rung that tests it."""

    name: str = doc("sweep", "shown in reports")
    seed: int = doc(0, "added to the seed of every member")
    base: Config = part(Config)
    rungs: tuple[Rung, ...] = doc((), "what is run and fitted")
    horizon: Horizon = part(Horizon)
    holdout_flops: float = doc(0.0, "budget of the held-out run; 0: none")
    holdout_shapes: tuple[Shape, ...] = doc((), "sizes it may take: the one nearest the prediction")
    estimator: Literal["approach1", "approach2", "approach3"] = doc(
        "approach1", "which fit predicts the held-out loss; named before anything runs"
    )
    vary: tuple[tuple[str, tuple[Any, ...]], ...] = doc(
        (), "(('optimizer.learning_rate', (1e-3, 2e-3)), …): each member once per combination"
    )
    halve: tuple[float, ...] = doc(
        (),
        "of members that differ in `vary` alone, the worse half ends at each of these shares of"
        " the steps, as (0.25, 0.5); the fit never sees them",
    )
    branches: bool = doc(
        False, "wsd: runs of one size and seed share their constant-rate part (trunk and branches)"
    )
    reuse: tuple[str, ...] = doc(
        (), "folders of runs: one that is the same computation on the same data is copied, not run"
    )
    sample_prompts: tuple[str, ...] = doc((), "continued by the best model when all is done")
    bootstrap: int = doc(1000, "resamples for the intervals")
    workers: int = doc(0, "processes; 0: one per core on CPU, one elsewhere")
    engine: Literal["local", "ray"] = doc(
        "local", "where members run: processes here, or a Ray cluster that shares the folder"
    )
    resources: tuple[tuple[str, float], ...] = doc(
        (("CPU", 1.0),), "ray: what one worker asks of a node, as (('TPU', 4.0),)"
    )
    population: Literal["auto", "on", "off"] = doc(
        "auto", "train members of one shape as one vmapped program; auto: not on CPU"
    )
    keep_checkpoints: Literal["best", "all", "none"] = doc(
        "best", "whose final checkpoints stay on disk when the sweep is done"
    )


_RANGES: Ranges = (
    (
        "at least 1",
        lambda x: x >= 1,
        "data.eval_sequences train.steps train.global_batch_size train.accumulation_steps"
        " train.steps_per_dispatch train.keep_checkpoints train.log_every",
    ),
    (
        "at least 0",
        lambda x: x >= 0,
        "optimizer.eps optimizer.weight_decay optimizer.grad_clip train.z_loss train.eval_every"
        " train.checkpoint_every train.sample_tokens train.task_items",
    ),
    ("at least 1", lambda x: x >= 1, "train.corruption.mean_span"),
    ("above 0", lambda x: x > 0, "data.max_epochs optimizer.learning_rate"),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, "train.corruption.rate"),
    ("above 0 and below 1", lambda x: 0 < x < 1, "data.eval_fraction"),
    (
        "at least 0 and below 1",
        lambda x: 0 <= x < 1,
        "optimizer.b1 optimizer.b2 optimizer.muon_momentum",
    ),
    (
        "between 0 and 1",
        lambda x: 0 <= x <= 1,
        "optimizer.warmup_fraction optimizer.decay_fraction optimizer.final_fraction",
    ),
)


def validate(config: Config, where: str = "config") -> Config:
    """`config`, its types checked and its numbers in range. Raises UserError, one line."""
    config = checked(config, where)
    o, t, need = config.optimizer, config.train, _needs(where)
    _in_range(config, _RANGES, need)
    validate_model(config.model, f"{where}.model")
    need(len(config.data.sources) > 0, "data.sources", (), "at least one source")
    need(
        o.schedule != "wsd" or o.warmup_fraction + o.decay_fraction <= 1 + 1e-9,
        "optimizer.decay_fraction",
        o.decay_fraction,
        f"at most 1 - warmup_fraction = {1 - o.warmup_fraction:g}",
    )
    _check_objective(config, need)
    n = config.tune.max_tokens
    need(n is None or n >= 2, "tune.max_tokens", n, "at least 2")
    rate = config.tune.dropout
    need(rate is None or 0 <= rate < 1, "tune.dropout", rate, "at least 0 and below 1")
    share = config.tune.teacher_share
    need(0 <= share <= 1, "tune.teacher_share", share, "between 0 and 1")
    whole = t.global_batch_size
    _divides("train.accumulation_steps", t.accumulation_steps, "global_batch_size", whole, need)
    _check_shards(t, need)
    k = t.steps_per_dispatch
    for name in ("eval_every", "checkpoint_every"):
        n = getattr(t, name)
        near = max(k, round(n / k) * k)
        expected = f"a multiple of steps_per_dispatch={k} (nearest: {near})"
        need(n % k == 0, f"train.{name}", n, expected)
    need(_profile_ok(t.profile), "train.profile", t.profile, "'START:STOP' with START < STOP")
    for name in t.track:
        known = ("tensorboard", "wandb", "trackio")
        need(name in known, "train.track", name, ", ".join(known))
    return config


def validate_model(m: ModelConfig, where: str = "config.model") -> ModelConfig:
    """What `validate` asks of a model, which need not be trained here. Raises UserError."""
    m, need = checked(m, where), _needs(where)
    _in_range(m, model_config.RANGES, need)
    if m.d_head is None:
        _divides("n_heads (d_head is not set)", m.n_heads, "d_model", m.d_model, need)
    _divides("n_kv_heads", m.kv_heads, "n_heads", m.n_heads, need)
    model_config.check_model(m, need)
    return m


def _needs(where: str) -> model_config.Need:
    def need(ok: bool, name: str, value: Any, expected: str) -> None:
        if not ok:
            raise UserError(f"{where}.{name}: expected {expected}, got {value!r}")

    return need


def _in_range(config: Any, ranges: Ranges, need: model_config.Need) -> None:
    for expected, ok, names in ranges:
        for name in names.split():
            value = functools.reduce(getattr, name.split("."), config)
            need(value is None or ok(value), name, value, expected)


def _divides(name: str, value: int, whole: str, n: int, need: model_config.Need) -> None:
    near = _nearest_divisor(n, value)
    need(near == value, name, value, f"a divisor of {whole}={n} (nearest: {near})")


def _check_objective(config: Config, need: Callable[..., None]) -> None:
    """The objective suits the architecture, and what it makes has room in it."""
    m, c, name = config.model, config.train.corruption, config.train.objective
    known = ", ".join(map(repr, OBJECTIVES[m.architecture]))
    own = ":" in name
    expected = f"{known} or own 'file.py:function' with architecture={m.architecture!r}"
    need(own or name in OBJECTIVES[m.architecture], "train.objective", name, expected)
    prefix = name == "prefix_lm" and m.architecture == "decoder"
    expected = f"{prefix} with train.objective={name!r}"
    ok = own or m.prefix_attention == prefix
    need(ok, "model.prefix_attention", m.prefix_attention, expected)
    masked = name == "masked_lm" or not c.whole_words
    need(masked, "train.corruption.whole_words", c.whole_words, "False but for 'masked_lm'")
    spans = {"span_corruption": [c.spans(m.seq_len)], "ul2": c.ul2_spans(m.seq_len)}
    longest = max((noise + n + 1 for noise, n in spans.get(name, [])), default=1)
    need(m.decoder_len >= longest, "model.target_len", m.decoder_len, f"at least {longest}")
    ids = c.special_ids(name, m.seq_len)
    need(m.vocab_size > ids, "model.vocab_size", m.vocab_size, f"more than {ids} special ids")
    inside = c.top_id is None or ids - 1 <= c.top_id < m.vocab_size
    expected = f"from {max(ids - 1, 0)} to {m.vocab_size - 1}"
    need(inside, "train.corruption.top_id", c.top_id, expected)


def _check_shards(t: TrainConfig, need: model_config.Need) -> None:
    n, rows = t.deterministic_reduce, t.global_batch_size
    near = max((k for k in (2**i for i in range(1, 17)) if rows % k == 0), default=0)
    expected = f"0, or a power of two from 2 on that divides global_batch_size={rows}"
    expected += f" (largest: {near})" if near else ""
    ok = n == 0 or (n > 1 and n & (n - 1) == 0 and rows % n == 0)
    need(ok, "train.deterministic_reduce", n, expected)
    expected = "1 with deterministic_reduce, whose virtual shards are micro-batches"
    k = t.accumulation_steps
    need(n == 0 or k == 1, "train.accumulation_steps", k, expected)


def _nearest_divisor(n: int, value: int) -> int:
    near = (d for step in range(value) for d in (value - step, value + step) if n % d == 0)
    return next(near)


def _profile_ok(text: str) -> bool:
    start, _, stop = text.partition(":")
    return not text or (start.isdigit() and stop.isdigit() and int(start) < int(stop))
