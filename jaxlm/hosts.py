"""Several processes as one run: how they find each other, and what they agree on.

Each process holds some of the devices; all of them run the same program on the same config and call
the same collectives in the same order. One of them, the lead, writes what a run leaves behind.
Everything here costs nothing in a run of one process.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.schema import JaxlmError, UserError

COORDINATOR, PROCESSES, PROCESS = "JAXLM_COORDINATOR", "JAXLM_PROCESSES", "JAXLM_PROCESS"
JOIN_S = 300  # how long one waits for the others
SILENT_S = 30  # and after how long one that says nothing is lost: the others then end, too
_TEXT = 2000  # bytes of an error that are told to all


def join(found_by_themselves: bool = False, environ: Mapping[str, str] = os.environ) -> None:
    """Makes this process one of a run's: as the environment says (`JAXLM_COORDINATOR=host:port`,
    `JAXLM_PROCESSES=n`, `JAXLM_PROCESS=i`), else where jax finds the others by itself (TPU VM, GKE,
    Slurm, MPI). Call it before jax is used. Without either it does nothing.

    Raises UserError, one line, for numbers that do not fit, and where jax finds nothing;
    JaxlmError where the others do not come within `JOIN_S` seconds.
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


def _join(coordinator: str | None, n: int | None, i: int | None) -> None:
    # It would take SIGTERM away from `workdir.StopFlag`, whose flag `Agreed` tells to all.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator, n, i, initialization_timeout=JOIN_S, heartbeat_timeout_seconds=SILENT_S
        )
    except ValueError as e:  # jax found no cluster around it
        raise UserError(
            f"--distributed: {str(e).splitlines()[0]}; expected a TPU VM, GKE, Slurm or MPI, or"
            f" {COORDINATOR}, {PROCESSES} and {PROCESS}"
        ) from e
    except RuntimeError as e:
        raise JaxlmError(f"could not join the others: {str(e).splitlines()[0]}") from e


def several() -> bool:
    return jax.process_count() > 1


def need_one(what: str) -> None:
    """Raises UserError in a run of several processes."""
    if several():
        raise UserError(f"{what}: not yet in a run of several processes ({jax.process_count()})")


def is_lead() -> bool:
    """Whether this process writes the run's files."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def anyone(flag: Any) -> bool:
    """Whether it is true in any process; all of them ask."""
    if not several():
        return bool(flag)
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(bool(flag)))))


def by_lead(do: Callable[[], object]) -> None:
    """The lead does it while the others wait; what it raises for a user's mistake or a failure, all
    raise."""
    if not several():
        do()
        return
    from jax.experimental import multihost_utils

    error: BaseException | None = None
    if is_lead():
        try:
            do()
        except BaseException as e:
            error = e
    said = np.zeros(_TEXT + 2, np.uint8)
    if error is not None:
        text = str(error).encode()[:_TEXT]
        said[: len(text) + 2] = [1 + isinstance(error, UserError), len(text) % 256, *text]
        said[-1] = len(text) // 256
    said = np.asarray(multihost_utils.broadcast_one_to_all(said))
    if error is not None:
        raise error
    if said[0]:
        n = int(said[1]) + 256 * int(said[-1])
        told = bytes(said[2 : 2 + n].tolist()).decode(errors="replace")
        raise (UserError if said[0] == 2 else JaxlmError)(told)


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
