"""How a model was made, as plain data, and the model that such data describe: what a run notes, and what reads it."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

import jax.numpy as jnp
import numpy as np

from jaxtransfer.model import Model, Recipe

_P = ParamSpec("_P")
_TYPES = ("dtype", "param_dtype")


def recorded(build: Callable[_P, Model]) -> Callable[_P, Model]:
    """Returns the constructor `build`, which also notes in each model what it was called with."""
    signature = inspect.signature(build)

    @functools.wraps(build)
    def made(*args: _P.args, **kwargs: _P.kwargs) -> Model:
        model, call = build(*args, **kwargs), signature.bind(*args, **kwargs)
        call.apply_defaults()
        arguments = {name: _plain(name, value) for name, value in call.arguments.items() if name != "name"}
        return dataclasses.replace(model, recipe=Recipe(build.__name__, arguments, model.apply))

    return made


def as_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options as they stand in a configuration as a constructor takes them: types by their names."""
    return {name: jnp.dtype(value) if name in _TYPES and value else value for name, value in options.items()}


def _plain(name: str, value: Any) -> Any:
    """Returns an argument as JSON holds it."""
    if name in _TYPES:
        return None if value is None else jnp.dtype(value).name
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(value, tuple | list) else value
