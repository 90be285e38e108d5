"""Where metrics go: a JSONL file that survives interruption, TensorBoard, a progress bar."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtransfer.train.run import write_atomically

Record = dict[str, Any]
Logger = Callable[[Record], None]  # a record holds "step" and numbers by name


def read_jsonl(path: Path, *, up_to: int | None = None) -> list[Record]:
    """Returns the records of a JSONL file up to a step; a last line that was cut off is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if up_to is None or record["step"] <= up_to:
            records.append(record)
    return records


@contextmanager
def jsonl(path: Path, *, up_to: int) -> Iterator[Logger]:
    """Opens a JSONL file to append to, after dropping what was recorded beyond step `up_to`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(r) + "\n" for r in read_jsonl(path, up_to=up_to)))
    with path.open("a") as file:

        def log(record: Record) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        yield log


@contextmanager
def tensorboard(directory: Path, *, up_to: int) -> Iterator[Logger]:
    """Opens a TensorBoard event file; what older files hold beyond step `up_to` is superseded."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(directory), purge_step=up_to + 1 if up_to else None) as writer:

        def log(record: Record) -> None:
            for name, value in record.items():
                if name != "step":
                    writer.add_scalar(name, value, record["step"])

        yield log


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
