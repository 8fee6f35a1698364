"""A language model of Japanese, against a general compressor, on three Debian packages.

Data:     apt-get download libreoffice-help-ja debian-reference-ja debian-handbook
          (MPL-2.0; GPL-2.0-or-later; GPL-2.0-or-later OR CC-BY-SA-3.0), needs jaxlm[data]
Command:  jaxlm train --config=experiments/japanese_model.py --workdir=runs/japanese
Cost:     307,200 tokens, 5.4e12 FLOPs: 10 minutes of one core among others at work.
Result:   1.759 bits per byte on the held-out 353 kB (seed 0). `xz -9` of that text alone: 1.938.
          With the training text before it, xz -9 (256 MB window) takes 1.324: what it copies, so
          short a training has not learnt.
"""

from jaxlm.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        name="japanese",
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
                "libreoffice-help-ja_*.deb!*.html",
                "debian-reference-ja_*.deb!*.txt.gz",
                "debian-handbook_*.deb!*/html/ja-JP/*",
            ),
            tokenizer="bpe",
            max_epochs=4.0,
        ),
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-2, schedule="linear"),
        train=TrainConfig(
            steps=150,
            global_batch_size=8,
            steps_per_dispatch=10,
            log_every=10,
            eval_every=50,
            checkpoint_every=150,
            sample_prompts=("これは", "このコマンドは"),
        ),
    )
