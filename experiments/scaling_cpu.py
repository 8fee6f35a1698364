"""A law from 16 small runs, held to a run of ten times their largest budget, on two CPU cores.

Command:  jaxlm sweep --config=experiments/scaling_cpu.py --workdir=runs/scaling_cpu
          (other text: --config.base.data.sources, as docs/results/scaling_cpu.md has it)
Data:     the Python code that every installation of jaxlm has: 50 M byte tokens, 0.4 epochs at most
Cost:     9.6e13 FLOPs, 40 min on one core (--config.workers=1) with another sweep on the second
Result:   the held-out loss within 0.8, 1.1 and 1.6 % of the prediction (seeds 0, 1, 2), of English
          text within 1.0, of Japanese 0.8 %, each inside its 95 % interval of ± 1.6 to 3.3 %:
          docs/results/scaling_cpu.md
"""

from jaxlm.config import (
    Config,
    DataConfig,
    Horizon,
    ModelConfig,
    OptimizerConfig,
    Rung,
    Shape,
    Sweep,
    TrainConfig,
)


def sizes(*widths: int) -> tuple[Shape, ...]:
    """Two layers and heads 16 wide throughout, so that sizes differ in width alone."""
    return tuple(Shape(d_model=width, n_layers=2) for width in widths)


def get_sweep() -> Sweep:
    base = Config(
        model=ModelConfig(
            d_model=32,
            n_layers=2,
            n_heads=2,
            vocab_size=256,
            seq_len=128,
            qk_norm=True,
            tie_embeddings=False,
            parametrization="mup",  # one learning rate for all widths
            base_d_model=32,
            scan_layers=False,
        ),
        data=DataConfig(
            sources=("stdlib", "libraries.py:code"), eval_sequences=2048, max_epochs=2.0
        ),
        optimizer=OptimizerConfig(name="muon", learning_rate=0.02, schedule="linear"),
        train=TrainConfig(
            global_batch_size=16,
            steps_per_dispatch=50,
            log_every=50,
            checkpoint_every=500,
            sample_tokens=96,
        ),
    )
    return Sweep(
        name="scaling_cpu",
        base=base,
        # With one batch and rate for all, the law bends: docs/results/scaling_cpu.md.
        horizon=Horizon(tokens=4.5e6, batch_power=0.5, rate_power=-0.3),
        rungs=(
            Rung(6e11, sizes(32, 48)),
            Rung(1.25e12, sizes(32, 48, 64), replicates=2),
            Rung(2.5e12, sizes(32, 48, 64, 96), replicates=2),
            Rung(5e12, sizes(48, 64, 80, 112, 144)),
        ),
        holdout_flops=5.2e13,
        holdout_shapes=sizes(112, 128, 144, 160, 176, 192, 208),
        estimator="approach3",
        sample_prompts=("def ", "import ", "class "),
    )
