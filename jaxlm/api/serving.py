"""Models that answer: over HTTP (`serve`), in a terminal (`chat`)."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.api.weights import from_pretrained
from jaxlm.data.extras import library
from jaxlm.schema import UserError, from_dict

if TYPE_CHECKING:
    from jaxlm.serve.documents import Documents

CONTEXT = 2048  # tokens, unless the model was trained on fewer


def serve(
    models: Mapping[str, str | Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str = "",
    names: Collection[str] = (),
    rows: int = 8,
    context: int | None = None,
    queue: int = 64,
    grace_s: float = 30.0,
    documents: str | Path | None = None,
    embedder: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Serves `models` (name → what `from_pretrained` takes) until SIGTERM or Ctrl-C, with OpenAI's
    interface. Each answers `rows` requests at a time, of at most `context` tokens,
    while `queue` more wait. With `documents`, a folder, answers in a conversation come from its
    passages that `embedder` (as `from_pretrained` takes it) finds near to the question. Returns
    128 + the signal's number.

    Raises UserError for a model that cannot be served and, without a `token`, for a `host` that
    other machines reach. `names` are those that the server is asked under besides localhost.
    """
    for module in ("starlette", "uvicorn", "prometheus_client"):
        library(module, "serve")
    from jaxlm.serve import engine, server
    from jaxlm.serve.service import Service, served

    if not models:
        raise UserError("--model: expected at least one, as in --model=mine=runs/mine")
    with server.listen(host, port, token) as sock:
        held = _documents(documents, embedder, say)
        found = {}
        for name, source in models.items():
            model = from_pretrained(source)
            most = context or min(CONTEXT, model.config.seq_len)
            one = engine.Engine(model, rows, most, queue)
            seconds = engine.warm(one)
            say(f"{name}: {source}, a context of {one.context} tokens, ready in {seconds:.1f} s")
            found[name] = served(one, held)
        shown = f"[{host}]" if ":" in host else host
        say(f"serving at http://{shown}:{sock.getsockname()[1]}/")
        return server.serve(
            Service(found), sock, names=[*names, host], token=token, grace_s=grace_s
        )


def chat(
    source: str | Path,
    name: str,
    *,
    system: str = "",
    context: int | None = None,
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
    temperature: float = 0.8,
    seed: int | None = None,
    rows: bool = False,
    documents: str | Path | None = None,
    embedder: str | Path | None = None,
    say: Callable[[str], None] = print,
    **sampling: Any,
) -> None:
    """A conversation with what `from_pretrained(source)` gives, called `name`, on stdin and stdout,
    until stdin ends; `rows` makes answers JSON. Without a `seed` each time is another. `sampling`
    are further fields of `Sampling`, `documents` and `embedder` as `serve` has them.

    Raises UserError for a model that cannot answer and, where nobody types, for such a turn.
    """
    from jaxlm.generate.sampling import Sampling, validate
    from jaxlm.serve.talk import Talk
    from jaxlm.serve.terminal import Terminal

    seed = secrets.randbits(31) if seed is None else seed
    drawn = {"temperature": temperature, "seed": seed, **sampling}
    model = from_pretrained(source)
    how = validate(from_dict(Sampling, drawn, "sampling"), model.config.vocab_size)
    most = context or min(CONTEXT, model.config.seq_len)
    held = _documents(documents, embedder, say)
    talk = Talk(model, most, max_new_tokens, how, stop, system, held)
    say(f"{name}: {source}, a context of {talk.slots.context} tokens; /help lists commands")
    Terminal(talk, name, rows).run()


def _documents(
    folder: str | Path | None, embedder: str | Path | None, say: Callable[[str], None]
) -> Documents | None:
    if folder is None and embedder is None:
        return None
    if folder is None or embedder is None:
        raise UserError("--documents, --embedder: expected both or none of them")
    from jaxlm.serve.documents import Documents

    found = Documents(Path(folder), from_pretrained(embedder).embed)
    say(f"{folder}: {len(found.passages)} passages")
    return found
