"""`jaxtransfer predict`: the classes of image files."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from jaxtransfer.cli.options import at_least, check_memory
from jaxtransfer.cli.runs import check_knows_classes, load_run
from jaxtransfer.data import images
from jaxtransfer.errors import InputError


@dataclasses.dataclass(frozen=True)
class Predict:
    """Classify image files; prints a JSON line for each, with the runners-up.

    A file that can't be read gets a line with an error; the exit code is then 2.

    Example: jaxtransfer predict runs/a photo.jpg photos/
    """

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory; its best checkpoint is used."""
    images: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE ...", help_behavior_hint="(required)")
    ]
    """Image files, or folders of them; brought to the run's shape."""
    top: int = 3
    """Classes to list."""
    batch_size: int = 64
    """Images at a time."""

    def run(self) -> None:
        """Classifies and prints."""
        at_least(self, 1, "top", "batch_size")
        if not self.images:
            raise InputError("expected image files or folders after the run directory; got none")
        run = load_run(self.directory)
        check_knows_classes(run, self.directory, "predict names classes")
        names, shape = run.config["class_names"], images.check_shape(run.config["image_shape"])
        files = [file for path in self.images for file in _files(path)]
        if not any(file.exists() for file in files):
            raise InputError(f"there is no image {files[0]}")

        @jax.jit
        def probabilities(variables, inputs):
            return jax.nn.softmax(run.model.apply(variables, inputs, train=False, key=None)[0]["logits"])

        variables = jax.device_put(run.model.complete(run.variables))
        size, bad = min(self.batch_size, len(files)), 0
        check_memory(size, shape)
        for begin in range(0, len(files), size):
            part = files[begin : begin + size]
            inputs, errors = _read(part, size, shape)
            bad += len(errors)
            rows = np.asarray(probabilities(variables, inputs)) if len(errors) < len(part) else inputs
            for file, row in zip(part, rows, strict=False):
                if file in errors:
                    print(json.dumps({"image": str(file), "error": errors[file]}))
                    continue
                order = np.argsort(-row)[: self.top]
                listed = [{"class": names[k], "probability": round(float(row[k]), 6)} for k in order]
                print(json.dumps({"image": str(file), **listed[0], "top": listed}))
        if bad:
            others = ", the others are classified" if bad < len(files) else ""
            raise InputError(
                f"{bad} of {len(files)} images could not be read{others}; the lines with an 'error' say why"
            )


def _read(files: list[Path], size: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, dict[Path, str]]:
    """Returns the images [size, H, W, C], and by file why one could not be read, whose image is zero."""
    inputs, errors = np.zeros((size, *shape), np.uint8), {}
    for row, file in enumerate(files):
        try:
            inputs[row] = images.fit(images.read(file, 4 if shape[2] == 4 else 3), shape)
        except InputError as error:
            errors[file] = str(error)
    return inputs, errors


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(f for f in path.rglob("*") if f.suffix.lower() in images.SUFFIXES and not f.name.startswith("."))
        if not found:
            raise InputError(f"no images in {path}; expected files that end in {', '.join(images.SUFFIXES)}")
        return found
    return [path]
