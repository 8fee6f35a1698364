"""The chat page: one document without any outside resource."""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib import resources

from jaxlm.report.page import tokens_css


@functools.cache
def document() -> tuple[str, str]:
    """The page, and the policy that lets nothing but its own script and style run: by their
    hashes, so that the page is the same for everybody."""
    here = resources.files(__name__)
    style = tokens_css() + here.joinpath("page.css").read_text("utf-8")
    script = here.joinpath("words.js").read_text("utf-8")
    script += here.joinpath("page.js").read_text("utf-8")
    body = here.joinpath("page.html").read_text("utf-8")
    text = body.replace("/* STYLE */", style).replace("/* SCRIPT */", script)
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none';"
        f" style-src {_hash(style)}; script-src {_hash(script)}"
    )
    return text, policy


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
