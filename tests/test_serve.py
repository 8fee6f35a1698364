"""`jaxlm serve` through OpenAI's own client and through sockets: answers, limits, who may ask, and
that nobody's request harms another's."""

from __future__ import annotations

import asyncio
import functools
import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jax
import numpy as np
import pytest
import small

from jaxlm import api, from_pretrained
from jaxlm.config import (
    Config,
    Corruption,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from jaxlm.generate import constrained, written
from jaxlm.generate.sampling import Sampling
from jaxlm.generate.slots import Request, Slots
from jaxlm.language_model import LanguageModel
from jaxlm.schema import UserError

openai = pytest.importorskip("openai")
for module in ("uvicorn", "starlette", "prometheus_client", "jinja2"):
    pytest.importorskip(module)

import serving  # noqa: E402

from jaxlm.serve import engine, guard, protocol, server  # noqa: E402
from jaxlm.serve.protocol import Chat, Completion  # noqa: E402
from jaxlm.serve.writer import Writer  # noqa: E402

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model() -> Iterator[LanguageModel]:
    with small.compiled_quickly():
        yield serving.model()


@pytest.fixture(scope="module")
def url(model: LanguageModel) -> Iterator[str]:
    with serving.serving({"tiny": serving.of(model)}) as (url, _):
        yield url


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", timeout=60) as client:
        yield client


def greedy(model: LanguageModel, prompt: str, n: int) -> str:
    """Alone, by the loop that `jaxlm generate` runs."""
    how: dict[str, Any] = {"max_new_tokens": n, "temperature": 0.0, "return_full_text": False}
    return model.generate(prompt, **how)[0][0]


def raw(url: str, method: str = "GET", path: str = "/v1/models", body: Any = None, **headers: str):
    """Status, headers and body of one request; `Content_Type="…"` is a header."""
    to = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    given = {"Content-Type": "application/json"} if body is not None else {}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    to.request(method, path, sent, given)
    answer = to.getresponse()
    found = answer.status, answer.headers, answer.read()
    to.close()
    return found


# ------------------------------------------------------------------------------ OpenAI's own client


def test_the_official_client_completes_and_chats(client: Any, model: LanguageModel) -> None:
    [card] = client.models.list().data
    assert card.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    found = client.completions.create(model="tiny", prompt="abc", max_tokens=12, temperature=0)
    assert found.choices[0].text == greedy(model, "abc", 12)
    assert found.choices[0].finish_reason == "length"
    assert found.usage.prompt_tokens == 3 and found.usage.completion_tokens == 12
    many = client.completions.create(
        model="tiny", prompt=["abc", "xyz"], max_tokens=4, temperature=0, n=2, echo=True
    )
    texts = [prompt + greedy(model, prompt, 4) for prompt in ("abc", "abc", "xyz", "xyz")]
    assert [c.text for c in many.choices] == texts and [c.index for c in many.choices] == [
        *range(4)
    ]
    same = client.completions.create(
        model="tiny", prompt=[67, 68], max_tokens=3, temperature=0, logit_bias={"40": 100}
    )
    assert same.choices[0].text == model.tokenizer.decode([40]) * 3
    asked = model.chat.text(TALK, ask=True)
    ids = model.tokenizer.inner.encode(asked, add_special_tokens=False).ids
    assert model.tokenizer.inner.token_to_id("<|im_start|>") not in ids  # its setting is put back
    answer = client.chat.completions.create(
        model="tiny", messages=TALK, max_completion_tokens=9, temperature=0
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "".join(streamed(client, temperature=0)[0])


def streamed(client: Any, **how: Any) -> tuple[list[str], list[Any]]:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=TALK, max_tokens=9, stream=True, **how,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    return pieces, chunks


def test_streams_say_the_same_and_what_it_cost(client: Any, model: LanguageModel) -> None:
    pieces, chunks = streamed(client, temperature=0)
    assert len([p for p in pieces if p]) > 1  # not in one go
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]].count("length") == 1
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 9
    one, two, three = (streamed(client, temperature=1.2, seed=s)[0] for s in (1, 1, 2))
    assert one == two != three
    stream = client.completions.create(
        model="tiny", prompt="abc", max_tokens=12, temperature=0, stream=True
    )
    assert "".join(c.choices[0].text for c in stream) == greedy(model, "abc", 12)


def test_log_probabilities_are_the_models(client: Any, model: LanguageModel) -> None:
    names = model.tokenizer.inner.token_to_id
    never = {str(names(name)): -100 for name in serving.SPECIAL}  # which no text is read as
    found = client.completions.create(
        model="tiny", prompt="abc", max_tokens=5, temperature=0, logprobs=3, logit_bias=never
    ).choices[0]
    text, seen = found.text, found.logprobs
    assert "".join(seen.tokens) == text and seen.text_offset == [0, 1, 2, 3, 4]
    want = model.score(text, given="abc")[0].log_probability
    assert sum(seen.token_logprobs) == pytest.approx(want, abs=1e-3)
    assert all(len(top) == 3 for top in seen.top_logprobs)
    talk = client.chat.completions.create(
        model="tiny",
        messages=TALK,
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        logit_bias=never,
    ).choices[0]
    rows = talk.logprobs.content
    assert "".join(r.token for r in rows) == talk.message.content
    assert all(len(r.top_logprobs) == 2 and bytes(r.bytes).decode() == r.token for r in rows)


def test_answers_end_before_stop_strings(client: Any, model: LanguageModel) -> None:
    whole = greedy(model, "abc", 12)
    stop = whole[4:7]
    want = written.until(whole, [stop])
    how = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "temperature": 0, "stop": [stop]}
    found = client.completions.create(**how).choices[0]
    assert (found.text, found.finish_reason) == (want, "stop")
    stream = client.completions.create(**how, stream=True)
    assert "".join(c.choices[0].text for c in stream) == want


@pytest.mark.parametrize("seed", range(20))
def test_text_comes_in_whole_characters_and_is_never_taken_back(seed: int) -> None:
    rng, words = np.random.default_rng(seed), serving.words()
    text = "".join(rng.choice(list("aé日本🙂 \n<|>"), 30))
    ids = words.encode(text)
    ids = ids if seed % 2 else rng.integers(0, words.vocab_size, 60)  # bytes that are no text, too
    cut = int(rng.integers(1, 12))
    stops = [] if seed % 3 else ["本<", text[15:18]]
    writer, pieces = Writer(words, ids[:cut], stops), []
    for i in ids[cut:]:
        pieces.append(writer.add(int(i)))
        if writer.stopped:
            break
    pieces += [] if writer.stopped else [writer.rest()]
    whole = words.decode(ids)[len(words.decode(ids[:cut])) :]
    if seed % 2 and "\N{REPLACEMENT CHARACTER}" not in words.decode(ids[:cut]):
        assert "".join(pieces) == written.until(whole, stops)
        assert not any("\N{REPLACEMENT CHARACTER}" in p for p in pieces)
    assert not any(stop in "".join(pieces) for stop in stops)


def test_the_middle_is_asked_for_with_the_tokens_for_it(client: Any, model: LanguageModel) -> None:
    inner = model.tokenizer.inner
    pre, suf, mid = (inner.token_to_id(f"<|fim_{n}|>") for n in ("prefix", "suffix", "middle"))
    a, b = model.tokenizer.encode("de").tolist(), model.tokenizer.encode("fg").tolist()
    how = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    by_ids = client.completions.create(prompt=[pre, *a, suf, *b, mid], **how).choices[0].text
    assert client.completions.create(prompt="de", suffix="fg", **how).choices[0].text == by_ids


@pytest.mark.slow  # 50 s
def test_a_run_that_learned_to_fill_in_fills_in(tmp_path: Path) -> None:
    """The letters of the alphabet that stand between two others."""
    (tmp_path / "text").mkdir()
    abc = "abcdefghijklmnopqrstuvwxyz" * 3
    for i in range(400):
        (tmp_path / "text" / f"{i:03}.txt").write_text(abc[i % 26 :][: 10 + i % 17])
    config = Config(
        model=ModelConfig(d_model=64, n_layers=2, n_heads=4, vocab_size=259, seq_len=64),
        data=DataConfig(sources=(str(tmp_path / "text"),), eval_fraction=0.1, max_epochs=1000),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        train=TrainConfig(steps=600, objective="fill_in_the_middle", steps_per_dispatch=50,
                          corruption=Corruption(rate=0.9)),
    )  # fmt: skip
    api.train(config, tmp_path / "run")
    model = from_pretrained(tmp_path / "run")
    assert model.infill == (258, 257, 256)
    with (
        serving.serving({"abc": serving.of(model)}) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", timeout=60) as client,
    ):
        how: dict[str, Any] = {"model": "abc", "max_tokens": 12, "temperature": 0}
        pairs = [("cdef", "jklm"), ("uvwx", "bcde"), ("hijklm", "pqrs"), ("abc", "ghi")]
        said = [client.completions.create(prompt=a, suffix=b, **how).choices[0] for a, b in pairs]
        assert [c.text for c in said] == ["ghi", "yza", "no", "def"]
        assert {c.finish_reason for c in said} == {"stop"}


CITY = {
    "type": "object",
    "properties": {"name": {"enum": ["Oslo", "Rome"]}, "size": {"type": "integer", "maximum": 99}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


def test_answers_keep_the_form_that_is_asked_for(client: Any, model: LanguageModel) -> None:
    pytest.importorskip("llguidance", reason="needs the extra constrain")
    ask = functools.partial(client.chat.completions.create, model="tiny", messages=TALK)
    stated = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    for seed in range(3):
        said = ask(response_format=stated, seed=seed, max_tokens=60).choices[0]
        found = json.loads(said.message.content)
        assert found.keys() == {"name", "size"} and found["name"] in ("Oslo", "Rome")
        assert type(found["size"]) is int and found["size"] <= 99 and said.finish_reason == "stop"
    closes = {str(model.tokenizer.encode("}")[0]): 100}
    said = ask(response_format={"type": "json_object"}, logit_bias=closes, max_tokens=60)
    assert json.loads(said.choices[0].message.content) == {}
    text = {"response_format": {"type": "text"}}
    plain = [ask(temperature=0, max_tokens=8, **more) for more in ({}, text)]
    assert plain[0].choices[0].message.content == plain[1].choices[0].message.content
    held = {"regex": "[a-f]{3,9}[0-4]?"}
    said = client.completions.create(model="tiny", prompt="abc", max_tokens=40, extra_body=held)
    assert re.fullmatch(held["regex"], said.choices[0].text)
    asked = protocol.read(b'{"model": "tiny", "typical_p": 0.4}', Completion)
    assert asked.sampling.typical_p == 0.4


def test_a_form_holds_its_own_row_only(model: LanguageModel) -> None:
    pytest.importorskip("llguidance", reason="needs the extra constrain")
    words, v = model.tokenizer, model.config.vocab_size
    grammar = constrained.grammar(regex="[0-9]{30}")
    held = constrained.matcher(words, v, grammar)
    prompt = words.encode("abc")
    ways = [Sampling(0.0), Sampling(1.3, seed=2), Sampling(1.3, top_k=9, seed=2)]
    plain = [Request(prompt, 30, how) for how in ways]

    def said(requests: list[Request]) -> list[list[int]]:
        with jax.set_mesh(model.mesh):
            slots = Slots(model.config, model.params, 4, serving.CONTEXT)
        rows = [slots.join(request) for request in requests]
        found: dict[int, list[int]] = {row: [] for row in rows}
        while slots.free < slots.n:
            for token in slots.step():
                found[token.row].append(token.id)
        return [found[row] for row in rows]

    alone = said(plain)
    *beside, digits = said([*plain, Request(prompt, 40, Sampling(0.0), matcher=held)])
    assert beside == alone and re.fullmatch("[0-9]{30}", words.decode(digits))
    assert not held.is_stopped()  # the next request begins at its beginning, too


# ---------------------------------------------------------------------------------- what is refused


SAYS: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 2}


@pytest.mark.parametrize(
    ("body", "status", "names"),
    [
        (b"{", 400, "JSON"),
        (b"[" * 100_000, 400, "nested"),
        (b'{"model": "tiny", "temperature": NaN}', 400, "NaN"),
        (b"\xff\xfe", 400, "JSON"),
        ([1], 400, "object"),
        ({**SAYS, "model": "tony"}, 404, "did you mean 'tiny'"),
        ({"prompt": "a"}, 400, "model: missing"),
        ({**SAYS, "temprature": 1}, 400, "did you mean 'temperature'"),
        ({**SAYS, "best_of": 2}, 400, "best_of: not supported"),
        ({**SAYS, "prompt": "\ud800"}, 400, "surrogate"),
        ({**SAYS, "prompt": ""}, 400, "at least one token"),
        ({**SAYS, "prompt": [[1, 2], "a"]}, 400, "prompt"),
        ({**SAYS, "prompt": [999_999]}, 400, "prompt"),
        ({**SAYS, "prompt": "a" * 400}, 400, "context"),
        ({**SAYS, "max_tokens": 0}, 400, "max_new_tokens"),
        ({**SAYS, "max_tokens": 10**9}, 400, "context"),
        ({**SAYS, "n": 17}, 400, "n: expected 1"),
        ({**SAYS, "temperature": -1}, 400, "temperature"),
        (b'{"model": "tiny", "prompt": "a", "temperature": 1e400}', 400, "temperature"),
        (b'{"model": "tiny", "prompt": "a", "temperature": Infinity}', 400, "Infinity"),
        ({**SAYS, "temperature": "hot"}, 400, "temperature"),
        ({**SAYS, "top_p": 0}, 400, "top_p"),
        ({**SAYS, "logprobs": 21}, 400, "logprobs"),
        ({**SAYS, "logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({**SAYS, "logit_bias": {"99999": 1}}, 400, "logit_bias"),
        ({**SAYS, "stop": [""]}, 400, "stop"),
        ({**SAYS, "regex": "(a"}, 400, "regex: "),
        ({**SAYS, "typical_p": 0}, 400, "typical_p"),
        ({**SAYS, "stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({**SAYS, "prompt": "x" * (1 << 20)}, 413, "longer than"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    url: str, body: Any, status: int, names: str
) -> None:
    found, _, told = raw(url, "POST", "/v1/completions", body)
    assert found == status, told
    assert names in json.loads(told)["error"]["message"]


def test_conversations_are_checked(url: str) -> None:
    for messages, names in (
        ([], "at least one message"),
        ([{"role": "user"}], "messages[0]: expected role and content"),
        ([{"role": "tool", "content": "a"}], "messages[0].role"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "only parts of type 'text'"),
        ([{"role": "user", "content": "a", "tool_calls": [1]}], "tool_calls: not supported"),
    ):
        body = {"model": "tiny", "messages": messages}
        status, _, told = raw(url, "POST", "/v1/chat/completions", body)
        assert status == 400 and names in json.loads(told)["error"]["message"], told
    for form, names in (
        ("json", "response_format.type: expected text, json_object"),
        ({"type": "grammar"}, "got 'grammar'"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "json_schema.schema: expected"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "town"}}}, "json_schema: "),
        ({"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, "json_schema: "),
    ):
        body = {"model": "tiny", "messages": TALK, "response_format": form}
        status, _, told = raw(url, "POST", "/v1/chat/completions", body)
        message = json.loads(told)["error"]["message"]
        assert status == 400 and names in message and "\n" not in message, told
    body = {"model": "tiny", "messages": TALK, "max_completion_tokens": 0}
    status, _, told = raw(url, "POST", "/v1/chat/completions", body)
    assert status == 400 and "expected" in json.loads(told)["error"]["message"], told
    with pytest.raises(UserError, match="tools: not supported"):
        protocol.read(b'{"model": "x", "messages": [], "tools": [{}]}', Chat)
    with pytest.raises(UserError, match="logprobs"):
        protocol.read(b'{"model": "x", "logprobs": true}', Completion)


def test_other_pages_may_not_ask(url: str) -> None:
    port = urlsplit(url).port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "192.168.0.7"):
        assert raw(url, Host=host)[0] == 200
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost.",
        "",
    ):
        assert raw(url, Host=host)[0] == 421, host  # DNS rebinding
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "https://localhost"):
        status, headers, _ = raw(url, "POST", "/v1/completions", SAYS, Origin=origin)
        assert status == 403 and "Access-Control-Allow-Origin" not in headers, origin
        assert raw(url, "OPTIONS", "/v1/completions", Origin=origin)[0] == 403
    assert raw(url, "POST", "/v1/completions", SAYS, Origin=url)[0] == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):  # sent without asking
        assert raw(url, "POST", "/v1/completions", SAYS, Content_Type=kind)[0] == 415
    headers = raw(url)[1]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in headers["Content-Security-Policy"]


def test_other_machines_need_the_token(model: LanguageModel) -> None:
    for host in ("0.0.0.0", "::", "192.168.0.1"):
        with pytest.raises(UserError, match="set a token"):
            server.listen(host, 0, "")
    server.listen("0.0.0.0", 0, "secret").close()
    assert guard.is_loopback("127.0.0.2") and guard.is_loopback("::1")
    with serving.serving({"tiny": serving.of(model)}, token="sécret") as (url, _):
        assert raw(url)[0] == 401
        assert raw(url, "POST", "/v1/completions", SAYS, Authorization="Bearer wrong")[0] == 401
        assert raw(url, "GET", "/metrics")[0] == 401
        assert raw(url, "GET", "/healthz")[0] == 200
        good = "Bearer sécret".encode().decode("latin-1")
        assert raw(url, Authorization=good)[0] == 200


# --------------------------------------------------------------------------------- many at once


def metric(url: str, name: str) -> float:
    text = raw(url, path="/metrics")[2].decode()
    return sum(float(v) for v in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M))


def until(ask: Any, want: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while (found := ask()) != want:
        assert time.monotonic() < end, f"{found!r}, not {want!r}"
        time.sleep(0.02)


def asking(url: str, **how: Any) -> socket.socket:
    """A connection on which a long answer is waited for."""
    body = json.dumps({**SAYS, "max_tokens": 190, **how}).encode()
    to = socket.create_connection(("127.0.0.1", urlsplit(url).port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    to.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    return to


def test_who_hangs_up_gives_its_row_back(url: str) -> None:
    for stream in (True, False):
        before = metric(url, "jaxlm_generated_tokens_total")
        to = asking(url, stream=stream)
        until(lambda b=before: metric(url, "jaxlm_generated_tokens_total") > b, True)
        to.close()
        until(lambda: metric(url, "jaxlm_running_requests"), 0.0)
        assert metric(url, "jaxlm_generated_tokens_total") - before < 190


def test_who_hangs_up_while_waiting_gives_its_place_back(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving.of(model, rows=1, queue=1)
    step = served.engine.slots.step
    monkeypatch.setattr(served.engine.slots, "step", lambda: (time.sleep(0.05), step())[1])
    with serving.serving({"tiny": served}) as (url, _):
        first = asking(url)
        until(lambda: metric(url, "jaxlm_running_requests"), 1.0)
        second = asking(url)
        until(lambda: metric(url, "jaxlm_waiting_requests"), 1.0)
        second.close()
        until(lambda: metric(url, "jaxlm_waiting_requests"), 0.0)
        assert metric(url, "jaxlm_running_requests") == 1  # it has still to be waited for
        first.close()


def test_more_than_may_wait_are_told_to_come_back(model: LanguageModel) -> None:
    with serving.serving({"tiny": serving.of(model, rows=1, queue=1)}) as (url, _):
        asked = {**SAYS, "max_tokens": 150, "temperature": 0}
        found: list[Any] = []
        threads = [
            threading.Thread(
                target=lambda: found.append(raw(url, "POST", "/v1/completions", asked))
            )
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = sorted(status for status, _, _ in found)
        assert statuses[0] == 200 and statuses[-1] == 429 and set(statuses) == {200, 429}
        assert all(int(h["Retry-After"]) >= 1 for status, h, _ in found if status == 429)


def test_it_drains(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serving.of(model)
    step = served.engine.slots.step
    monkeypatch.setattr(served.engine.slots, "step", lambda: (time.sleep(0.005), step())[1])
    with serving.serving({"tiny": served}) as (url, running):
        found: list[Any] = []
        asked = {**SAYS, "max_tokens": 150, "temperature": 0}
        thread = threading.Thread(
            target=lambda: found.append(raw(url, "POST", "/v1/completions", asked))
        )
        thread.start()
        until(lambda: metric(url, "jaxlm_running_requests"), 1.0)
        serving.stop(running)
        until(lambda: running.app.draining, True)
        status, headers, _ = raw(url, "POST", "/v1/completions", SAYS)
        assert status == 503 and "Retry-After" in headers
        thread.join()
        assert found[0][0] == 200
        text = json.loads(found[0][2])["choices"][0]["text"]
        assert text == greedy(model, "a", 150)


def test_a_poisoned_request_ends_alone(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving.of(model)
    slots, join = served.engine.slots, served.engine.slots.join

    def poisoned(request: Any) -> int:
        row = join(request)
        if request.prompt[0] == model.tokenizer.encode("!")[0]:  # not a number in its cache, always
            slots._cache = jax.tree.map(lambda a: a.at[row].set(np.nan), slots._cache)
            slots._rows[row].again = True
        elif request.prompt[0] == model.tokenizer.encode("?")[0]:
            raise RuntimeError("a bug")
        return row

    monkeypatch.setattr(slots, "join", poisoned)
    with serving.serving({"tiny": served}) as (url, _):
        found: dict[str, Any] = {}

        def ask(prompt: str) -> None:
            asked = {**SAYS, "prompt": prompt, "max_tokens": 60, "temperature": 0}
            found[prompt] = raw(url, "POST", "/v1/completions", asked)

        threads = [threading.Thread(target=ask, args=(p,)) for p in ("abc", "!bad", "?bug", "xyz")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found["!bad"][0] == found["?bug"][0] == 500
        for prompt in ("abc", "xyz"):
            text = json.loads(found[prompt][2])["choices"][0]["text"]
            assert text == greedy(model, prompt, 60)


def test_a_step_that_fails_ends_those_in_it_only(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving.of(model)

    def fails() -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(served.engine.slots, "step", fails)
    with serving.serving({"tiny": served}) as (url, _):
        assert raw(url, "POST", "/v1/completions", SAYS)[0] == 500
        status, _, told = raw(url, "POST", "/v1/completions", {**SAYS, "temperature": 0})
        assert status == 200 and json.loads(told)["choices"][0]["text"] == greedy(model, "a", 2)


def test_a_model_that_cannot_go_on_says_so(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving.of(model)

    def fails(*_: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(served.engine.slots, "step", fails)
    monkeypatch.setattr(served.engine, "_new_slots", fails)
    with serving.serving({"tiny": served}) as (url, _):
        assert raw(url, path="/healthz")[0] == 200
        assert raw(url, "POST", "/v1/completions", SAYS)[0] == 500  # not after a time-out
        until(lambda: raw(url, path="/healthz")[0], 503)
        assert raw(url, "POST", "/v1/completions", SAYS)[0] == 500


def test_a_model_that_answers_nothing_is_not_served(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serving.of(model)

    def fails() -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(served.engine.slots, "step", fails)
    with pytest.raises(engine.Broken, match="its first request failed"):
        engine.warm(served.engine)
    assert engine.warm(served.engine) > 0  # it has a new batch
    served.engine.close()


async def crowd(
    url: str, model: LanguageModel, clients: int, each: int
) -> tuple[set[int], int, int]:
    """Statuses, greedy answers, and those that are not what a prompt is answered alone. One request
    in ten is malformed, oversized, slow or given up."""
    rng = np.random.default_rng(0)
    prompts = [f"{'a long beginning that many share ' * (i % 2)}prompt {i}" for i in range(12)]
    alone = {p: greedy(model, p, 8 + i % 5) for i, p in enumerate(prompts)}
    lengths = {p: 8 + i % 5 for i, p in enumerate(prompts)}
    statuses: set[int] = set()
    right = wrong = 0
    port = urlsplit(url).port

    async def bad(kind: int) -> None:
        body = json.dumps({**SAYS, "max_tokens": 100, "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json"
        sent = [b"{]", b" " * (2 << 20), body, body][kind]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + b"\r\nContent-Length: %d\r\n\r\n" % len(sent))
        if kind == 2:  # slow
            for i in range(0, len(sent), 20):
                writer.write(sent[i : i + 20])
                await asyncio.sleep(0.02)
        else:
            writer.write(sent)
        await writer.drain()
        line = await reader.readline()
        statuses.add(int(line.split()[1]))
        writer.close()  # of 2 and 3 while it is being answered

    async def one(seed: int, client: Any) -> None:
        nonlocal right, wrong
        mine = np.random.default_rng(seed)
        for _ in range(each):
            if mine.random() < 0.1:
                await bad(int(rng.integers(4)))
                continue
            prompt = prompts[int(mine.integers(len(prompts)))]
            found = await client.completions.create(
                model="tiny", prompt=prompt, max_tokens=lengths[prompt], temperature=0
            )
            right += found.choices[0].text == alone[prompt]
            wrong += found.choices[0].text != alone[prompt]

    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="x", max_retries=50, timeout=120
    ) as client:
        await asyncio.gather(*(one(i, client) for i in range(clients)))
    return statuses, right, wrong


def test_a_crowd_is_answered_as_each_alone(url: str, model: LanguageModel) -> None:
    statuses, right, wrong = asyncio.run(crowd(url, model, 8, 5))
    assert wrong == 0 and right > 25 and max(statuses, default=0) < 500
    until(lambda: metric(url, "jaxlm_running_requests"), 0.0)


@pytest.mark.slow
def test_64_clients_of_20_requests(model: LanguageModel) -> None:
    with serving.serving({"tiny": serving.of(model, rows=8)}) as (url, _):
        asyncio.run(crowd(url, model, 64, 3))
        before = rss()
        statuses, right, wrong = asyncio.run(crowd(url, model, 64, 20))
        grown = rss() - before
        print(
            f"{right} right, {wrong} wrong, statuses {statuses}, memory + {grown / 2**20:.1f} MiB"
        )
        assert wrong == 0 and right > 1000 and statuses <= {200, 400, 413, 429}
        assert re.search(r'status="5', raw(url, path="/metrics")[2].decode()) is None
        until(lambda: metric(url, "jaxlm_running_requests"), 0.0)
        assert grown < 40 << 20


def rss() -> int:
    """Bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_crawlers_are_cut(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEADERS_S", 0.2)
    monkeypatch.setattr(guard, "BODY_S", 0.2)
    for sent, want in (
        (b"", b""),
        (b"GET / HTTP/1.1\r\nHost: 127", b""),
        (b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n"
         b"Content-Type: application/json\r\n\r\n{", b"HTTP/1.1 408"),
    ):  # fmt: skip
        with socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=10) as to:
            to.sendall(sent)
            try:
                told = to.recv(12)
            except ConnectionResetError:
                told = b""
            assert told == want


@pytest.mark.slow
def test_the_command_drains_at_sigterm(tmp_path: Path) -> None:
    where = small.golden("llama3", tmp_path / "llama3")
    command = [sys.executable, "-m", "jaxlm", "serve", f"--model=mine={where}", "--port=0"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        url = next(m[0] for line in lines if (m := re.search(r"http://127[^/]*", line)))
        assert json.loads(raw(url)[2])["data"][0]["id"] == "mine"
        asked = {**SAYS, "model": "mine", "max_tokens": 4, "temperature": 0}
        status, _, told = raw(url, "POST", "/v1/completions", asked)
        assert status == 200
        assert json.loads(told)["choices"][0]["text"] == greedy(from_pretrained(where), "a", 4)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
