"""Where `predict` writes: JSON lines on stdout, or a file of JSON lines, CSV or Parquet, there once it is whole."""

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtransfer.data.images import shown
from jaxtransfer.errors import InputError
from jaxtransfer.files import expanded

KINDS = (".jsonl", ".csv", ".parquet")
Record = Mapping[str, Any]
"""`image`, and `error`, or `class`, `probability` and `top` (a list of both), `labels` (probabilities by
name), `tasks` (class, probability and top of each), `features`."""
_GROUP = 4096  # rows that Parquet writes at once


def check_out(out: Path | None, features: bool) -> None:
    """Raises for a file that can't be written, before anything is read."""
    if out is None:
        return
    if out.suffix.lower() not in KINDS:
        raise InputError(f"--out is a file that ends in {', '.join(KINDS[:-1])} or {KINDS[-1]}; got {shown(out)}")
    if not expanded(out).parent.is_dir() or expanded(out).is_dir():
        what = "is a folder" if expanded(out).is_dir() else f"there is no folder {shown(out.parent)}"
        raise InputError(f"--out is a file to write; {shown(out)}: {what}")
    if out.suffix.lower() == ".csv" and features:
        raise InputError("--features are lists, which CSV has no place for; choose --out NAME.parquet or NAME.jsonl")
    if out.suffix.lower() == ".parquet":
        _arrow()


@contextmanager
def opened(
    out: Path | None, top: int, *, kind: str, features: bool, tasks: Sequence[str] = ()
) -> Iterator[Callable[[list[Record]], None]]:
    """Yields `write(records)`, in the order of the calls; the file of this name is there once all are written.

    Args:
      out: the file; None prints lines of JSON.
      top: classes, or labels, of a record; 0 where they have none.
      kind: `class`, or `label`: what their columns are called in tables.
      features: whether records have features.
      tasks: of which records have a class each.
    """
    if out is None:
        yield lambda records: print(*map(_line, records), sep="\n", flush=True)
        return
    path = expanded(out)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    columns = _columns(top, kind, tasks)
    temporary.unlink(missing_ok=True)
    try:
        if path.suffix.lower() == ".parquet":
            with _parquet(temporary, columns, features) as write:
                yield write
        else:
            with temporary.open("x", encoding="utf-8", errors="surrogateescape", newline="") as file:
                if path.suffix.lower() == ".csv":
                    writer = csv.DictWriter(file, columns, lineterminator="\n")
                    writer.writeheader()
                    yield lambda records: writer.writerows(_flat(record) for record in records)
                else:
                    yield lambda records: file.writelines(f"{_line(record)}\n" for record in records)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _line(record: Record) -> str:
    return json.dumps(record)


def _columns(top: int, kind: str, tasks: Sequence[str]) -> list[str]:
    ranked = [(kind, "probability"), *((f"{kind}_{k}", f"probability_{k}") for k in range(2, top + 1))]
    each = [(f"class_{task}", f"probability_{task}") for task in tasks]
    return ["image", *(name for pair in (*ranked[:top], *each) for name in pair), "error"]


def _flat(record: Record) -> dict[str, Any]:
    """A record as a row of a table."""
    row = {name: value for name, value in record.items() if name not in ("top", "labels", "tasks")}
    for task, best in record.get("tasks", {}).items():
        row |= {f"class_{task}": best["class"], f"probability_{task}": best["probability"]}
    for k, (name, probability) in enumerate(record.get("labels", {}).items(), 1):
        ending = f"_{k}" if k > 1 else ""
        row |= {f"label{ending}": name, f"probability{ending}": probability}
    for k, one in enumerate(record.get("top", ())[1:], 2):
        row |= {f"{name}_{k}": value for name, value in one.items()}
    return row


@contextmanager
def _parquet(path: Path, columns: list[str], features: bool) -> Iterator[Callable[[list[Record]], None]]:
    arrow, parquet = _arrow()
    types = {name: arrow.float64() if name.startswith("probability") else arrow.string() for name in columns}
    types |= {"features": arrow.list_(arrow.float32())} if features else {}
    schema, held = arrow.schema(list(types.items())), []

    with parquet.ParquetWriter(path, schema) as writer:

        def flush(least: int) -> None:
            if len(held) >= least:
                writer.write_table(arrow.Table.from_pylist(held, schema))
                held.clear()

        def write(records: list[Record]) -> None:
            rows = map(_flat, records)
            held.extend({**row, "image": shown(row["image"])} for row in rows)  # texts of Parquet are UTF-8
            flush(_GROUP)

        yield write
        flush(1)


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            "--out NAME.parquet needs pyarrow: pip install 'jaxtransfer[tables]'; or choose .csv or .jsonl"
        ) from None
    return pyarrow, pyarrow.parquet
