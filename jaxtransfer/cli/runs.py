"""Trained runs, as commands read them: with all that a command must know of one."""

from pathlib import Path
from typing import Any

import jaxtransfer as jt
from jaxtransfer.devices import device_mesh as device_mesh
from jaxtransfer.errors import InputError
from jaxtransfer.models.description import ENTRIES, rebuild
from jaxtransfer.models.description import TASKS as TASK_ENTRIES
from jaxtransfer.parts.learns import CLASSES, LABELS
from jaxtransfer.runs.configuration import FEATURES
from jaxtransfer.runs.deltas import DELTA, folded
from jaxtransfer.runs.directory import read_config
from jaxtransfer.runs.load import Run
from jaxtransfer.runs.load import load_run as read_run

_NEEDS = ("class_names", "model", "image_shape", "mean", "std", "data", "split")
build_model = rebuild
"""Returns the model of a run's configuration."""


def load_run(directory: Path, *, tasks: bool = False, base: Path | None = None) -> Run:
    """Reads a run with its best checkpoint, or its newest where none was evaluated; `jt.load_run` for commands.

    One of a delta of weights comes with the difference in its base's weights.

    Args:
      directory: of the run.
      tasks: whether a run of several tasks is wanted as it is. Otherwise of one with a single encoder this is what
        goes on, as a run of features.
      base: of a run of a delta the run that it stands on, where that is no longer where the delta noted it.

    Raises:
      InputError: where the directory is no run, or no checkpoint of it is whole; for a run of several tasks which has
        no single encoder, where its encoder is wanted; for a base of what is no delta, or another one.
    """
    if base is not None and DELTA not in read_config(directory):
        raise InputError(f"--base is of a delta; {directory} is a run of all its weights, leave it out")
    run = folded(read_run(directory, needs=_NEEDS, base=base))
    return run if tasks or not run.tasks else _encoder_of(run)


def _encoder_of(run: Run) -> Run:
    """Returns the encoder of a run of several tasks as a run of features; the heads stay behind."""
    architecture = run.config["architecture"]
    if not jt.models.NETWORKS[architecture].encoder:
        raise InputError(
            f"{run.directory} is a run of several tasks by {architecture}, which has no single encoder to go on with; "
            f"evaluate and predict take it as it is"
        )
    config = {name: value for name, value in run.config.items() if name not in TASK_ENTRIES} | {"knows": [FEATURES]}
    variables = jt.models.encoder_of({"params": run.params[run.model.name], **run.state[run.model.name]})
    model = build_model(config)
    params = {model.name: variables.pop("params")}
    return run._replace(config=config, model=model, params=params, state={model.name: variables})


def beside(run: Run, base: Path | None = None) -> dict[str, Run]:
    """Returns the run's other weights by name: its `average`, where it keeps one, or `raw` where it is the average.

    Args:
      run: as `load_run` read it.
      base: as it was given there.
    """
    noted = run.config.get("average")
    if "params" not in run.state.get(noted or f"{run.model.name}_ema", {}):
        return {}
    name = "average" if noted is None else "raw"
    other = read_run(run.directory, checkpoint=run.step, average=noted is None, needs=_NEEDS, base=base)
    return {name: folded(other)}


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
