"""TensorBoard's event files, written at once: no queue that fills, no thread that holds a lock."""

import socket
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtransfer.runs.files import Appended


@contextmanager
def tensorboard(directory: Path, *, up_to: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Opens a TensorBoard event file; what older files hold beyond step `up_to` is superseded.

    An event file is for looking at: where it can't be written (a full disk) the records are left out of it with one
    warning, and the training goes on.

    Yields:
      `log(record)`, a record being a dict of `step` and numbers by name.
    """
    from tensorboardX.proto import event_pb2, summary_pb2

    messages: Any = event_pb2  # whose names are made when it is imported
    value_of, summary_of = summary_pb2.Summary.Value, summary_pb2.Summary  # pyright: ignore[reportAttributeAccessIssue]

    def event(**content: Any) -> Any:
        return messages.Event(wall_time=time.time(), **content)

    first = [event(file_version="brain.Event:2")]
    if any(directory.glob("events*")):
        first.append(event(step=up_to + 1, session_log=messages.SessionLog(status=messages.SessionLog.START)))
    file: Appended | None = None

    def give_up(error: OSError) -> None:
        nonlocal file
        if file is not None:
            file.close()
        file = None
        warnings.warn(
            f"could not write to {directory}: {error.strerror or error}; TensorBoard gets no more of this run, whose "
            f"record is metrics.jsonl",
            stacklevel=4,
        )

    def log(record: dict[str, Any]) -> None:
        if file is None:
            return
        values = [value_of(tag=name, simple_value=value) for name, value in record.items() if name != "step"]
        try:
            file.write(_framed(event(step=record["step"], summary=summary_of(value=values))))
        except OSError as error:
            give_up(error)

    try:
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"  # they are read in the order of names
        file = Appended(directory / name, new=True)
        file.write(b"".join(map(_framed, first)))
    except OSError as error:
        give_up(error)
    try:
        yield log
    finally:
        if file is not None:
            file.close()


def _framed(event: Any) -> bytes:
    """Returns an event as a TFRecord: length, its checksum, the bytes, their checksum."""
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
