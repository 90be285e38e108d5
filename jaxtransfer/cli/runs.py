"""Trained runs, as commands read them: with all that a command must know of one."""

from pathlib import Path
from typing import Any

import jaxtransfer as jt
from jaxtransfer.devices import device_mesh as device_mesh
from jaxtransfer.errors import InputError
from jaxtransfer.models.description import ENTRIES, rebuild
from jaxtransfer.parts.learns import CLASSES, LABELS
from jaxtransfer.runs.load import Run
from jaxtransfer.runs.load import load_run as read_run

_NEEDS = ("class_names", "model", "image_shape", "mean", "std", "data", "split")
build_model = rebuild
"""Returns the model of a run's configuration."""


def load_run(directory: Path) -> Run:
    """Reads a run with its best checkpoint, or its newest where none was evaluated; `jt.load_run` for commands.

    Raises:
      InputError: where the directory is no run, or no checkpoint of it is whole.
    """
    return read_run(directory, needs=_NEEDS)


def beside(run: Run) -> dict[str, Run]:
    """Returns the run's other weights by name: its `average`, where it keeps one, or `raw` where it is the average."""
    noted = run.config.get("average")
    if "params" not in run.state.get(noted or f"{run.model.name}_ema", {}):
        return {}
    name = "average" if noted is None else "raw"
    return {name: read_run(run.directory, checkpoint=run.step, average=noted is None, needs=_NEEDS)}


def architecture(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the entries of a configuration that say which network a run has, and for which images."""
    return {key: config[key] for key in (*ENTRIES, "image_shape") if key in config}


def check_knows_classes(run: Run, directory: Path | str, what: str) -> None:
    """Raises for a run whose network was trained without classes: its logits mean nothing; `what` needs them."""
    if LABELS in run.knows:
        raise InputError(
            f"{what}, and {directory} is a run of labels that hold together, by sigmoids; jt.load_run takes it further "
            f"in Python"
        )
    if CLASSES not in run.knows:
        raise InputError(
            f"{what}, and {directory} is a run of {' and '.join(run.knows)}, which learned without classes; "
            f"finetune it first (--from {directory})"
        )


def check_fits(run: Run, dataset: jt.data.Dataset, directory: Path | str) -> None:
    """Raises where a data set's images are not of the shape that a run was trained on."""
    expected = tuple(run.config["image_shape"])
    if dataset.image_shape != expected:
        raise InputError(
            f"{directory} was trained on images {expected}, {dataset.name} has {dataset.image_shape}; add --resize to "
            f"bring them to that shape"
        )
