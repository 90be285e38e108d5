"""What the configuration of a run must look like to be read: checked once, before anything is made of it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxtransfer as jt
from jaxtransfer import models, tree
from jaxtransfer.cli.learners import LEARNERS, STATISTICS
from jaxtransfer.errors import InputError, unknown


def check_config(config: dict[str, Any], directory: Path) -> None:
    """Raises where a configuration lacks what reading a run takes, or has something else in its place.

    Args:
      config: what `read_config` gave.
      directory: the run's, for messages.

    Raises:
      InputError: names the entry, what it should be, and what came.
    """
    command = config.get("command", "")
    if not isinstance(command, str):
        raise _wrong(directory, "command", "the name of a command", command)
    more = _MORE.get(command, {})
    for name, (holds, expected) in (_EVERY | more).items():
        if name not in config:
            if name in _OPTIONAL - more.keys():
                continue
            raise InputError(f"{directory} is no run of pretrain or finetune: its configuration lacks {name!r}")
        if not holds(config[name]):
            raise _wrong(directory, name, expected, config[name])
    if config["model"] not in models.ZOO:
        raise InputError(f"{directory}: {unknown('model', config['model'], models.ZOO)}")
    channels = config["image_shape"][2]
    for name in ("mean", "std"):
        if len(config[name]) not in (1, channels):
            raise _wrong(directory, name, f"a number for each of the {channels} channels", config[name])


def _wrong(directory: Path, name: str, expected: str, value: Any) -> InputError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return InputError(
        f"the configuration of {directory} is not what a run writes: {name!r} should be {expected}, and is {shown}; "
        f"restore it, or train the run anew"
    )


def _whole(least: int, most: int = 2**31 - 1) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def check_weights(model: jt.Model, params: Any, config: dict[str, Any], directory: Path) -> None:
    """Raises where a checkpoint's weights, by model name, are not those of the model that a configuration describes."""
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


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _list_of(holds: Callable[[Any], bool], *, length: int | None = None) -> Callable[[Any], bool]:
    def holds_for_all(value: Any) -> bool:
        right = length or max(1, len(value)) if isinstance(value, list) else None
        return right is not None and len(value) == right and all(map(holds, value))

    return holds_for_all


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


_COUNT = (_whole(1), "a whole number of at least 1")
_COUNT_OR_NONE = (_or_none(_whole(1)), "a whole number of at least 1, or null")
_SWITCH = (lambda value: isinstance(value, bool), "true or false")
_SHAPE = (
    lambda value: _list_of(_whole(1, 2**16), length=3)(value) and value[2] in (1, 3, 4),
    "[height, width, channels], with 1 or 3 channels",
)
_EVERY: dict[str, tuple[Callable[[Any], bool], str]] = {
    "class_names": (_list_of(lambda name: isinstance(name, str)), "a list of names"),
    "model": (_text, "the name of a model"),
    "image_shape": _SHAPE,
    "mean": (_list_of(_number), "a list of numbers"),
    "std": (_list_of(lambda value: _number(value) and value > 0), "a list of positive numbers"),
    "data": (_text, "the name of a data set"),
    "split": (_text, "the name of a split"),
    "eval_split": (_text, "the name of a split"),
    "shots": _COUNT_OR_NONE,
    "seed": (_whole(0, 2**32 - 1), "a whole number in [0, 2**32)"),
    "resize": _SWITCH,
    "monitor": (_or_none(_text), "the name of a metric, or null"),
}
_OPTIONAL = {"eval_split", "shots", "seed", "resize", "monitor"}
_EPISODES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "method": (lambda name: isinstance(name, str) and name in LEARNERS, f"one of {', '.join(LEARNERS)}"),
    "statistics": (lambda name: isinstance(name, str) and name in STATISTICS, f"one of {', '.join(STATISTICS)}"),
    **dict.fromkeys(("ways", "shots", "queries", "tasks", "train_ways", "inner_steps"), _COUNT),
    **dict.fromkeys(("test_steps", "batch_size", "steps"), _COUNT),
    **dict.fromkeys(("train_queries", "val_classes"), _COUNT_OR_NONE),
    "inner_lr": (lambda value: _number(value) and value > 0, "a positive number"),
    "rotations": _SWITCH,
    "split_classes": (_or_none(_list_of(_whole(0), length=3)), "three numbers of classes, or null"),
}
_MORE: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "contrast": {name: _EVERY[name] for name in ("shots", "seed")},
    "meta": {**_EPISODES, "seed": _EVERY["seed"], "eval_split": _EVERY["eval_split"]},
}
