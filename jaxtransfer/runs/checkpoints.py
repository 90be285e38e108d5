"""Checkpoints that are whole or not there: written aside, digested, renamed; verified before they are used."""

import concurrent.futures
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import tree
from jaxtransfer.devices import processes
from jaxtransfer.devices.parts import is_split
from jaxtransfer.errors import InputError, NonFiniteLossError
from jaxtransfer.runs import arrays
from jaxtransfer.runs.checkpoint_files import (
    ARRAYS,
    WRITING,
    commit,
    meta_of,
    not_saved,
    path_of,
    prepare,
    reason_of,
    refuse_link,
    remove,
    set_aside,
    verified,
)
from jaxtransfer.runs.checkpoint_files import DamagedCheckpointError as DamagedCheckpointError
from jaxtransfer.runs.checkpoint_files import steps as steps
from jaxtransfer.runs.collective import begin_together


class Restored(NamedTuple):
    """What a checkpoint holds: leaves by path, NumPy arrays or in parts on devices, and what was noted beside them."""

    step: int
    leaves: dict[str, Any]
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run: saved in the background, the last `keep` and the best one kept.

    A checkpoint is written by Orbax into a temporary folder together with a digest of each file, and appears under
    its name by one atomic rename: a process killed at any moment leaves it whole or absent. Restoring verifies the
    digests; a damaged checkpoint is set aside with a warning and the one before is used.

    Of several processes the first one writes what is whole on each device. Where leaves are split over processes each
    of these writes the parts that it holds, and reads those that it is to hold: none needs all of a state.

    Args:
      directory: where they live; of several processes all can read and write it.
      keep: how many of the newest are kept.
      score: from a checkpoint's `meta` to its score, the larger the better, or None where it has none.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2, score: Callable[[dict], float | None] = lambda _: None):
        self.directory, self.keep, self.score = Path(directory).absolute(), keep, score
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future | None = None
        self._are_finite = jax.jit(lambda leaves: {path: jnp.all(jnp.isfinite(leaf)) for path, leaf in leaves.items()})

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
        """Copies the state to the host and writes it in the background; of several processes all call it.

        Raises:
          NonFiniteLossError: where a floating leaf beside the optimiser's is not finite; nothing is written.
          InputError: where the previous save failed (a full disk); what was saved before it is still there.
        """
        leaves = {path: arrays.copied(leaf) for path, leaf in tree.leaves_by_path(state).items()}
        self._check_finite(step, leaves)
        self.wait()
        if any(map(is_split, leaves.values())):
            finish = begin_together(self.directory, step, leaves, meta)
            self._pending = self._writer.submit(self._finish_together, finish)
        elif processes.is_first():
            self._pending = self._writer.submit(self._write, step, leaves, meta)

    def _check_finite(self, step: int, leaves: Mapping[str, Any]) -> None:
        looked_at = {  # an optimiser may start from infinity: the best value so far
            path: leaf
            for path, leaf in leaves.items()
            if not path.startswith("opt_state/") and jnp.issubdtype(leaf.dtype, jnp.floating)
        }
        split = jax.device_get(self._are_finite({path: leaf for path, leaf in looked_at.items() if is_split(leaf)}))
        for path, leaf in looked_at.items():
            if not (split[path] if path in split else np.all(np.isfinite(leaf))):
                raise NonFiniteLossError(
                    f"{path} is not finite after step {step}; {self.last_good()}. Lower the learning rate"
                )

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

    def restore(self, like: Any = None) -> Restored | None:
        """Returns the newest checkpoint that is whole, or None; damaged ones are set aside with a warning.

        Several processes look at a part of its files each, and agree.

        Args:
          like: a state; what of it is split over devices is read in its parts.

        Raises:
          InputError: where a link lies among the checkpoints, which saving would follow to files of somebody else.
        """
        for step in reversed(processes.first_tells(self._tidied)):
            try:
                return self._read(step, {} if like is None else tree.leaves_by_path(like))
            except DamagedCheckpointError as error:
                processes.first_does(lambda step=step, error=error: self._set_aside(step, error))
        return None

    def _tidied(self) -> list[int]:
        """Removes what killed processes left; returns the steps there are."""
        there = self.steps()
        for entry in (*self.directory.glob(f"{WRITING}*"), *(path_of(self.directory, step) for step in there)):
            refuse_link(entry)
        for leftover in self.directory.glob(f"{WRITING}*"):
            remove(leftover)
        return there

    def _read(self, step: int, like: Mapping[str, Any]) -> Restored:
        if processes.count() == 1:
            return read(self.directory, step, like=like)
        path, share = path_of(self.directory, step), (processes.index(), processes.count())
        try:
            meta = processes.agreed(lambda: verified(path, share))
            return Restored(step, processes.agreed(lambda: arrays.read(path / ARRAYS, like)), meta)
        except InputError as error:
            raise _damaged(path, error) from error

    def _set_aside(self, step: int, error: Exception) -> None:
        aside = set_aside(path_of(self.directory, step))
        warnings.warn(f"{error}; set aside as {aside.name}, using the one before", stacklevel=2)

    def _write(self, step: int, leaves: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
        temporary = self.directory / f"{WRITING}{step}"
        refuse_link(temporary)
        try:
            prepare(temporary)
            arrays.write(temporary / ARRAYS, leaves)
            commit(temporary, path_of(self.directory, step), {"step": step, **meta}, {})
        except Exception as error:
            remove(temporary)
            raise InputError(not_saved(step, self.directory, reason_of(error))) from error
        self._prune()

    def _finish_together(self, finish: Callable[[], None]) -> None:
        finish()
        if processes.is_first():
            self._prune()

    def _prune(self) -> None:
        there = self.steps()
        kept, scores = set(there[-self.keep :]), {}
        for step in there:
            try:
                score = self.score(meta_of(self.directory, step))
            except (OSError, ValueError):
                continue
            if score is not None:
                scores[step] = score
        if scores:
            kept.add(max(scores, key=lambda step: (scores[step], -step)))
        for step in there:
            if step not in kept:  # renamed first: a kill in between leaves no half of it under its name
                rubbish = self.directory / f"{WRITING}pruned-{step}"
                path_of(self.directory, step).rename(rubbish)
                remove(rubbish)


def read(directory: str | Path, step: int | None = None, *, like: Mapping[str, Any] | None = None) -> Restored:
    """Reads one checkpoint, the newest by default, after verifying every file.

    Args:
      directory: of the checkpoints.
      step: which one.
      like: arrays by path; those that are split over devices are read in their parts, all others as NumPy arrays.

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
    path = path_of(directory, step)
    refuse_link(path)
    try:
        meta = verified(path)
        return Restored(step, arrays.read(path / ARRAYS, like or {}), meta)
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"checkpoint {path} is damaged: {error}")


def best(directory: str | Path, score: Callable[[dict], float | None]) -> int | None:
    """Returns the step of the checkpoint with the largest score (the earliest of equals), or None."""
    directory, scores = Path(directory).absolute(), {}
    for step in steps(directory):
        try:
            value = score(meta_of(directory, step))
        except (OSError, ValueError) as error:
            warnings.warn(f"checkpoint {path_of(directory, step)} is damaged and left out: {error}", stacklevel=2)
            continue
        if value is not None:
            scores[step] = value
    return max(scores, key=lambda step: (scores[step], -step)) if scores else None


def fill(like: Any, leaves: Mapping[str, Any]) -> Any:
    """Returns a tree of the structure of `like` with the leaves of a checkpoint.

    Raises:
      InputError: where the checkpoint is of another structure, listing what differs.
    """
    expected = {path: _as_saved(leaf) for path, leaf in tree.leaves_by_path(like).items() if leaf.size}
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
        if isinstance(leaves[path], jax.Array):  # in its parts, where they belong
            return leaves[path]
        if isinstance(old, jax.Array) and not old.is_fully_replicated:
            return jax.device_put(leaves[path], old.sharding, may_alias=False)
        return jnp.array(leaves[path], copy=True)

    return jax.tree_util.tree_map_with_path(pick, like)


def _as_saved(leaf: Any) -> Any:
    """Returns the shape and type in which a leaf is saved."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return leaf


def nested(leaves: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the leaves below `prefix` as nested dicts: the `params` of a run without its optimiser."""
    start = prefix + "/"
    return tree.nested({path.removeprefix(start): leaf for path, leaf in leaves.items() if path.startswith(start)})
