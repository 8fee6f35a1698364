"""GPT-3 175B: the file a pod would run; `--config.mesh` says how the chips are used.

Command:  jaxlm train --config=experiments/gpt3_175b.py --workdir=runs/gpt3_175b \\
              --config.data.sources=my_text/ --config.data.licence=CC-BY-4.0
Recipe:   Brown et al. 2020, table 2.1, for this size; 94,000 steps of 3.2 M tokens = 300 B tokens.
"""

from dataclasses import replace

from jaxlm.config import Config, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from jaxlm.model.presets import preset


def get_config() -> Config:
    return Config(
        name="gpt3_175b",
        model=replace(preset("gpt3-175b"), vocab_size=50304, remat="full"),
        data=DataConfig(sources=("stdlib",), tokenizer="bpe"),
        optimizer=OptimizerConfig(
            learning_rate=0.6e-4, schedule="cosine", warmup_fraction=0.001, final_fraction=0.1
        ),
        train=TrainConfig(
            steps=94_000,
            global_batch_size=1536,
            eval_every=5000,
            checkpoint_every=1000,
            sample_prompts=("The ",),
        ),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=8),
    )
