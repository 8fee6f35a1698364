"""Several processes as one run: how they find each other, agree, and part.

Each process holds some of the devices; all of them run the same program on the same config and call
the same things here in the same order. One of them, the lead, writes what a run leaves behind
(`by_lead`); what fails on one fails on all (`together`), so that none waits for one that is gone.
They speak through the coordinator that `jax.distributed` keeps on the lead, however long one takes;
only whether to stop is asked through the devices. In a run of one process all of this is nothing.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.files import first_line
from jaxlm.schema import JaxlmError, UserError

T = TypeVar("T")

COORDINATOR, PROCESSES, PROCESS = "JAXLM_COORDINATOR", "JAXLM_PROCESSES", "JAXLM_PROCESS"
JOIN_S = 300  # how long one waits for the others
SILENT_S = 30  # and after how long one that says nothing is lost: the others then end, too
PART_S = 10  # how long one that is done waits for the others
_POLL_MS = 1000  # a wait hears signals so often
_calls = itertools.count()  # of what is agreed: the same number in all processes


# ------------------------------------------------------------------------------------ join and part


@contextlib.contextmanager
def joined(found_by_themselves: bool = False) -> Iterator[None]:
    """A block in which this process is one of a run's, as `join` finds it; they part at its end.

    One that fails alone does not wait for the others: it says why and ends with its exit code, and
    they are ended by its silence.
    """
    join(found_by_themselves)
    if not several():
        yield
        return
    try:
        yield
    except BaseException as e:
        if not _is_lost(e):
            _part(e)
            raise
        lost = Lost(f"lost another process of the run: {first_line(e)}")
        _part(lost)
        raise lost from e
    _part(None)


class Lost(JaxlmError):
    """Another process is gone; all of them, started again, go on from the last checkpoint."""

    exit_code = 76


def _is_lost(error: BaseException) -> bool:
    """Whether a collective failed for want of somebody, as far as its words tell."""
    text = str(error).lower()
    words = ("gloo", "unavailable", "connection", "deadline_exceeded")
    return isinstance(error, jax.errors.JaxRuntimeError) and any(word in text for word in words)


def _part(error: BaseException | None) -> None:
    with contextlib.suppress(OSError):  # nobody may be reading
        sys.stdout.flush()
    try:
        _client().wait_at_barrier("jaxlm/part", PART_S * 1000)
    except Exception:
        with contextlib.suppress(OSError):
            if isinstance(error, JaxlmError) or error is None:
                line = error or "the other processes did not come to their end"
                print(f"jaxlm: {line}", file=sys.stderr)
            else:
                traceback.print_exception(error)
            sys.stderr.flush()
        os._exit(getattr(error, "exit_code", 1))
    jax.distributed.shutdown()


def join(found_by_themselves: bool = False, environ: Mapping[str, str] = os.environ) -> None:
    """Makes this process one of a run's: as the environment says (`JAXLM_COORDINATOR=host:port`,
    `JAXLM_PROCESSES=n`, `JAXLM_PROCESS=i`), else where jax finds the others by itself (TPU VM, GKE,
    Slurm, MPI). Call it before jax is used. Without either it does nothing.

    Raises UserError, one line, for numbers that do not fit, and where jax finds nothing; JaxlmError
    where the lead cannot be reached within `JOIN_S` seconds. Where others do not come within them,
    the process says so and ends with that error's exit code.
    """
    named = {name: environ.get(name, "") for name in (COORDINATOR, PROCESSES, PROCESS)}
    if not any(named.values()):
        if found_by_themselves:
            _join(None, None, None)
        return
    missing = [name for name, value in named.items() if not value]
    if missing:
        raise UserError(f"{missing[0]}: expected a value, since {_first(named)} has one")
    n, i = (_number(name, named[name]) for name in (PROCESSES, PROCESS))
    if not 0 <= i < n:
        raise UserError(f"{PROCESS}: expected 0 … {n - 1} ({PROCESSES}={n}), got {i}")
    host, colon, port = named[COORDINATOR].rpartition(":")
    if not (host and colon and port.isdigit()):
        raise UserError(f"{COORDINATOR}: expected host:port, got {named[COORDINATOR]!r}")
    if n > 1:
        _join(named[COORDINATOR], n, i)


def _first(named: dict[str, str]) -> str:
    return next(name for name, value in named.items() if value)


def _number(name: str, text: str) -> int:
    if not text.isdigit():
        raise UserError(f"{name}: expected a number, got {text!r}")
    return int(text)


def _reach(coordinator: str) -> None:
    """Waits until the lead listens: jax would end the process with a stack trace instead."""
    host, _, port = coordinator.rpartition(":")
    deadline, why = time.monotonic() + JOIN_S, ""
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host.strip("[]"), int(port)), 5.0).close()
            return
        except OSError as e:
            why = e.strerror or str(e)
            time.sleep(0.1)
    raise JaxlmError(f"{COORDINATOR}: {coordinator} could not be reached in {JOIN_S} s: {why}")


def _join(coordinator: str | None, n: int | None, i: int | None) -> None:
    if coordinator and i:
        _reach(coordinator)
    # It would take SIGTERM away from `workdir.StopFlag`, whose flag `Agreed` tells to all.
    jax.config.update("jax_enable_preemption_service", False)
    late = threading.Timer(JOIN_S, _give_up)
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator, n, i, initialization_timeout=2 * JOIN_S, heartbeat_timeout_seconds=SILENT_S
        )
    except ValueError as e:  # jax found no cluster around it
        raise UserError(
            f"--distributed: {first_line(e)}; expected a TPU VM, GKE, Slurm or MPI, or"
            f" {COORDINATOR}, {PROCESSES} and {PROCESS}"
        ) from e
    except RuntimeError as e:
        raise JaxlmError(f"could not join the others: {first_line(e)}") from e
    finally:
        late.cancel()


def _give_up() -> None:
    """In place of jax, which ends the process with a stack trace."""
    os.write(2, f"jaxlm: not all processes of the run came within {JOIN_S} s\n".encode())
    os._exit(JaxlmError.exit_code)


# -------------------------------------------------------------------------------------------- agree


def several() -> bool:
    """Whether this process is one of several. Touches no device where it is alone."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_lead() -> bool:
    """Whether this process writes the run's files."""
    return not several() or jax.process_index() == 0


def need_one(what: str) -> None:
    """Raises UserError in a run of several processes."""
    if several():
        raise UserError(f"{what}: not yet in a run of several processes ({jax.process_count()})")


def by_lead(do: Callable[[], T]) -> T:
    """What the lead makes of it while the others wait, in all processes: what JSON holds.

    What it raises, all raise.
    """
    if not several():
        return do()
    key = _key()
    if not is_lead():
        found = _wait(key)
        _raise(found["error"])
        return found["value"]
    try:
        value = do()
        _tell(key, {"value": value, "error": None})
    except BaseException as e:
        _tell(key, {"error": _told(e)})
        raise
    return value


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that fails in all processes, once all have come to its end, if it fails in one.

    Nothing in it may wait for other processes than the lead.
    """
    if not several():
        yield
        return
    key, mine = _key(), None
    try:
        yield
    except Exception as e:
        mine = e
    errors = _gather(key, mine and _told(mine))
    if mine is not None:
        raise mine
    _raise(next(filter(None, errors), None))


def anyone(flag: Any) -> bool:
    """Whether it is true in any process; all of them ask."""
    return any(_gather(_key(), bool(flag))) if several() else bool(flag)


def same(what: str, value: str) -> None:
    """Raises UserError, in all processes, unless all bring the same text."""
    first = by_lead(lambda: value)
    with together():
        if value != first:
            i = jax.process_index()
            raise UserError(f"{what}: process {i} has {value}, process 0 has {first}")


def _key() -> str:
    return f"jaxlm/{next(_calls)}"


def _gather(key: str, value: Any) -> list[Any]:
    """Everyone's value, in all processes, in their order."""
    if not is_lead():
        _tell(f"{key}/{jax.process_index()}", value)
        return _wait(key)
    values = [value, *(_wait(f"{key}/{i}") for i in range(1, jax.process_count()))]
    _tell(key, values)
    return values


def _client() -> Any:
    # The only way to the coordinator's store; jax.experimental.multihost_utils and orbax take it.
    from jax._src import distributed

    return distributed.global_state.client


def _tell(key: str, value: Any) -> None:
    _client().key_value_set(key, json.dumps(value))


def _wait(key: str) -> Any:
    """What is told under a key, once it is. Where a process is gone, jax ends this one, too."""
    while True:
        try:
            return json.loads(_client().blocking_key_value_get(key, _POLL_MS))
        except jax.errors.JaxRuntimeError as e:
            if "DEADLINE_EXCEEDED" not in str(e):
                raise Lost(f"lost the other processes: {first_line(e)}") from e


def _told(error: BaseException) -> list[Any]:
    text = str(error) if isinstance(error, JaxlmError) else first_line(error)
    return [getattr(error, "exit_code", 1), text]


def _raise(told: list[Any] | None) -> None:
    """Another process's error, here."""
    if told:
        code, line = told
        error = (UserError if code == UserError.exit_code else JaxlmError)(line)
        error.exit_code = code
        raise error


# --------------------------------------------------------------------------------------------- stop


class Agreed:
    """Whether anyone asks to stop, told to all at the same step.

    A flag can rise in one process at any time. At each boundary every process calls `ask`, which
    starts a reduction behind the step that was dispatched last and answers with the one before it,
    whose result is there by then: nobody waits for the devices. With one process it is the flag.
    """

    def __init__(self, flag: Any, devices: jax.sharding.Mesh) -> None:
        self.flag = flag
        self._on = jax.NamedSharding(devices, jax.P(devices.axis_names))
        self._asked: jax.Array | None = None

    def ask(self) -> bool:
        if not several():
            return bool(self.flag)
        before, n = self._asked, self._on.mesh.size
        mine = np.full(n, bool(self.flag), np.int32)
        flags = jax.make_array_from_callback((n,), self._on, lambda at: mine[at])
        self._asked = _any(self._on.mesh)(flags)
        return before is not None and bool(np.asarray(before))


@functools.lru_cache(maxsize=8)
def _any(devices: jax.sharding.Mesh) -> Any:
    return jax.jit(jnp.max, out_shardings=jax.NamedSharding(devices, jax.P()))
