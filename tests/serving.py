"""A small model that is served, in a thread of the test's own process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxlm import mesh
from jaxlm.config import Config, ModelConfig
from jaxlm.data.chat import ChatTemplate
from jaxlm.data.tokenizer import Subword
from jaxlm.language_model import LanguageModel
from jaxlm.model import transformer
from jaxlm.serve import server
from jaxlm.serve.engine import Engine
from jaxlm.serve.service import Served, Service, served

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>",
)  # fmt: skip
CONTEXT = 200


def words(ascii_only: bool = False, more: Sequence[str] = ()) -> Subword:
    """One token a byte, and one for each of `more`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    known = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = [c for c in known if c < "\x7f" or c == "Ġ" or not ascii_only]
    letters = {c: i for i, c in enumerate(known)}
    inner = Tokenizer(models.BPE(letters, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    inner.add_tokens([AddedToken(text, normalized=False) for text in more])
    return Subword(inner, "<|endoftext|>")


def model(seed: int = 0, more: Sequence[str] = ()) -> LanguageModel:
    """Random weights; it knows printable ASCII alone, so that texts tell answers apart."""
    tokenizer = words(True, more)
    config = ModelConfig(
        d_model=16, n_layers=2, n_heads=2, d_ff=32, vocab_size=tokenizer.vocab_size, seq_len=64,
        tie_embeddings=False,
    )  # fmt: skip
    on = mesh.make(Config(model=config), jax.devices()[:1])
    rng = np.random.default_rng(seed)

    def draw(row: Any) -> jax.Array:
        w = rng.normal(row.role == "gain", 0.6, row.shape).astype(np.float32)
        return jax.device_put(w, jax.NamedSharding(jax.sharding.get_mesh(), row.spec))

    with jax.set_mesh(on):
        params = jax.tree.map(draw, transformer.table(config))
    return LanguageModel(tokenizer, config, params, on, chat=ChatTemplate(CHATML))


@contextlib.contextmanager
def serving(
    models: dict[str, Served], *, token: str = "", grace_s: float = 5.0
) -> Iterator[tuple[str, server.Server]]:
    """The URL of a server that really listens, and the server; it is drained afterwards."""
    service = Service(models)
    ready: list[server.Server] = []
    with server.listen("127.0.0.1", 0, token) as sock:
        how: dict[str, Any] = {"token": token, "grace_s": grace_s, "started": ready.append}
        thread = threading.Thread(target=server.serve, args=(service, sock), kwargs=how)
        thread.start()
        try:
            while not (ready and ready[0].started):
                time.sleep(0.01)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}", ready[0]
        finally:
            if thread.is_alive():
                stop(ready[0])
            thread.join(timeout=30)
            assert not thread.is_alive()


def stop(running: server.Server) -> None:
    """As a signal does."""
    running.loop.call_soon_threadsafe(running.stop)


def of(model: LanguageModel, rows: int = 4, queue: int = 64) -> Served:
    return served(Engine(model, rows, CONTEXT, queue))
