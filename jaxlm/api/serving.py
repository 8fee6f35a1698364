"""Models that answer over HTTP: `serve`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from jaxlm.api.weights import from_pretrained
from jaxlm.data.extras import library
from jaxlm.schema import UserError

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
    say: Callable[[str], None] = print,
) -> int:
    """Serves `models` (name → what `from_pretrained` takes) until SIGTERM or Ctrl-C, with OpenAI's
    interface. Each answers `rows` requests at a time, of at most `context` tokens,
    while `queue` more wait. Returns 128 + the signal's number.

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
        found = {}
        for name, source in models.items():
            model = from_pretrained(source)
            most = context or min(CONTEXT, model.config.seq_len)
            one = engine.Engine(model, rows, most, queue)
            seconds = engine.warm(one)
            say(f"{name}: {source}, a context of {one.context} tokens, ready in {seconds:.1f} s")
            found[name] = served(one)
        shown = f"[{host}]" if ":" in host else host
        say(f"serving at http://{shown}:{sock.getsockname()[1]}/")
        return server.serve(
            Service(found), sock, names=[*names, host], token=token, grace_s=grace_s
        )
