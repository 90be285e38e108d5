"""Several processes that train one model together: who they are, what the first tells the others, where values lie.

JAX's own runtime joins them; each runs the same program on global arrays, of which it holds a part. What isn't of the
devices, files and prints, is done by the first process, and the others wait to be told what came of it.
"""

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from jaxtransfer.devices.peers import LOST, Watch
from jaxtransfer.errors import InputError, LostProcessError

HEARTBEAT = 40
"""Seconds after which a process that says nothing is lost."""
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Variables that say where process 0 listens, how many processes there are, and which one this is."""
_PAGE = 4096  # bytes that the first process tells at a time
_LOSS = ("gloo", "nccl", "connection", "heartbeat", "coordination", "unavailable", "deadline", "barrier", "aborted")
_watch: Watch | None = None
_alone = 0  # how deep we are in `alone`; for all threads, which make batches for whoever opened them


class ToldError(InputError):
    """What went wrong in the first process, as the others are told: it has said so itself."""


def start(*, wait: float = 300) -> None:
    """Joins the processes of a job, before anything else is asked of JAX.

    They find each other by the variables `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or as
    `jax.distributed.initialize` does on TPU pods, under SLURM, Open MPI and Kubernetes. On CPUs they meet by gloo.
    SIGTERM stays ours: JAX would take it for its own notice of preemption, and the process would not end.

    Args:
      wait: seconds until all of them must be there; else this process ends, with a line on stderr and exit code 75.

    Raises:
      InputError: where nothing tells of other processes.
    """
    if jax.distributed.is_initialized():
        return
    with contextlib.suppress(AttributeError, ValueError):
        jax.config.update("jax_enable_preemption_service", False)
    with contextlib.suppress(AttributeError, ValueError):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    known: dict[str, Any] = {}
    if COUNT in os.environ or INDEX in os.environ:
        try:
            known = {"num_processes": int(os.environ[COUNT]), "process_id": int(os.environ[INDEX])}
            known["coordinator_address"] = os.environ[ADDRESS]
        except (KeyError, ValueError) as error:
            raise InputError(
                f"the processes of a job are told by {ADDRESS}=host:port, {COUNT} and {INDEX} together; got {error}"
            ) from None
    # JAX's own answer to processes that don't come is to abort, with a stack and the words that another one died
    late = threading.Timer(wait, _end_unjoined, (known, wait))
    late.daemon = True
    late.start()
    times: dict[str, Any] = {"heartbeat_timeout_seconds": HEARTBEAT, "shutdown_timeout_seconds": HEARTBEAT}
    try:
        jax.distributed.initialize(**known, **times, initialization_timeout=math.ceil(wait) + HEARTBEAT)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"nothing tells of other processes ({' '.join(str(error).split())}): expected the environment of a TPU "
            f"pod, SLURM, Open MPI or Kubernetes, or {ADDRESS}=host:port, {COUNT} and {INDEX}; jaxtransfer launch "
            f"--processes 2 -- ... starts them on this machine"
        ) from None
    finally:
        late.cancel()
    global _watch
    if jax.process_count() > 1:
        host = os.environ.get(ADDRESS, "").rpartition(":")[0] or socket.gethostname()
        _watch = Watch(jax.process_index(), jax.process_count(), _broadcast, host)


def _end_unjoined(known: Mapping[str, Any], wait: float) -> None:
    """Ends this process, which waits inside of JAX, with a line."""
    who = "process {process_id} of {num_processes}".format(**known) if known else "a process of the job"
    where = f" at {known['coordinator_address']}" if known else ""
    told = (
        f"{who} waited {wait:.0f} s{where} for the others, which did not all come; start all of them within that time"
    )
    os.write(2, f"jaxtransfer: error: {told}\n".encode())
    os._exit(LOST)


def joined() -> bool:
    """Returns whether this is one of several processes; without asking for devices where nobody has."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def count() -> int:
    """Returns how many processes work together here: those of the job, or one within `alone`."""
    return 1 if _alone else jax.process_count()


def index() -> int:
    """Returns which of them this is."""
    return 0 if _alone else jax.process_index()


def is_first() -> bool:
    """Returns whether this is the process that writes and prints."""
    return jax.process_index() == 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Works as a single process meanwhile, on its own devices and whole batches: what others needn't do as well."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def first_does(work: Callable[[], Any]) -> Any:
    """Returns what `work()` gives, which the first process alone calls, and None in the others; all wait for it.

    Raises:
      InputError: in all processes, where it raised one there; whatever else goes wrong there is an error of that
        process, and a `ToldError` in the others.
    """
    return _by_first(work, tells=False)


def first_tells(work: Callable[[], Any]) -> Any:
    """Returns what `work()` gives in the first process, JSON types, in all of them. See `first_does`."""
    return _by_first(work, tells=True)


def _by_first(work: Callable[[], Any], *, tells: bool) -> Any:
    if count() == 1:
        return work()
    if not is_first():
        told = json.loads(_broadcast(None))
        if "error" in told:
            raise ToldError(told["error"])
        return told.get("value")
    try:
        with alone():
            value = work()
        text = json.dumps({"value": value} if tells else {})
    except Exception as error:
        _broadcast(json.dumps({"error": str(error) or type(error).__name__}))
        raise
    _broadcast(text)
    return value


def agreed(work: Callable[[], Any]) -> Any:
    """Returns what `work()` gives in this process; all do it, and wait for each other.

    Raises:
      ToldError: in all processes, where it raised an error in one: what the first of them says.
    """
    if count() == 1:
        return work()
    value, failed = None, None
    try:
        value = work()
    except Exception as error:
        failed = error
    text = "" if failed is None else str(failed) or type(failed).__name__
    said = np.asarray(multihost_utils.process_allgather(_page(text.encode()[:_PAGE]))).astype(np.uint8)
    for page in said:
        if told := page.tobytes().rstrip(b"\0").decode(errors="replace"):
            raise ToldError(told) from failed
    return value


def _broadcast(text: str | None) -> str:
    """Returns the text of the first process, in pages of fixed size: one small program serves all texts."""
    whole = (text or "").encode()
    count_ = int(_page_of_first(len(whole).to_bytes(8, "little"))[:8].view(np.uint64)[0])
    pages = [_page_of_first(whole[start : start + _PAGE]) for start in range(0, count_, _PAGE)]
    return b"".join(page.tobytes() for page in pages)[:count_].decode()


def _page_of_first(part: bytes) -> np.ndarray:
    return np.asarray(multihost_utils.broadcast_one_to_all(_page(part))).astype(np.uint8)


def _page(part: bytes) -> np.ndarray:
    page = np.zeros(_PAGE, np.uint8)
    page[: len(part)] = np.frombuffer(part, np.uint8)
    return page


def values_of_first(values: Any) -> Any:
    """Returns a tree with the first process's values, NumPy arrays; each gives one of the same structure and shapes."""
    return values if count() == 1 else multihost_utils.broadcast_one_to_all(values)


def gathered(batch: Any) -> Any:
    """Returns the rows of all processes in their order, NumPy arrays; each gives its part of a batch."""
    if count() == 1:
        return batch

    def whole(rows: Any) -> np.ndarray:
        rows = np.asarray(rows)
        return np.asarray(multihost_utils.process_allgather(rows, tiled=True)).astype(rows.dtype)

    return jax.tree.map(whole, batch)


def summed(numbers: np.ndarray) -> np.ndarray:
    """Returns the sums over the processes of doubles that each of them gives."""
    if count() == 1:
        return numbers
    words = np.ascontiguousarray(numbers, np.float64).view(np.uint32)  # devices know no doubles, by default
    there = np.asarray(multihost_utils.process_allgather(words)).astype(np.uint32)
    return np.ascontiguousarray(there).view(np.float64).sum(axis=0)


def on_host(values: Any) -> Any:
    """Returns a tree of global arrays as NumPy arrays, whole in each process."""
    if all(_readable(leaf) for leaf in jax.tree.leaves(values)):
        return jax.device_get(values)
    return jax.tree.map(
        lambda leaf: jax.device_get(leaf) if _readable(leaf) else multihost_utils.process_allgather(leaf, tiled=True),
        values,
    )


def _readable(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def local(values: Any) -> Any:
    """Returns a tree of arrays that are whole on each device as this process has them on one of its own: no copies.

    An array that is split stays as it is: of that a process has a part.
    """

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or not leaf.is_fully_replicated:
            return leaf
        if is_key(leaf):
            return jax.random.wrap_key_data(own(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        return leaf.addressable_data(0)

    return jax.tree.map(own, values)


def put(values: Any, sharding: NamedSharding) -> Any:
    """Returns a tree whole on every device of a mesh over processes; each process has all of its values.

    A key goes there as its data, which is what JAX can place over processes.
    """

    def everywhere(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        if is_key(leaf):
            data = everywhere(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        leaf = local(leaf) if isinstance(leaf, jax.Array) else np.asarray(leaf)
        own = sorted(sharding.addressable_devices, key=lambda device: device.id)
        copies = [jax.device_put(leaf, device) for device in own]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, copies)

    return jax.tree.map(everywhere, values)


def is_key(leaf: Any) -> bool:
    """Returns whether an array is of random keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def in_order(devices: np.ndarray) -> np.ndarray:
    """Returns devices so that a batch's rows lie process by process, as each makes its part of them.

    Raises:
      InputError: for devices of some processes only, or more of one than of another.
    """
    ordered = sorted(devices.ravel(), key=lambda device: device.process_index)
    owned = [sum(device.process_index == one for device in ordered) for one in range(jax.process_count())]
    if min(owned) < 1 or min(owned) < max(owned):
        raise InputError(
            f"a mesh over {len(owned)} processes takes as many devices of each, one or more; this one has "
            f"{', '.join(map(str, owned))} of them. jt.devices.device_mesh() takes them all"
        )
    return np.array(ordered)


@contextlib.contextmanager
def loss_told() -> Iterator[None]:
    """Makes what the devices raise when another process is gone an error that says so.

    Raises:
      LostProcessError: in its place.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = " ".join(str(error).split())
        if count() == 1 or not any(word in text.lower() for word in _LOSS):
            raise
        raise LostProcessError(
            f"process {index()} of {count()} lost another one, which ended or can't be reached ({text[:160]}); the "
            f"same command resumes from the last checkpoint"
        ) from error


def leave(code: int) -> None:
    """Ends the process; where it failed at once, since JAX would wait for the others, and they for this one.

    The first one hosts what the others listen to, and gives them a moment to tell the same of themselves.
    """
    if not joined():
        sys.exit(code)
    if code == 0:
        if _watch is not None:
            _watch.over()
        jax.distributed.shutdown()
        sys.exit(0)
    if _watch is not None:
        _watch.leaving()
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(1.5)
    os._exit(code)
