"""GPT-2 124m from scratch on your own text, byte-level BPE trained on it.

Command:  jaxlm train --config=experiments/gpt2_124m.py --workdir=runs/gpt2_124m \\
              --config.data.sources=my_text/ --config.data.licence=CC-BY-4.0
Others:   preset("gpt2-355m") … "gpt2-1558m", "gpt3-125m" … "gpt3-175b" (model/presets.py).
Recipe:   Brown et al. 2020, table 2.1, for this size; 300,000 steps of 0.5 M tokens on a pod.
"""

from jaxlm.config import Config, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from jaxlm.model.presets import preset


def get_config() -> Config:
    return Config(
        name="gpt2_124m",
        model=preset("gpt2-124m"),
        data=DataConfig(sources=("stdlib",), tokenizer="bpe"),
        optimizer=OptimizerConfig(
            learning_rate=6e-4, schedule="cosine", warmup_fraction=0.001, final_fraction=0.1
        ),
        train=TrainConfig(
            steps=300_000,
            global_batch_size=512,
            eval_every=5000,
            checkpoint_every=1000,
            sample_prompts=("The ",),
        ),
        mesh=MeshConfig(data=-1),
    )
