"""Models of the zoo as entries of a configuration: `describe` writes them, `rebuild` makes the model again."""

from collections.abc import Mapping
from typing import Any

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.models.preprocess import normalize
from jaxtransfer.models.recipe import as_arguments
from jaxtransfer.models.task_networks import task_network
from jaxtransfer.models.zoo import ZOO, create

ENTRIES = ("model", "model_options", "model_name", "mean", "std")
"""What says which network a run has; the number of its outputs comes from its classes, or is `outputs`."""
TASKS = ("task_classes", "architecture", "experts")
"""What says, beside these, which network of several tasks it is the encoder of; see `task_network`."""


def describe(model: Model) -> dict[str, Any] | None:
    """Returns what a configuration says of a model: plain data that `rebuild` makes it of.

    Args:
      model: of the zoo, with inputs normalised or not, heads on it, in micro-batches, in inference mode.

    Returns:
      `model`, a name of the zoo; `outputs`; `mean` and `std`, None for inputs as they are; and, where they are not the
      usual, `model_options`, arguments of its constructor, and `model_name`. None for a model of another making.
    """
    recipe = model.recipe
    if recipe is None:
        return None
    outputs, best = recipe.arguments["classes"], None
    for name, row in ZOO.items():
        made = row.build(outputs).recipe
        if made is None or made.build != recipe.build:
            continue
        options = {key: value for key, value in recipe.arguments.items() if value != made.arguments[key]}
        if best is not None and len(options) >= len(best[1]):
            continue
        try:  # a row may fix what is another here, the depth say
            same = create(name, outputs, **as_arguments(options)).recipe
        except InputError:
            continue
        if same is not None and same.arguments == recipe.arguments:
            best = name, options
    if best is None:
        return None
    more = {"model_options": best[1], "model_name": "" if model.name == "model" else model.name}
    usual = {"model": best[0], "outputs": outputs, "mean": recipe.mean, "std": recipe.std}
    return usual | {name: value for name, value in more.items() if value}


def rebuild(config: Mapping[str, Any]) -> Model:
    """Returns the model that a configuration describes.

    Args:
      config: what `describe` wrote; `class_names` count the outputs where `outputs` is left out. With `task_classes`,
        class names by task, and an `architecture` the network of these is the encoder of one with an output for each.

    Raises:
      InputError: for a name that the zoo has not, or options that it doesn't take.
    """
    outputs = config["outputs"] if "outputs" in config else len(config["class_names"])
    name, options = config["model"], as_arguments(config.get("model_options") or {})
    try:
        model = create(name, outputs, name_in_params=config.get("model_name") or "model", **options)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"model_options {config.get('model_options')}: {name} can't be made with them: {error}"
        ) from None
    if "task_classes" in config:
        classes = {task: len(names) for task, names in config["task_classes"].items()}
        how = {name: config[name] for name in ("image_shape", "experts") if name in config}
        model = task_network(config["architecture"], model, classes, **how)
    return model if config.get("mean") is None else normalize(model, config["mean"], config["std"])
