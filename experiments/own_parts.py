"""All that a run may bring from outside: layer, objective, optimizer, schedule, data source.

Command:  jaxlm train --config=experiments/own_parts.py --workdir=runs/own_parts
          jaxlm generate --workdir=runs/own_parts --prompt='12 + 34 = ' --temperature=0
Cost:     38 CPU seconds on a busy machine.
Result:   1.62 bits per byte on held-out pages, from 8: the form, not yet addition. The numbers that
          are added are random and carry 1.0; the rest is what knowing the sums would save.

A part is named as 'file.py:name' and looked for beside the experiment file, then in the working
directory; here all of them are in the experiment file itself. docs/extending.md gives the contract
of each.
"""

import random
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxlm.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from jaxlm.data.documents import Document
from jaxlm.data.loader import Batch
from jaxlm.model import transformer
from jaxlm.model.layers import Attention, Cache, Context, FeedForward, Norm
from jaxlm.train.optimizer import Hyper


class ParallelBlock(nnx.Module):
    """Attention and feed-forward side by side: x + attention(norm(x)) + feed_forward(norm(x)).

    As in GPT-J (Wang and Komatsuzaki 2021)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.norm = Norm(config.d_model, "d_model", config, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)

    def __call__(
        self, x_btd: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        y_btd = self.norm(x_btd)
        a_btd, cache = self.attention(y_btd, context, cache)
        return x_btd + a_btd + self.feed_forward(y_btd), cache


def focal(
    config: Config, params: transformer.Params, batch: Batch, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Σ (1 - p) · -log p over the batch's weights: what is already known counts less (Lin et al.
    2017, eq. 4 with γ = 1). Also logs the plain loss, as `train/nll`."""
    logits_btv = transformer.apply(
        config.model, params, batch.tokens, batch.positions, batch.segment_ids
    )
    hit_btv = batch.targets[..., None] == jnp.arange(logits_btv.shape[-1])
    log_p_bt = jnp.sum(jnp.where(hit_btv, jax.nn.log_softmax(logits_btv), 0.0), axis=-1)
    loss_bt = -(1.0 - jnp.exp(log_p_bt)) * log_p_bt
    return jnp.sum(loss_bt * batch.weights), {"train/nll": -jnp.sum(log_p_bt * batch.weights)}


def lion(config: Config) -> optax.GradientTransformation:
    """The sign of a momentum (Chen et al. 2023). Clipping, decay and the step come around it."""
    return optax.scale_by_lion(b1=config.optimizer.b1, b2=0.99)


def one_minus_sqrt(done: jax.Array, hyper: Hyper) -> jax.Array:
    """Learning rate as 1 - √done after the warm-up (Hägele et al. 2024, eq. 1)."""
    return 1.0 - jnp.sqrt(done)


def sums(documents: int = 4000) -> Iterator[Document]:
    """Pages of additions of two-digit numbers, the same at each call."""
    draw = random.Random(0)
    for i in range(documents):
        pairs = [(draw.randrange(100), draw.randrange(100)) for _ in range(16)]
        text = "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs)
        yield Document(text, path=f"sums:{i}", text_licence="CC0-1.0")


def get_config() -> Config:
    return Config(
        name="own_parts",
        model=ModelConfig(
            d_model=64, n_layers=2, n_heads=4, seq_len=64, layer="own_parts.py:ParallelBlock"
        ),
        data=DataConfig(sources=("own_parts.py:sums",), eval_sequences=128),
        optimizer=OptimizerConfig(
            name="own_parts.py:lion",
            schedule="own_parts.py:one_minus_sqrt",
            learning_rate=1e-3,
            b1=0.9,
        ),
        train=TrainConfig(
            objective="own_parts.py:focal",
            steps=600,
            global_batch_size=16,
            steps_per_dispatch=10,
            eval_every=200,
            checkpoint_every=200,
            probes=("12 + 34 = ",),
        ),
    )
