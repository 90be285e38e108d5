"""Arrays of a state on disk, by Orbax: whole ones by one process, split ones by all that hold parts of them."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtransfer.devices import processes
from jaxtransfer.devices.parts import is_split

_ENDING = 60  # seconds that a write which was called off may take to end
_PATIENCE = 3600  # seconds that processes wait for the slowest one's part; one that ends is noticed at once


def copied(leaf: Any) -> Any:
    """Returns a leaf as it is saved: on the host, but for one that is split over processes; keys as their data.

    Of that each process copies its parts where they lie in its own memory, on a CPU. Others are fetched as the save
    begins, which waits for it.
    """
    if processes.is_key(leaf):
        leaf = jax.random.key_data(processes.local(leaf))
    if not is_split(leaf):
        return np.array(leaf, copy=True)  # on CPU a view of the device's buffer, which the next step donates
    if next(iter(leaf.sharding.device_set)).platform != "cpu":
        return leaf
    parts = [jax.device_put(np.array(part.data, copy=True), part.device) for part in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


def write(folder: Path, leaves: Mapping[str, np.ndarray]) -> None:
    """Writes arrays that this process has."""
    checkpointer, args = _orbax()
    checkpointer.save(folder, args=args.PyTreeSave({path: leaf for path, leaf in leaves.items() if leaf.size}))


@dataclasses.dataclass(frozen=True)
class Writing:
    """Parts of arrays that are being written: `wait()` until this process's are, or `cancel()`."""

    futures: Sequence[Any]

    def wait(self) -> None:
        """Waits for the parts of this process, which may wait for those of the others."""
        for future in self.futures:
            future.result()

    def cancel(self) -> None:
        """Ends what waits for processes that will not write theirs; single files under way may still appear."""
        for future in self.futures:
            future.cancel()
        for future in self.futures:
            with contextlib.suppress(Exception, asyncio.CancelledError):
                future.result(timeout=_ENDING)


def begin(folder: Path, leaves: Mapping[str, Any]) -> Writing:
    """Begins to write arrays of which each process has parts.

    Args:
      folder: there, and empty.
      leaves: the same ones in all processes; what is whole is written by the first one.
    """
    import orbax.checkpoint as ocp
    from etils import epath  # Orbax takes no others here

    item = {path: leaf for path, leaf in leaves.items() if leaf.size}
    handler, target = ocp.PyTreeCheckpointHandler(), epath.Path(folder)
    with concurrent.futures.ThreadPoolExecutor(1) as apart:  # where a notebook's loop runs, no other one may
        saving = apart.submit(lambda: asyncio.run(handler.async_save(target, args=ocp.args.PyTreeSave(item))))
    return Writing(saving.result() or ())


def finish(folder: Path) -> None:
    """Makes one checkpoint of the parts, once all processes have written theirs; the first one does."""
    import orbax.checkpoint as ocp
    from etils import epath

    ocp.PyTreeCheckpointHandler().finalize(epath.Path(folder))


def own_part() -> str:
    """Returns the folder into which Orbax writes the parts of this process."""
    return f"ocdbt.process_{jax.process_index()}"


def meeting(name: str) -> Callable[[str], None]:
    """Returns what lets the processes wait for each other beside their training: `meet(phase)`.

    No program of the devices is run for it, so that it may be called in a thread.

    Args:
      name: that they have in common, and that no other meeting has.
    """
    from orbax.checkpoint.multihost import get_barrier_sync_fn

    wait = get_barrier_sync_fn()
    return lambda phase: wait(key=f"jaxtransfer/{name}/{phase}", timeout_ms=_PATIENCE * 1000)


def read(folder: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arrays of a checkpoint by path: NumPy's, but for those that are to be split.

    Args:
      folder: where they were written.
      like: arrays by path; of those that are split over devices each process reads the parts that its own hold.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    checkpointer, args = _orbax()

    def how(path: str, known: Any) -> Any:
        asked = like.get(path)
        if isinstance(asked, jax.Array) and not asked.is_fully_replicated and asked.shape == tuple(known.shape):
            return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=asked.sharding)
        return ocp.RestoreArgs(restore_type=np.ndarray)

    there: Any = ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder))
    return checkpointer.restore(folder, args=args.PyTreeRestore(restore_args={p: how(p, m) for p, m in there.items()}))


def _orbax() -> tuple[Any, Any]:
    """Returns Orbax's checkpointer and its arguments; imported where something is saved, as it takes a while.

    It waits for no other process.
    """
    import orbax.checkpoint as ocp

    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="one"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone), ocp.args
