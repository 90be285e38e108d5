"""What the configuration of a run must look like to be read: checked once, before anything is made of it."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtransfer import models, tree
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.model import Model
from jaxtransfer.parts.learns import CLASSES, LABELS
from jaxtransfer.resizing import from_entries

FORMAT = 1
"""Of what is written; a later version of the library raises it where this one couldn't read what it writes."""
FEATURES, EPISODES, TASKS = "features", "episodes", "tasks"
TASK_CLASSES = "task_classes"  # `tasks` of a few-shot run is how many episodes an update has
KNOWS = (CLASSES, LABELS, FEATURES, EPISODES, TASKS)
"""What a run may have learned: to name classes; labels, any number of which hold together; features alone; to learn the
classes of an episode; or to name the classes of several tasks, by an output each."""
PRECISION, PRECISIONS = "matmul_precision", ("default", "high", "highest")
Rule = tuple[Callable[[Any], bool], str]
"""Whether a value will do, and what it should be, for messages."""


def known(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration that says what its run knows, as those of earlier versions did by their command."""
    names = config.get("class_names")
    ways = isinstance(names, list) and names[:1] == ["way 1"]
    old = {
        "contrast": {"knows": [FEATURES], "heads": True},
        "meta": {"knows": [EPISODES] if ways else [EPISODES, CLASSES]},
    }
    command = config.get("command", "")
    return {"knows": [CLASSES], **(old.get(command, {}) if isinstance(command, str) else {}), **config}


def check_config(config: Mapping[str, Any], directory: str | Path, *, needs: tuple[str, ...] = ()) -> None:
    """Raises where a configuration lacks what reading a run takes, or has something else in its place.

    Args:
      config: what `known` gave.
      directory: the run's, for messages.
      needs: the entries that must be there.

    Raises:
      InputError: names the entry, what it should be, and what came.
    """
    written = config.get("format", FORMAT)
    if type(written) is int and written > FORMAT:
        raise InputError(
            f"{directory} was written by a later version of jaxtransfer (format {written}, this one reads up to "
            f"{FORMAT}); read it with that version"
        )
    more = _OF_FEATURES if config.get("knows") == [FEATURES] else {}
    for name, rule in ({**ENTRIES, **more}).items():
        if name in config:
            check_entry(config, name, rule, directory)
        elif (name in needs and not (name == "class_names" and TASK_CLASSES in config)) or name in more:
            raise lacks(directory, name)
    if config.get("model") is not None and config["model"] not in models.ZOO:
        raise InputError(f"{directory}: {unknown('model', config['model'], models.ZOO)}")
    if TASK_CLASSES in config:
        for name in ("architecture", "image_shape"):
            if name not in config:
                raise lacks(directory, name)
    if (config.get("mean") is None) != (config.get("std") is None):
        name = "mean" if config.get("mean") is None else "std"
        raise wrong(directory, name, "a list of numbers, as the other of mean and std is one", config.get(name))
    channels = config["image_shape"][2] if "image_shape" in config else 1
    for name in ("mean", "std"):
        if config.get(name) is not None and len(config[name]) not in (1, channels):
            raise wrong(directory, name, f"a number for each of the {channels} channels", config[name])


def check_entry(config: Mapping[str, Any], name: str, rule: Rule, directory: str | Path) -> None:
    """Raises where an entry of a configuration is not what it should be."""
    holds, expected = rule
    if not holds(config[name]):
        raise wrong(directory, name, expected, config[name])


def lacks(directory: str | Path, name: str) -> InputError:
    """Returns the error of a run whose configuration doesn't say what a command must know."""
    if name == "image_shape":
        return InputError(
            f"{directory} holds no run on images, which the commands are for: its configuration lacks {name!r}, which "
            f"jt.fit(out=, model=, dataset=) notes of images. jt.load_run reads a run on other data, in Python"
        )
    return InputError(
        f"{directory} is no run of pretrain or finetune: its configuration lacks {name!r}, which "
        f"jt.fit(out=, model=, dataset=) notes, too"
    )


def wrong(directory: str | Path, name: str, expected: str, value: Any) -> InputError:
    """Returns the error of an entry that is not what it should be."""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return InputError(
        f"the configuration of {directory} is not what a run writes: {name!r} should be {expected}, and is {shown}; "
        f"restore it, or train the run anew"
    )


def check_weights(model: Model, params: Any, config: Mapping[str, Any], directory: str | Path) -> None:
    """Raises where a checkpoint's weights, by model name, are not those of the model that a configuration describes."""
    if "image_shape" not in config:  # nothing tells what the model takes
        return
    image = jax.ShapeDtypeStruct((1, *config["image_shape"]), np.uint8)
    try:
        expected = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
        wrong = tree.differences(tree.leaves_by_path(expected), tree.leaves_by_path(params.get(model.name, {})))
    except Exception as error:  # whatever a network raises for images that it can't take
        wrong = (str(error).partition("\n")[0],)
    if any(wrong):
        told = str(wrong) if isinstance(wrong, tree.Differences) else wrong[0]
        raise InputError(
            f"the weights of {directory} are not of the model that its configuration describes: {told}; restore the "
            f"configuration, or train the run anew"
        )


def whole(least: int, most: int = 2**31 - 1) -> Callable[[Any], bool]:
    """Holds for whole numbers of a range."""
    return lambda value: type(value) is int and least <= value <= most


def number(value: Any) -> bool:
    """Holds for finite numbers."""
    return type(value) in (int, float) and math.isfinite(value)


def text(value: Any) -> bool:
    """Holds for text that is not empty."""
    return isinstance(value, str) and bool(value)


def list_of(holds: Callable[[Any], bool], *, length: int | None = None) -> Callable[[Any], bool]:
    """Holds for lists of at least one value, or of `length`, of which each will do."""

    def holds_for_all(value: Any) -> bool:
        right = length or max(1, len(value)) if isinstance(value, list) else None
        return right is not None and len(value) == right and all(map(holds, value))

    return holds_for_all


def or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Holds for null too."""
    return lambda value: value is None or holds(value)


def _preprocessing(value: Any) -> bool:
    try:
        from_entries(value)
    except (InputError, AttributeError):
        return False
    return True


COUNT: Rule = (whole(1), "a whole number of at least 1")
COUNT_OR_NONE: Rule = (or_none(whole(1)), "a whole number of at least 1, or null")
SWITCH: Rule = (lambda value: isinstance(value, bool), "true or false")
SHAPE: Rule = (
    lambda value: list_of(whole(1, 2**16), length=3)(value) and value[2] in (1, 3, 4),
    "[height, width, channels], with 1 or 3 channels",
)
ENTRIES: dict[str, Rule] = {
    "command": (lambda value: isinstance(value, str), "the name of a command"),
    TASK_CLASSES: (
        lambda value: isinstance(value, dict) and bool(value) and all(map(list_of(text), value.values())),
        "an object of class names by task",
    ),
    "architecture": (lambda value: value in models.NETWORKS, "the name of a network of several tasks"),
    "experts": COUNT,
    "knows": (list_of(lambda word: word in KNOWS), f"a list of {', '.join(KNOWS)}"),
    "class_names": (list_of(lambda name: isinstance(name, str)), "a list of names"),
    "model": (or_none(text), "the name of a model"),
    "model_options": (lambda value: isinstance(value, dict), "an object of a model's options"),
    "model_name": (text, "the name of a model's weights"),
    "outputs": COUNT,
    "heads": SWITCH,
    "average": (or_none(text), "the name of a moving average, or null"),
    "image_shape": SHAPE,
    "mean": (or_none(list_of(number)), "a list of numbers"),
    "std": (or_none(list_of(lambda value: number(value) and value > 0)), "a list of positive numbers"),
    "data": (text, "the name of a data set"),
    "split": (text, "the name of a split"),
    "eval_split": (text, "the name of a split"),
    "shots": COUNT_OR_NONE,
    "seed": (whole(0, 2**32 - 1), "a whole number in [0, 2**32)"),
    "resize": SWITCH,
    "tokenizer": (lambda value: isinstance(value, dict), "an object that tells the tokenizer"),
    "table": (lambda value: isinstance(value, dict), "an object that tells the table"),
    "preprocessing": (or_none(_preprocessing), "null, or what images become: crop, in (0, 1] or null, interpolation"),
    "delta": (
        lambda value: (
            isinstance(value, dict) and isinstance(value.get("base"), dict) and text(value["base"].get("digest"))
        ),
        "an object of the delta's kind and its base, with a digest",
    ),
    "monitor": (or_none(text), "the name of a metric, or null"),
    PRECISION: (or_none(lambda value: value in PRECISIONS), f"null, or one of {', '.join(PRECISIONS)}"),
    "maximize": SWITCH,
}
_OF_FEATURES = {name: ENTRIES[name] for name in ("shots", "seed")}  # they are measured on what they learned from
