"""`jaxtransfer predict`: the classes of image files."""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxtransfer.cli.options import at_least, check_memory
from jaxtransfer.cli.prediction_files import Record, check_out, opened
from jaxtransfer.cli.runs import Run, check_knows_classes, load_run
from jaxtransfer.cli.together import by_first
from jaxtransfer.data import images
from jaxtransfer.data.stream import Stream
from jaxtransfer.devices import processes
from jaxtransfer.devices.votes import all_tell
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.files import expanded, read_bytes
from jaxtransfer.parts.learns import CLASSES, LABELS
from jaxtransfer.runs.loggers import progress_bar

Records = list[Record]


@dataclasses.dataclass(frozen=True)
class Predict:
    """Classify image files; prints a JSON line for each, with the runners-up.

    Of a run whose labels hold together: the probability of each label.

    Of a run of several tasks: a class of each.

    A file that can't be read gets a line with an error; the exit code is then 2.

    Example: jaxtransfer predict runs/a photo.jpg photos/ --out photos.csv
    """

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory; its best checkpoint is used."""
    images: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE ...", help_behavior_hint="(or --list)")
    ]
    """Image files, or folders of them; brought to the run's shape; lines keep their order."""
    list: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Text file with more of them, one a line, as seen from here; - reads stdin."""
    top: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 3, all of labels)")] = None
    """Classes to list, or labels, of a run whose labels hold together; of several tasks classes of each."""
    features: bool = False
    """Give the pooled features of each image, too, also of a run that knows no classes."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: stdout)")] = None
    """Write to NAME.jsonl, NAME.csv or NAME.parquet (extra `tables`) instead."""
    batch_size: int = 64
    """Images at a time."""
    matmul_precision: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the run's)")
    ] = None
    """Of products of matrices and convolutions, as for `pretrain`: default, high or highest."""
    base: Annotated[
        Path | None, tyro.conf.arg(metavar="RUN", help_behavior_hint="(default: where the delta noted it)")
    ] = None
    """Of a run of a delta the one that it stands on, where that has moved; another one is refused."""
    distributed: bool = False
    """This is one of several processes that share the images, as for `pretrain`; the first one prints and writes."""

    def run(self) -> None:
        """Classifies and prints."""
        at_least(self, 1, "top", "batch_size")
        check_out(self.out, self.features)
        paths = list(self.images)
        if (asked := self.list) is not None:
            paths += map(Path, processes.first_tells(lambda: [str(path) for path in _listed(asked)]))
        if not paths:
            raise InputError("expected image files or folders after the run directory, or --list FILE; got none")
        run = load_run(self.directory, tasks=True, base=self.base)
        labels = LABELS in run.knows
        if not self.features and not labels and not run.tasks:
            check_knows_classes(run, self.directory, "predict names classes")
        files = [Path(file) for file in processes.first_tells(lambda: self._found(paths))]
        names, bad = run.class_names if labels or CLASSES in run.knows else (), 0
        with contextlib.ExitStack() as stack:
            note = processes.first_does(lambda: stack.enter_context(self._noting(run, len(files), names)))
            for done, records in _predicted(run, files, min(self.batch_size, len(files)), names, self):
                bad += sum("error" in record for record in records)
                by_first(note)(done, records, bad)
            by_first(stack.close)()
        by_first(self._summed_up)(len(files), bad)

    def _found(self, paths: Sequence[Path]) -> Sequence[str]:
        """Returns the image files, of which one at least is there."""
        files = [file for path in paths for file in _files(path)]
        if not any(file.exists() for file in files):
            hint = ""
            if self.list is not None and not files[0].is_absolute():
                hint = f"; paths of --list are relative to the working directory, {images.shown(Path.cwd())}"
            raise InputError(f"there is no image {images.shown(files[0])}{hint}")
        return [str(file) for file in files]

    @contextlib.contextmanager
    def _noting(self, run: Run, count: int, names: Sequence[str]) -> Iterator[Callable[..., None]]:
        """Yields what writes the records of a batch, and shows how many files are done and how many of them are bad."""
        kind = "label" if LABELS in run.knows else "class"
        told = {"kind": kind, "features": self.features, "tasks": tuple(run.tasks)}
        with opened(self.out, _top(self, run, names), **told) as write, progress_bar(count, 0, show=None) as update:

            def note(done: int, records: Records, bad: int) -> None:
                write(records)
                update(done, f"{bad} unreadable" if bad else "")
                for record in records if self.out is not None else ():
                    if "error" in record:
                        print(f"{images.shown(record['image'])}: {record['error']}", file=sys.stderr)

            yield note

    def _summed_up(self, count: int, bad: int) -> None:
        if self.out is not None:
            print(json.dumps({"out": str(self.out), "images": count, "unreadable": bad}))
        if bad:
            others = ", the others are classified" if bad < count else ""
            raise InputError(f"{bad} of {count} images could not be read{others}; the lines with an 'error' say why")


def _predicted(
    run: Run, files: Sequence[Path], size: int, names: Sequence[str], asked: Predict
) -> Iterator[tuple[int, list[Record]]]:
    """Yields how many files are done and the records of the next batch; batches are read ahead, none is kept.

    Of several processes each makes its part of a batch, and all are given the records of the whole.
    """
    parts, own = processes.count(), processes.index()
    size = -(-size // parts)
    shape = images.check_shape(run.config["image_shape"])
    check_memory(size, shape)
    top, activation = _top(asked, run, names), jax.nn.sigmoid if LABELS in run.knows else jax.nn.softmax

    def ranked(logits: jax.Array, most: int) -> Any:
        return jax.lax.top_k(activation(logits.astype(jnp.float32)), most)

    @jax.jit
    def compiled(variables: Any, inputs: jax.Array) -> dict[str, Any]:
        outputs, _ = run.model.apply(variables, inputs, train=False, key=None)
        found = {}
        if top:
            found["top"] = ranked(outputs["logits"], top)
        if run.tasks:
            found["tasks"] = {task: ranked(outputs[task], _top(asked, run, names)) for task, names in run.tasks.items()}
        if asked.features:
            if "features" not in outputs:
                raise unknown(f"output of model {run.model.name!r}", "features", outputs)
            found["features"] = outputs["features"].reshape(len(inputs), -1).astype(jnp.float32)
        return found

    def read(number: int) -> tuple[Sequence[Path], np.ndarray, dict[int, str]]:
        start = (number * parts + own) * size
        part = files[start : start + size]
        inputs, errors = _read(run, part, size, shape)
        return part, inputs, errors

    def told(part: Sequence[Path], errors: dict[int, str], given: Any) -> list[Record]:
        return list(itertools.chain(*all_tell(lambda: _records(part, errors, given, names, run))))

    variables = jax.device_put(run.model.complete(run.variables))
    done, pending = 0, []
    ahead: Any = Stream(read, 0, -(-len(files) // (size * parts)), threads=2, prefetch=2)
    with ahead as batches:
        for part, inputs, errors in batches:
            given = compiled(variables, inputs) if len(errors) < len(part) else None
            pending.append((part, errors, given))
            if len(pending) > 1:
                records = told(*pending.pop(0))  # computed while the next one was read
                yield (done := done + len(records)), records
    for one in pending:
        records = told(*one)
        yield done + len(records), records


def _top(asked: Predict, run: Run, names: Sequence[str]) -> int:
    """Returns how many classes or labels a line has."""
    usual = len(names) if LABELS in run.knows else 3
    return min(usual if asked.top is None else asked.top, len(names))


def _records(files: Sequence[Path], errors: dict[int, str], given: Any, names: Sequence[str], run: Run) -> list[Record]:
    records, found = [], jax.device_get(given)
    for row, file in enumerate(files):
        record: dict[str, Any] = {"image": str(file)}
        if row in errors:
            records.append({**record, "error": errors[row]})
            continue
        if any(not np.isfinite(leaf[row]).all() for leaf in jax.tree.leaves(found)):
            raise InputError(
                f"what the network makes of {images.shown(file)} is not finite; look at the weights: has its training "
                f"diverged?"
            )
        if "tasks" in found:
            best = {task: _listed_of(found["tasks"][task], row, own) for task, own in run.tasks.items()}
            record["tasks"] = {task: {**listed[0], "top": listed} for task, listed in best.items()}
        if "top" in found:
            listed = _listed_of(found["top"], row, names)
            if LABELS in run.knows:
                record["labels"] = {one["class"]: one["probability"] for one in listed}
            else:
                record |= {**listed[0], "top": listed}
        if "features" in found:
            record["features"] = [float(f"{x:.7g}") for x in found["features"][row]]
        records.append(record)
    return records


def _listed_of(ranked: Any, row: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the classes of a row with their probabilities, the largest first."""
    pairs = zip(ranked[0][row], ranked[1][row], strict=True)
    return [{"class": names[k], "probability": round(float(p), 6)} for p, k in pairs]


def _read(run: Run, files: Sequence[Path], size: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, dict[int, str]]:
    """Returns the images [size, H, W, C], and by row why one could not be read, whose image is zero."""
    inputs, errors = np.zeros((size, *shape), np.uint8), {}
    for row, file in enumerate(files):
        try:
            inputs[row] = images.fit(images.read(file, 4 if shape[2] == 4 else 3), shape, run.resizing)
        except InputError as error:
            errors[row] = str(error)
    return inputs, errors


def _listed(path: Path) -> list[Path]:
    """Returns the paths that a text file names, or stdin; their bytes are those of the file system."""
    if str(path) == "-":
        content = sys.stdin.buffer.read()
    else:
        try:
            content = read_bytes(expanded(path))
        except OSError as error:
            raise InputError(f"--list: cannot read {images.shown(path)}: {error.strerror or error}") from None
    lines = (line.removesuffix(b"\r") for line in content.split(b"\n"))
    found = [Path(os.fsdecode(line)) for line in lines if line.strip()]
    if any("\0" in str(one) for one in found):
        raise InputError(f"--list: {images.shown(path)} is no text file; expected one path a line")
    if not found:
        raise InputError(f"--list: {images.shown(path)} names no file; expected one path a line")
    return found


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(f for f in path.rglob("*") if f.suffix.lower() in images.SUFFIXES and not f.name.startswith("."))
        if not found:
            raise InputError(
                f"no images in {images.shown(path)}; expected files that end in {', '.join(images.SUFFIXES)}"
            )
        return found
    return [path]
