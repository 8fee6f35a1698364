"""The routes: OpenAI's three, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Collection
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jaxlm.schema import UserError
from jaxlm.serve import page, protocol
from jaxlm.serve.engine import Broken, Busy
from jaxlm.serve.guard import Guard, Refused, body, error
from jaxlm.serve.protocol import Chat, Completion
from jaxlm.serve.service import Asking, Piece, Service

_GONE = Response(status_code=499)  # nobody is there to read it
_BEGAN = int(time.time())


def guarded(service: Service, names: Collection[str] = (), token: str = "") -> Guard:
    """The ASGI application; `names` are those that this machine is asked under."""

    async def chat(request: Request) -> Response:
        return await _answered(service, request, Chat)

    async def completion(request: Request) -> Response:
        return await _answered(service, request, Completion)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_card(service, n) for n in service.models]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in service.models:
            raise Refused(404, f"model: no {name!r:.80} here", "model_not_found")
        return JSONResponse(_card(service, name))

    async def healthy(request: Request) -> Response:
        if any(s.engine.closed for s in service.models.values()):
            raise Refused(503, "a model has stopped")
        return JSONResponse({"status": "ok"})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def shown(request: Request) -> Response:
        text, policy = page.document()
        headers = {"Content-Security-Policy": policy}
        return Response(text, media_type="text/html; charset=utf-8", headers=headers)

    app = Starlette(
        routes=[
            Route("/", shown),
            Route("/healthz", healthy),
            Route("/metrics", metrics),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/completions", completion, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ],
        exception_handlers={
            Refused: lambda _, e: e.response(),
            Busy: lambda _, e: _busy(service, str(e)),
            UserError: lambda _, e: JSONResponse(error(400, str(e)), 400),
            Broken: lambda _, e: JSONResponse(error(500, str(e)), 500),
            HTTPException: _http,
        },
    )
    return Guard(app, names, token, service.metrics.answered)


def _http(request: Request, e: Exception) -> Response:
    assert isinstance(e, HTTPException)
    return JSONResponse(error(e.status_code, e.detail), e.status_code, e.headers)


def _busy(service: Service, message: str) -> Response:
    waits = max(s.engine.waiting / s.engine.rows for s in service.models.values())
    headers = {"Retry-After": str(1 + min(30, int(waits)))}
    return JSONResponse(error(429, message, "queue_full"), 429, headers)


def _card(service: Service, name: str) -> dict[str, Any]:
    found = service.models[name]
    return {
        "id": name, "object": "model", "created": _BEGAN, "owned_by": "jaxlm",
        "context": found.engine.context, "chat": found.model.chat is not None,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------- answers


async def _answered(service: Service, request: Request, kind: Any) -> Response:
    asked = protocol.read(await body(request), kind)
    counted = asked.counted  # before anything is asked
    asking = await service.ask(asked)
    form = _Form(isinstance(asked, Chat), asked.model, asking)
    if asked.stream:
        headers = {"X-Accel-Buffering": "no"}
        stream = _events(form, asking, counted)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
    whole = asyncio.create_task(_whole(form, asking))
    left = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({whole, left}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(whole.result()) if whole.done() else _GONE
    finally:
        for task in (whole, left):
            task.cancel()
        asking.call.close()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Form:
    """One request's answers as OpenAI writes them."""

    def __init__(self, chat: bool, model: str, asking: Asking) -> None:
        self.chat, self.asking = chat, asking
        prefix = "chatcmpl" if chat else "cmpl"
        self.head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time())}
        self.head |= {"model": model}
        self._offsets: dict[int, int] = {}
        found = asking.read.sources  # which OpenAI's answers do not have
        self.sources = {} if found is None else {"sources": [one.row for one in found]}

    def echo(self, index: int) -> str:
        texts = self.asking.read.texts
        return texts[index // self.asking.copies] if texts else ""

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, **more}

    def begin(self, index: int) -> dict[str, Any]:
        if self.chat:
            delta = {"role": "assistant", "content": ""}
            return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self.piece(Piece(index, self.echo(index), []))

    def piece(self, piece: Piece) -> dict[str, Any]:
        found: dict[str, Any] = {
            "index": piece.index,
            "finish_reason": piece.finish,
            "logprobs": None,
        }
        if self.asking.top is not None and piece.said:
            found["logprobs"] = self._logprobs(piece)
        if not self.chat:
            return {**found, "text": piece.text}
        return {**found, "delta": {"content": piece.text} if piece.text else {}}

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        choices = []
        for piece in pieces:
            one = self.piece(piece)
            if self.chat:
                del one["delta"]
                one["message"] = {"role": "assistant", "content": piece.text, "refusal": None}
            else:
                one["text"] = self.echo(piece.index) + piece.text
            choices.append(one)
        kind = "chat.completion" if self.chat else "text_completion"
        more = {"usage": self.asking.usage, **self.sources}
        return {**self.head, "object": kind, "choices": choices, **more}

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        if self.chat:
            return protocol.chat_logprobs(piece.said)
        before = self._offsets.get(piece.index, 0)
        self._offsets[piece.index] = before + sum(len(t.text) for t in piece.said)
        return protocol.completion_logprobs(piece.said, before)


async def _whole(form: _Form, asking: Asking) -> dict[str, Any]:
    whole = [Piece(i, "", []) for i in range(asking.answers)]
    async with contextlib.aclosing(asking.pieces()) as pieces:
        async for piece in pieces:
            one = whole[piece.index]
            one.text += piece.text
            one.said += piece.said
            one.finish = piece.finish
    return form.whole(whole)


async def _events(form: _Form, asking: Asking, counted: bool) -> AsyncIterator[str]:
    """Server-sent events; whoever stops reading ends the request."""
    more: dict[str, Any] = {"usage": None} if counted else {}
    try:
        async with contextlib.aclosing(asking.pieces()) as pieces:
            for i in range(asking.answers):
                if form.chat or form.echo(i):
                    yield _event(form.chunk([form.begin(i)], **more, **form.sources))
            async for piece in pieces:
                yield _event(form.chunk([form.piece(piece)], **more))
        if counted:
            yield _event(form.chunk([], usage=asking.usage))
        yield "data: [DONE]\n\n"
    except Broken as e:
        yield _event(error(500, str(e)))
    finally:
        asking.call.close()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
