"""Trained runs: the model that a run directory describes, with the weights that it reached."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax

import jaxtransfer as jt
from jaxtransfer import models
from jaxtransfer.cli.run_config import check_config, check_weights
from jaxtransfer.errors import InputError
from jaxtransfer.runs import checkpoints
from jaxtransfer.runs.directory import read_config
from jaxtransfer.runs.selection import score_of


class Run(NamedTuple):
    """A trained run.

    Attributes:
      config: its configuration.
      model: its model, inputs normalised.
      params: its weights, by model name.
      state: its batch statistics, by model name.
      step: the step they are of.
    """

    config: dict[str, Any]
    model: jt.Model
    params: Any
    state: Any
    step: int


def build_model(config: dict[str, Any]) -> jt.Model:
    """Returns the model of a run's configuration."""
    model = models.create(config["model"], len(config["class_names"]))
    return models.normalize(model, config["mean"], config["std"])


def load_run(directory: Path) -> Run:
    """Reads a run with its best checkpoint, or its newest where none was evaluated.

    Raises:
      InputError: where the directory is no run, or no checkpoint of it is whole.
    """
    config = read_config(directory)
    check_config(config, directory)
    folder, errors = Path(directory) / "checkpoints", []
    best = checkpoints.best(folder, score_of(config.get("monitor")))
    newest_first = checkpoints.steps(folder)[::-1]
    order = newest_first if best is None else [best, *(step for step in newest_first if step != best)]
    for step in order:
        try:
            found = checkpoints.read(folder, step)
        except checkpoints.DamagedCheckpointError as error:
            errors.append(error)
            continue
        for error in errors:
            warnings.warn(f"{error}; step {step} is used", stacklevel=2)
        params, state = (checkpoints.nested(found.leaves, part) for part in ("params", "state"))
        model = build_model(config)
        if config.get("command") == "contrast":  # the heads of the method stay behind
            variables = models.encoder_of({"params": params.get(model.name, {}), **state.get(model.name, {})})
            params, state = {model.name: variables.pop("params", {})}, {model.name: variables}
        check_weights(model, params, config, directory)
        return Run(config, model, params, {model.name: {}, **state}, found.step)
    if errors:
        raise InputError(f"no checkpoint of {directory} is whole ({errors[0]}); run its command again to train it anew")
    raise InputError(f"{directory} has no checkpoint yet; run its command again to train it")


def check_knows_classes(run: Run, directory: Path, what: str) -> None:
    """Raises for a run whose network was trained without classes: its logits mean nothing; `what` needs them."""
    if run.config.get("command") == "contrast":
        raise InputError(
            f"{what}, and {directory} is a run of contrast, which learned without classes; finetune it first "
            f"(--from {directory})"
        )


def check_fits(run: Run, dataset: jt.data.Dataset, directory: Path) -> None:
    """Raises where a data set's images are not of the shape that a run was trained on."""
    expected = tuple(run.config["image_shape"])
    if dataset.image_shape != expected:
        raise InputError(
            f"{directory} was trained on images {expected}, {dataset.name} has {dataset.image_shape}; add --resize to "
            f"bring them to that shape"
        )


def device_mesh() -> jax.sharding.Mesh | None:
    """Returns a mesh over all devices, or None where there is one."""
    count = jax.device_count()
    return None if count == 1 else jax.make_mesh((count,), ("data",))
