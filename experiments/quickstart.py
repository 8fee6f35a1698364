"""A scaling law measured on this machine, from the text that every Python carries.

Command:  jaxlm quickstart     (= jaxlm sweep --config=experiments/quickstart.py
                                  --workdir=runs/quickstart)
"""

from jaxlm.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Rung,
    Shape,
    Sweep,
    TrainConfig,
)

# d_model, n_layers; heads are 8 wide throughout, so that sizes differ in nothing else.
XS, S, M, L, XL = Shape(24, 2), Shape(32, 2), Shape(48, 2), Shape(64, 2), Shape(64, 3)


def get_sweep() -> Sweep:
    base = Config(
        model=ModelConfig(
            d_model=32,
            n_layers=2,
            n_heads=4,
            vocab_size=256,
            seq_len=128,
            qk_norm=True,
            tie_embeddings=False,
            parametrization="mup",  # one learning rate for all widths
            base_d_model=32,
            scan_layers=False,
        ),
        data=DataConfig(sources=("stdlib",), licence="PSF-2.0", eval_sequences=1024),
        optimizer=OptimizerConfig(learning_rate=1.2e-2, schedule="wsd", decay_fraction=0.3),
        train=TrainConfig(
            global_batch_size=4,
            steps_per_dispatch=50,
            log_every=50,
            checkpoint_every=1000,
            sample_tokens=96,
        ),
    )
    return Sweep(
        name="quickstart",
        base=base,
        rungs=(
            Rung(1.7e11, (XS, S, M)),
            Rung(3e11, (XS, S, M, L), replicates=3),
            Rung(5.2e11, (XS, S, M, L)),
            Rung(9e11, (S, M, L, XL)),
        ),
        holdout_flops=3.7e12,
        holdout_shapes=(L, XL, Shape(80, 3), Shape(96, 3)),
        estimator="approach3",
        sample_prompts=("def ", "import ", "The "),
    )
