"""What is counted while serving, for Prometheus."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from jaxlm.serve.engine import Engine

ROUTES = ("/", "/healthz", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One registry per server; names as Prometheus wants them."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter(
            "jaxlm_requests", "answers by route and status", ["route", "status"], registry=own
        )
        self.generated = Counter("jaxlm_generated_tokens", "tokens said", ["model"], registry=own)
        self.prompt = Counter("jaxlm_prompt_tokens", "tokens asked", ["model"], registry=own)
        self.first_token = Histogram(
            "jaxlm_first_token_seconds", "from a request to its first token", ["model"],
            buckets=_SECONDS, registry=own,
        )  # fmt: skip
        self.whole = Histogram(
            "jaxlm_answer_seconds", "from a request to its last token", ["model"],
            buckets=_SECONDS, registry=own,
        )  # fmt: skip
        for name, about, read in (
            ("jaxlm_running_requests", "requests that have a row", lambda e: e.running),
            ("jaxlm_waiting_requests", "requests that wait for one", lambda e: e.waiting),
            ("jaxlm_prefix_reused_tokens", "of prompts, found in the cache",
             lambda e: e.slots.reused),
            ("jaxlm_prefix_read_tokens", "of prompts, computed", lambda e: e.slots.read),
        ):  # fmt: skip
            gauge = Gauge(name, about, ["model"], registry=own)
            for model, engine in engines.items():
                gauge.labels(model).set_function(functools.partial(read, engine))

    def answered(self, path: str, status: int) -> None:
        self.requests.labels(path if path in ROUTES else "other", status).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
