"""Where metrics go: a JSONL file that survives interruption, TensorBoard, a progress bar."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtransfer.runs.events import tensorboard
from jaxtransfer.runs.files import Appended, told, write_atomically

__all__ = ["Logger", "Record", "jsonl", "progress_bar", "read_jsonl", "tensorboard"]

Record = dict[str, Any]
Logger = Callable[[Record], None]  # a record holds "step" and numbers by name


def read_jsonl(path: Path, *, up_to: int | None = None) -> list[Record]:
    """Returns the records of a JSONL file up to a step; lines that are none are left out with a warning.

    A last line that was cut off, by a kill in the middle of it, is left out in silence.
    """
    if not path.exists():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    records = [_record(line) for line in lines]
    if bad := [number for number, record in enumerate(records, 1) if record is None]:
        warnings.warn(
            f"{path}: {len(bad)} of {len(lines)} lines are no records and left out, the first is line {bad[0]}; the "
            f"best step and the patience rest on the others",
            stacklevel=2,
        )
    records.append(_record(rest))
    return [record for record in records if record is not None and (up_to is None or record["step"] <= up_to)]


def _record(line: bytes) -> Record | None:
    """Returns what a line holds, or None where that is no record: a dict of a whole `step` and numbers."""
    try:
        record = json.loads(line)
    except ValueError:  # or no UTF-8
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    return record if all(type(value) in (int, float) for value in record.values()) else None


@contextmanager
def jsonl(path: Path, *, up_to: int) -> Iterator[Logger]:
    """Opens a JSONL file to append to, after dropping what was recorded beyond step `up_to`.

    Raises:
      InputError: here, or from the logger, where the file can't be written; it then ends with a whole line.
    """
    records = read_jsonl(path, up_to=up_to)
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
        file = Appended(path)

    def log(record: Record) -> None:
        with told(path):
            file.write(json.dumps(record).encode() + b"\n")

    try:
        yield log
    finally:
        file.close()


@contextmanager
def progress_bar(total: int, start: int, *, show: bool | None) -> Iterator[Callable[[int, str], None]]:
    """Shows a bar on stderr; by default only where that is a terminal. Yields `update(step, text)`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not (console.is_terminal if show is None else show):
        yield lambda step, text: None
        return
    columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("compiling", total=total, completed=start)

        def update(step: int, text: str) -> None:
            progress.update(task, completed=step, description=text or None)

        yield update
