"""Checkpoints that are whole or not there: written aside, digested, renamed; verified before they are used."""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import tree
from jaxtransfer.devices import processes
from jaxtransfer.errors import InputError, NonFiniteLossError

_NAME = re.compile(r"step_(\d+)$")
_DIGESTS = "digests.json"


class Restored(NamedTuple):
    """What a checkpoint holds: leaves by path, as NumPy arrays, and what was noted beside them."""

    step: int
    leaves: dict[str, np.ndarray]
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run: saved in the background, the last `keep` and the best one kept.

    A checkpoint is written by Orbax into a temporary folder together with a digest of each file, and appears under
    its name by one atomic rename: a process killed at any moment leaves it whole or absent. Restoring verifies the
    digests; a damaged checkpoint is set aside with a warning and the one before is used.

    Args:
      directory: where they live.
      keep: how many of the newest are kept.
      score: from a checkpoint's `meta` to its score, the larger the better, or None where it has none.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2, score: Callable[[dict], float | None] = lambda _: None):
        self.directory, self.keep, self.score = Path(directory).absolute(), keep, score
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future | None = None

    def steps(self) -> list[int]:
        """Returns the steps there are, ascending."""
        return steps(self.directory)

    def last_good(self) -> str:
        """Says which checkpoint is left when training can't go on."""
        self.wait()
        saved = self.steps()
        return (
            f"the last good checkpoint is step {saved[-1]} in {self.directory}" if saved else "no checkpoint was saved"
        )

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Copies the state to the host and writes it in the background.

        Raises:
          NonFiniteLossError: where a floating leaf beside the optimiser's is not finite; nothing is written.
          InputError: where the previous save failed (a full disk); what was saved before it is still there.
        """
        leaves = {path: _to_host(leaf) for path, leaf in tree.leaves_by_path(state).items()}
        for path, leaf in leaves.items():
            if path.startswith("opt_state/"):  # an optimiser may start from infinity: the best value so far
                continue
            if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.all(np.isfinite(leaf)):
                raise NonFiniteLossError(
                    f"{path} is not finite after step {step}; {self.last_good()}. Lower the learning rate"
                )
        self.wait()
        if processes.is_first():
            self._pending = self._writer.submit(self._write, step, leaves, meta)

    def wait(self) -> None:
        """Waits until the last save is on disk; raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the last save and ends the writer."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def restore(self) -> Restored | None:
        """Returns the newest checkpoint that is whole, or None; damaged ones are set aside with a warning.

        Of several processes the first one looks and chooses, and all of them read it.

        Raises:
          InputError: where a link lies among the checkpoints, which saving would follow to files of somebody else.
        """
        mine: list[Restored | None] = []

        def choose() -> int | None:
            mine.append(found := self._newest())
            return None if found is None else found.step

        step = processes.first_tells(choose)
        if step is None:
            return None
        return mine[0] if mine else read(self.directory, step)

    def _newest(self) -> Restored | None:
        for entry in (*self.directory.glob(".writing-*"), *(_path(self.directory, step) for step in self.steps())):
            _refuse_link(entry)
        for leftover in self.directory.glob(".writing-*"):
            _remove(leftover)
        for step in reversed(self.steps()):
            try:
                return read(self.directory, step)
            except DamagedCheckpointError as error:
                aside = _set_aside(_path(self.directory, step))
                warnings.warn(f"{error}; set aside as {aside.name}, using the one before", stacklevel=2)
        return None

    def _write(self, step: int, leaves: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        final, temporary = _path(self.directory, step), self.directory / f".writing-{step}"
        _refuse_link(temporary)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _remove(temporary)
            temporary.mkdir()  # raises where something has come there since: what is written into is our own
            checkpointer, args = _orbax()
            checkpointer.save(temporary / "state", args=args.PyTreeSave({p: v for p, v in leaves.items() if v.size}))
            (temporary / "meta.json").write_text(json.dumps({"step": step, **meta}))
            digests = {str(file.relative_to(temporary)): _digest(file) for file in _files(temporary)}
            (temporary / _DIGESTS).write_text(json.dumps(digests))
            for file in _files(temporary):
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
        except Exception as error:
            _remove(temporary)
            reason = str(error).partition(" [")[0]  # Orbax appends its whole plan
            if os.strerror(errno.ENOSPC) in reason:
                reason = os.strerror(errno.ENOSPC)
            raise InputError(
                f"could not save step {step} in {self.directory}: {reason}; earlier checkpoints are unharmed. Free "
                f"some space or mend the folder's rights, and run the same command again"
            ) from error
        self._prune()

    def _prune(self) -> None:
        steps = self.steps()
        kept, scores = set(steps[-self.keep :]), {}
        for step in steps:
            try:
                score = self.score(json.loads((_path(self.directory, step) / "meta.json").read_text()))
            except (OSError, ValueError):
                continue
            if score is not None:
                scores[step] = score
        if scores:
            kept.add(max(scores, key=lambda step: (scores[step], -step)))
        for step in steps:
            if step not in kept:  # renamed first: a kill in between leaves no half of it under its name
                rubbish = self.directory / f".writing-pruned-{step}"
                _path(self.directory, step).rename(rubbish)
                _remove(rubbish)


class DamagedCheckpointError(InputError):
    """A checkpoint whose files are not what was written."""


def read(directory: str | Path, step: int | None = None) -> Restored:
    """Reads one checkpoint, the newest by default, after verifying every file.

    Raises:
      InputError: where there is none.
      DamagedCheckpointError: where a file is missing, truncated or changed.
    """
    directory = Path(directory).absolute()
    there = steps(directory)
    if not there or (step is not None and step not in there):
        wanted = "a checkpoint" if step is None else f"a checkpoint of step {step}"
        raise InputError(f"expected {wanted} in {directory}; found {there or 'none'}")
    step = there[-1] if step is None else step
    path = _path(directory, step)
    _refuse_link(path)
    try:
        digests = json.loads((path / _DIGESTS).read_text())
        written = {str(file.relative_to(path)) for file in _files(path)} - {_DIGESTS}
        if missing := sorted(written - digests.keys()):  # an emptied list would verify nothing
            raise ValueError(f"{_DIGESTS} lacks {missing[0]}")
        if bad := [name for name, digest in digests.items() if _digest(path / name) != digest]:
            raise ValueError(f"{bad[0]} has changed since it was written")
        meta = json.loads((path / "meta.json").read_text())
        return Restored(step, _orbax()[0].restore(path / "state"), meta)
    except Exception as error:
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {error}") from error


def best(directory: str | Path, score: Callable[[dict], float | None]) -> int | None:
    """Returns the step of the checkpoint with the largest score (the earliest of equals), or None."""
    directory, scores = Path(directory).absolute(), {}
    for step in steps(directory):
        try:
            value = score(json.loads((_path(directory, step) / "meta.json").read_text()))
        except (OSError, ValueError) as error:
            warnings.warn(f"checkpoint {_path(directory, step)} is damaged and left out: {error}", stacklevel=2)
            continue
        if value is not None:
            scores[step] = value
    return max(scores, key=lambda step: (scores[step], -step)) if scores else None


def fill(like: Any, leaves: dict[str, np.ndarray]) -> Any:
    """Returns a tree of the structure of `like` with the leaves of a checkpoint.

    Raises:
      InputError: where the checkpoint is of another structure, listing what differs.
    """
    expected = {path: _to_host(leaf) for path, leaf in tree.leaves_by_path(like).items() if leaf.size}
    if any(wrong := tree.differences(expected, leaves)):
        raise InputError(f"the checkpoint is of another run {wrong}")
    for path, leaf in expected.items():
        if leaf.dtype != leaves[path].dtype:
            raise InputError(f"the checkpoint is of another run: {path} is {leaves[path].dtype}, not {leaf.dtype}")

    def pick(key_path, old):
        path = tree.path_of(key_path)
        if path not in leaves:
            return old
        if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(leaves[path]), impl=jax.random.key_impl(old))
        if isinstance(old, jax.Array) and not old.is_fully_replicated:  # each part goes to its device
            return jax.device_put(leaves[path], old.sharding, may_alias=False)
        return jnp.array(leaves[path], copy=True)

    return jax.tree_util.tree_map_with_path(pick, like)


def nested(leaves: dict[str, np.ndarray], prefix: str) -> dict[str, Any]:
    """Returns the leaves below `prefix` as nested dicts: the `params` of a run without its optimiser."""
    start = prefix + "/"
    return tree.nested({path.removeprefix(start): leaf for path, leaf in leaves.items() if path.startswith(start)})


def _to_host(leaf: Any) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.array(leaf, copy=True)  # on CPU a view of the device's buffer, which the next step donates


def _orbax() -> tuple[Any, Any]:
    """Returns Orbax's checkpointer and its arguments; imported where something is saved, as it takes a while."""
    import orbax.checkpoint as ocp

    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="one"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone), ocp.args


def _path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:09d}"


def steps(directory: Path) -> list[int]:
    """Returns the steps of the checkpoints in a directory, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(match[1]) for entry in directory.iterdir() if (match := _NAME.match(entry.name)))


def _files(folder: Path) -> list[Path]:
    """Returns the files of a checkpoint; not those that desktops and network file systems leave in any folder."""
    return sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith((".nfs", ".DS_")))


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise InputError(
            f"{path} is a link to {os.readlink(path)}; expected a folder of this run's own, since a link would be "
            f"written through. Remove it, and run the same command again"
        )


def _remove(path: Path) -> None:
    """Removes a folder or a file, as far as that works; a link is left alone."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif not path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "blake2b").hexdigest()


def _set_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(aside)
    return aside
