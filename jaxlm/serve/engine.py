"""A model in a thread of its own: requests wait for a row of its batch, their tokens come back.

The thread owns the `Slots`; the event loop only puts requests into a list and reads a queue, so
that neither waits for the other. What goes wrong with a request ends that one; what goes wrong with
a step ends those who were in it, and the next ones find a new batch. Where there can be none, the
engine closes: all that wait and all that come are told.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from jaxlm.generate.slots import Request, Slots, Token
from jaxlm.language_model import LanguageModel
from jaxlm.schema import JaxlmError

_LOG = logging.getLogger("jaxlm.serve")


class Busy(JaxlmError):
    """More requests are waiting than may wait."""


class Broken(JaxlmError):
    """A request whose answer came to no end."""


@dataclass(eq=False)
class Call:
    """Requests that were made together; `queue` gives (which of them, token)."""

    engine: Engine
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[tuple[int, Token]] = field(default_factory=asyncio.Queue)
    jobs: list[_Job] = field(default_factory=list)

    async def tokens(self) -> AsyncIterator[tuple[int, Token]]:
        """Tokens as they come; ends with the last job that has not been left."""
        while any(not job.over for job in self.jobs):
            i, token = await self.queue.get()
            job = self.jobs[i]
            if not job.over:  # else it was left while this token was on its way
                job.over = token.finish is not None
                yield i, token

    def leave(self, i: int) -> None:
        """No more tokens of request `i` are wanted."""
        self.jobs[i].over = True
        self.engine.wake()

    def close(self) -> None:
        for i in range(len(self.jobs)):
            self.leave(i)


@dataclass(eq=False)
class _Job:
    call: Call
    index: int
    request: Request
    over: bool = False  # set by the event loop alone


class Engine:
    """`rows` requests at a time, and at most `queue` more that wait."""

    def __init__(self, model: LanguageModel, rows: int, context: int, queue: int) -> None:
        self.model, self.rows, self.queue = model, rows, queue
        self.slots = self._new_slots(context)
        self.context = self.slots.context
        self._waiting: deque[_Job] = deque()
        self._running: dict[int, _Job] = {}
        self._changed = threading.Condition()
        self.closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _new_slots(self, context: int) -> Slots:
        with jax.set_mesh(self.model.mesh):
            return Slots(self.model.config, self.model.params, self.rows, context)

    # -------------------------------------------------------------------------- of the event loop

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def ask(self, requests: Sequence[Request]) -> Call:
        """Queues all of them or none. Raises UserError as `Slots.check`, Busy and Broken."""
        for request in requests:
            self.slots.check(request)
        call = Call(self, asyncio.get_running_loop())
        call.jobs = [_Job(call, i, request) for i, request in enumerate(requests)]
        with self._changed:
            if self.closed:
                raise Broken("the model has stopped")
            room = self.queue + max(0, self.rows - len(self._running)) - len(self._waiting)
            if len(requests) > room:
                raise Busy(f"{len(self._waiting)} requests are waiting already; try again later")
            self._waiting += call.jobs
            self._changed.notify()
        return call

    def wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Ends all that run or wait, and the thread."""
        with self._changed:
            self.closed = True
            self._changed.notify()
        self._thread.join(timeout=60)

    # ------------------------------------------------------------------------------ of the thread

    def _work(self) -> None:
        try:
            while self._turn():
                pass
        except Exception:
            _LOG.exception("the model has stopped")
        with self._changed:
            self.closed = True
            self._tell([(job, _ended()) for job in [*self._running.values(), *self._waiting]])
            self._running.clear()
            self._waiting.clear()

    def _turn(self) -> bool:
        """One step, when there is something to do; False if the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed or self._waiting or self._running)
            if self.closed:
                return False
            joining = self._taken()
        for job in joining:
            self._join(job)
        if self._running:
            self._step()
        return True

    def _taken(self) -> list[_Job]:
        """Those who have left leave rows and queue; who has waited longest gets a row."""
        for row, job in list(self._running.items()):
            if job.over:
                self.slots.leave(row)
                del self._running[row]
        self._waiting = deque(job for job in self._waiting if not job.over)
        many = min(len(self._waiting), self.slots.free)
        return [self._waiting.popleft() for _ in range(many)]

    def _join(self, job: _Job) -> None:
        try:
            row = self.slots.join(job.request)
        except Exception:
            _LOG.exception("a request could not join")
            self._tell([(job, _ended())])
        else:
            self._running[row] = job

    def _step(self) -> None:
        try:
            said = self.slots.step()
        except Exception:
            _LOG.exception("a step failed: %d requests end with it", len(self._running))
            lost = [(job, _ended()) for job in self._running.values()]
            self._running.clear()
            self._tell(lost)
            self.slots = self._new_slots(self.context)
            return
        told = []
        for token in said:
            job = self._running.get(token.row)
            if job is None:  # its joining failed half way
                self.slots.leave(token.row)
                continue
            told.append((job, token))
            if token.finish == "error":
                _LOG.error("row %d: its request ends without an answer", token.row)
            if token.finish is not None:
                del self._running[token.row]
        self._tell(told)

    def _tell(self, told: Sequence[tuple[_Job, Token]]) -> None:
        """One wake-up of each loop for all tokens of a step."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Job, Token]]] = {}
        for job, token in told:
            by_loop.setdefault(job.call.loop, []).append((job, token))
        for loop, some in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put, some)


def _put(told: Sequence[tuple[_Job, Token]]) -> None:
    for job, token in told:
        job.call.queue.put_nowait((job.index, token))


def _ended() -> Token:
    return Token(-1, 0, float("nan"), [], "error")


def warm(engine: Engine) -> float:
    """Seconds of a first answer, which compiles what most answers need. Raises Broken where there
    is none."""
    began = time.monotonic()

    async def ask() -> None:
        call = engine.ask([Request(np.zeros(2, np.int32), 1)])
        async for _, token in call.tokens():
            if token.finish == "error":
                raise Broken("the model cannot answer: its first request failed")

    asyncio.run(ask())
    return time.monotonic() - began
