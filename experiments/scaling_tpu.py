"""A law for a pod slice: 22 runs at four budgets, and a held-out run of ten times the largest.

Command:  jaxlm sweep --config=experiments/scaling_tpu.py --workdir=gs://bucket/scaling_tpu
Data:     FineWeb's parquet files (ODC-By-1.0) in fineweb/; the longest run reads 23 B tokens of it
Bill:     jaxlm plan --config=experiments/scaling_tpu.py --topology=v5e:16x16 --price=1.2
          7.5 hours and 2,290 USD at 40 % MFU, of which the held-out run 4.3 hours and 1,310 USD;
          trunks save 18 % of the rest, which is not taken off. Planned, not run.
"""

from jaxlm.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    Rung,
    Shape,
    Sweep,
    TrainConfig,
)
from jaxlm.scaling.ladder import dial


def sizes(*depths: int) -> tuple[Shape, ...]:
    """Depth is the dial: 64 wide per layer, heads of 128."""
    return dial(depths, aspect=64, head_dim=128)


def get_sweep() -> Sweep:
    base = Config(
        model=ModelConfig(
            d_model=512,
            n_layers=8,
            n_heads=4,
            d_head=128,
            vocab_size=32768,
            seq_len=2048,
            qk_norm=True,
            remat="full",  # the largest candidate does not fit a chip of v5e without
            tie_embeddings=False,
            parametrization="completep",  # one learning rate for all widths and depths
            base_d_model=512,
            base_n_layers=8,
        ),
        data=DataConfig(
            sources=("fineweb/*.parquet",),
            licence="ODC-By-1.0",
            tokenizer="bpe",
            eval_fraction=0.002,
            eval_sequences=4096,
        ),
        optimizer=OptimizerConfig(learning_rate=4e-3, schedule="wsd", decay_fraction=0.2),
        train=TrainConfig(
            global_batch_size=256,
            steps_per_dispatch=10,
            log_every=50,
            checkpoint_every=500,
        ),
        mesh=MeshConfig(data=-1, fsdp=16),
    )
    return Sweep(
        name="scaling_tpu",
        base=base,
        rungs=(
            Rung(1e18, sizes(8, 10, 12, 14), replicates=3),
            Rung(3e18, sizes(10, 12, 14, 16), replicates=2),
            Rung(1e19, sizes(12, 14, 16, 18, 20), replicates=2),
            Rung(3e19, sizes(14, 16, 18, 20, 24)),
        ),
        holdout_flops=3.1e20,
        holdout_shapes=sizes(24, 26, 28, 30, 32, 34, 36),
        estimator="approach3",
        branches=True,  # one constant-rate trunk per size
        sample_prompts=("The ", "In ", "def "),
    )
