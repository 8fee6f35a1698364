"""Checkpoints that are either whole and verified or do not exist.

orbax writes and reads the arrays. What it lacks is added here: a MANIFEST.json, written last, with
a digest of every array's values; a restore that verifies them and walks back to the newest good
step; and a save that is refused where it would keep what cannot be resumed from.

    checkpoints/STEP/state/          the arrays, an orbax checkpoint (nested dicts)
    checkpoints/STEP/MANIFEST.json   format, step, meta, arrays, checksum
    checkpoints/STEP.tmp/            a save under way, or what is left of a killed one
    checkpoints/STEP.corrupt/        did not verify; kept for people to look at, never read
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging as stdlib_logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging

from jaxlm import hosts
from jaxlm.files import MANIFEST, first_line, fsync_dir, fsync_tree, plain, read_json, write_json
from jaxlm.schema import JaxlmError, UserError
from jaxlm.train.digest import describe

Tree = TypeVar("Tree")
Arrays = dict[str, Any]  # "params/embed/table" → array
FORMAT = "jaxlm.checkpoint/1"


class NotFinite(JaxlmError):
    """A state that holds NaN or infinity, which is never saved."""


class Damaged(Exception):
    """Why a checkpoint does not verify."""


class Checkpoints:
    """The checkpoints of one run, in `folder`; the newest `keep` stay (0: all).

    A state is a pytree of arrays of any dtype (no typed PRNG keys, no Python numbers). On a CPU
    `save` returns when the step is committed; elsewhere it returns once the state is copied to the
    host and the rest happens in a thread, whose outcome `commit` tells. With several processes
    (one folder, seen by all) every process calls every method, and saving blocks.
    """

    def __init__(self, folder: str | Path, keep: int = 2, *, background: bool | None = None):
        self.folder = Path(folder)
        self.keep = keep
        on_cpu = jax.default_backend() == "cpu"
        self._background = not (hosts.several() or on_cpu) if background is None else background
        self._thread = ThreadPoolExecutor(1, "checkpoint") if self._background else None
        self._saving: Future[int] | None = None
        self._committed: int | None = None

    # -------------------------------------------------------------------------------------- save

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Saves `state` and `meta` (JSON: data position, fingerprints, …) as `step`.

        A step that is committed already is left as it is. Waits for a save under way. Raises
        NotFinite where the state is not, JaxlmError where the disk is full or the write fails (of
        the previous save too): earlier steps are intact, and the next save may succeed.
        """
        self._finish(wait=True)
        if hosts.by_lead(lambda: step in self.steps()):
            return
        arrays = by_path(state)
        if not hosts.several():
            # On the host: orbax writes them twice as fast, and the step may donate the originals.
            arrays = {path: np.asarray(x) for path, x in arrays.items()}
        nbytes = sum(x.nbytes for x in arrays.values())
        hosts.by_lead(lambda: _need_space(self.folder, nbytes))
        if self._thread is not None:
            self._saving = self._thread.submit(self._write, step, arrays, meta)
        else:
            self._committed = self._write(step, arrays, meta)

    def commit(self, wait: bool = False) -> int | None:
        """The newest step committed since the last call, or None; `wait` for a save under way.

        Raises the JaxlmError of a save that failed in the background.
        """
        self._finish(wait)
        step, self._committed = self._committed, None
        return step

    def _finish(self, wait: bool) -> None:
        if self._saving is not None and (wait or self._saving.done()):
            saving, self._saving = self._saving, None
            self._committed = saving.result()

    def steps(self) -> list[int]:
        """Committed steps, ascending; whether they verify is known on reading them."""
        return [n for n in self._all() if (self.folder / str(n) / MANIFEST).exists()]

    def _all(self) -> list[int]:
        return sorted(int(p.name) for p in self.folder.glob("*") if p.name.isdigit())

    def _write(self, step: int, arrays: Arrays, meta: dict[str, Any]) -> int:
        entries = describe(arrays)
        bad = [path for path, entry in entries.items() if not entry.pop("finite")]
        if bad:
            raise NotFinite(
                f"{self.folder}/{step}: not saved, since {_some(bad)} hold NaN or infinity"
            )
        part, final = self.folder / f"{step}.tmp", self.folder / str(step)
        manifest = {"format": FORMAT, "step": step, "meta": plain(meta), "arrays": entries}
        manifest["checksum"] = _checksum(manifest)

        def begin() -> None:
            shutil.rmtree(part, ignore_errors=True)
            (part / "state").mkdir(parents=True)

        def end() -> None:
            _orbax("finalize", part / "state")
            fsync_tree(part)
            write_json(part / MANIFEST, manifest)
            part.rename(final)
            fsync_dir(self.folder)

        try:
            hosts.by_lead(begin)
            with hosts.together():
                _orbax("save", part / "state", _nested(arrays))
            hosts.by_lead(end)
        except Exception as e:
            shutil.rmtree(part, ignore_errors=True)
            raise _not_saved(final, e, self.steps()) from e
        hosts.by_lead(self._drop_old)
        return step

    def _drop_old(self) -> None:
        for step in self.steps()[: -self.keep] if self.keep else []:
            dropped = self.folder / f"{step}.tmp"  # a name that is never read, whatever happens
            shutil.rmtree(dropped, ignore_errors=True)
            (self.folder / str(step)).rename(dropped)
            shutil.rmtree(dropped, ignore_errors=True)

    # ----------------------------------------------------------------------------------- restore

    def restore(self, abstract_state: Tree) -> tuple[int, Tree, dict[str, Any]] | None:
        """(step, state, meta) of the newest step that verifies; None where nothing was saved.

        `abstract_state` is a pytree of jax.ShapeDtypeStruct; its shardings, on any mesh, are those
        of the result, whose values are bitwise those saved. Newer steps that do not verify are
        renamed to STEP.corrupt and logged; leftovers of a killed save are removed, so only the
        process that holds the run's lock may call this.

        Raises UserError where the saved arrays are others than asked for (a changed config), and
        JaxlmError, renaming nothing, where steps were saved and none verifies.
        """
        self._finish(wait=True)
        if not hosts.by_lead(self._tidied):
            return None
        step, state, meta, damaged = self._newest(abstract_state, part=False)
        for bad, why in damaged.items():
            aside = hosts.by_lead(partial(_set_aside, self.folder / str(bad)))
            logging.warning("%s/%d: %s; set aside as %s", self.folder, bad, why, aside)
        return step, state, meta

    def _tidied(self) -> bool:
        """Removes what killed saves left; whether anything was saved."""
        for leftover in self.folder.glob("*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        return bool(self._all())

    def load(self, abstract_part: Tree) -> tuple[int, Tree, dict[str, Any]]:
        """As `restore`, for a part of the state such as `{"params": …}`, and changing nothing.

        Safe while another process trains. Raises UserError where nothing was saved.
        """
        while steps := hosts.by_lead(self.steps):
            try:
                return self._newest(abstract_part, part=True)[:3]
            except JaxlmError:
                if hosts.by_lead(self.steps) == steps:  # else they were dropped as they were read
                    raise
        raise UserError(f"{self.folder}: no checkpoint")

    def _newest(self, tree: Any, part: bool) -> tuple[int, Any, dict[str, Any], dict[int, str]]:
        wanted, treedef = by_path(tree), jax.tree.structure(tree)
        damaged: dict[int, str] = {}
        for step in reversed(hosts.by_lead(self._all)):
            folder = self.folder / str(step)
            try:
                manifest, why = hosts.by_lead(partial(_manifest_or_why, folder))
                if why:
                    raise Damaged(why)
                _need_same(folder, wanted, manifest["arrays"], part)
                arrays = _verified(folder, wanted, manifest["arrays"])
            except Damaged as e:
                damaged[step] = str(e)
                continue
            return step, jax.tree.unflatten(treedef, arrays), manifest["meta"], damaged
        reasons = "; ".join(f"{step}: {why}" for step, why in damaged.items())
        raise JaxlmError(
            f"{self.folder}: no checkpoint verifies ({reasons}); they are left as they are: "
            "repair them, or move the folder away to start over"
        )


# -------------------------------------------------------------------------------------- manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of one step. Raises Damaged; UserError where a newer jaxlm wrote it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        saved = manifest.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise Damaged(f"{MANIFEST} cannot be read ({first_line(e)})") from e
    if saved != _checksum(manifest):
        raise Damaged(f"{MANIFEST} does not match its checksum")
    read_json(folder / MANIFEST, "checkpoint")  # sound, so a strange format is a newer one
    if manifest["step"] != int(folder.name):
        raise Damaged(f"{MANIFEST} is of step {manifest['step']}")
    return manifest


def _manifest_or_why(folder: Path) -> tuple[dict[str, Any], str]:
    """The manifest, or why there is none."""
    try:
        return read_manifest(folder), ""
    except Damaged as e:
        return {}, str(e)


def _checksum(manifest: dict[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def by_path(tree: Any) -> Arrays:
    """Leaves by their path, e.g. "opt_state/0/mu/embed"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
    if len(found) != len(leaves):
        raise ValueError("two arrays of the state have one path: a key holds a '/'")
    return found


# ------------------------------------------------------------------------------------- read, check


def _verified(folder: Path, wanted: Arrays, entries: dict[str, Any]) -> list[jax.Array]:
    """The wanted arrays, in their order and shardings. Raises Damaged."""
    import orbax.checkpoint as ocp

    on_host = not hosts.several()

    def how(x: Any) -> Any:
        if on_host:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape)

    args = ocp.args.PyTreeRestore(
        item=_nested(wanted),
        restore_args=_nested({path: how(x) for path, x in wanted.items()}),
        partial_restore=len(wanted) < len(entries),
    )
    try:
        with hosts.together():
            arrays = by_path(_orbax("restore", folder / "state", args=args))
            arrays = {path: arrays[path] for path in wanted}
    except (OrbaxError, KeyError, JaxlmError) as e:
        raise Damaged(f"state cannot be read ({first_line(e)})") from e
    found = describe(arrays)
    bad = [p for p in wanted if any(found[p][key] != value for key, value in entries[p].items())]
    if bad:
        raise Damaged(f"the values of {_some(bad)} are not those that were saved")
    if not on_host:
        return [arrays[path] for path in wanted]
    # Never an alias of numpy's memory: the train step donates these buffers.
    return [jax.device_put(arrays[p], x.sharding, may_alias=False) for p, x in wanted.items()]


def _need_same(folder: Path, wanted: Arrays, entries: dict[str, Any], part: bool) -> None:
    """Raises UserError naming the first arrays that differ in path, shape or dtype."""

    def text(x: Any) -> str:
        shape = ",".join(str(n) for n in x["shape"])
        return f"{x['dtype']}[{shape}]"

    asked = {p: text({"shape": x.shape, "dtype": np.dtype(x.dtype)}) for p, x in wanted.items()}
    saved = {p: text(entry) for p, entry in entries.items() if not part or p in wanted}
    differ = [p for p in asked | saved if asked.get(p) != saved.get(p)]
    if differ:
        lines = [
            f"{p} is {saved.get(p, 'absent')}, expected {asked.get(p, 'absent')}" for p in differ
        ]
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise UserError(f"{folder}: saved by another config: {'; '.join(lines[:3])}{more}")


# ---------------------------------------------------------------------------------- small things


class OrbaxError(Exception):
    """What orbax raised, as `Type: message`."""


def _orbax(method: str, folder: Path, *args: Any, **kwargs: Any) -> Any:
    """Calls orbax on a folder. Raises OrbaxError.

    Its handler, not a `Checkpointer`: that waits for the other processes where one may have failed.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    # Weights hardly compress (8 % of float32), and compressing takes longer than writing.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    try:
        return getattr(handler, method)(epath.Path(folder.resolve()), *args, **kwargs)
    except Exception as e:
        failure = f"{type(e).__name__}: {e}"
    # It leaves failed futures behind, whose tracebacks asyncio prints once they are collected.
    log = stdlib_logging.getLogger("asyncio")
    disabled, log.disabled = log.disabled, True
    gc.collect()
    log.disabled = disabled
    raise OrbaxError(failure)


def _nested(arrays: Arrays) -> dict[str, Any]:
    """{"a/b": x} → {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, x in arrays.items():
        *folders, name = path.split("/")
        node = tree
        for f in folders:
            node = node.setdefault(f, {})
        node[name] = x
    return tree


def _need_space(folder: Path, nbytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free, need = shutil.disk_usage(folder).free, int(nbytes * 1.1) + 2**20
    if free < need:
        raise JaxlmError(
            f"{folder}: disk full: a checkpoint needs {need / 2**20:.1f} MiB, "
            f"{free / 2**20:.1f} MiB are free; earlier checkpoints are intact"
        )


def _not_saved(final: Path, error: Exception, intact: list[int]) -> JaxlmError:
    text = str(error)
    full = any(s in text for s in ("No space left", "RESOURCE_EXHAUSTED", "disk full", "EDQUOT"))
    newest = f"step {intact[-1]} is intact" if intact else "no earlier step exists"
    return JaxlmError(f"{final}: not saved: {'disk full' if full else first_line(error)}; {newest}")


def _set_aside(folder: Path) -> str:
    """Renames to STEP.corrupt, or STEP.2.corrupt, …; the name."""
    name, n = folder.with_name(f"{folder.name}.corrupt"), 1
    while name.exists():
        n += 1
        name = folder.with_name(f"{folder.name}.{n}.corrupt")
    folder.rename(name)
    return name.name


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
