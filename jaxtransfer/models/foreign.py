"""What the adapters of modules that hold their weights share: leaves by path, and what a module may return."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.errors import InputError

Keys = tuple[Any, ...]


def nest(leaves: Mapping[Keys, Any]) -> dict[str, Any]:
    """Returns leaves by their keys as nested dicts of strings, which checkpoints keep as they are."""
    out: dict[str, Any] = {}
    for (*parents, last), leaf in leaves.items():
        node = functools.reduce(lambda node, key: node.setdefault(str(key), {}), parents, out)
        node[str(last)] = leaf
    return out


def leaf_at(nested: Mapping[str, Any], keys: Keys) -> Any:
    """Returns the leaf that `nest` put under its keys."""
    return functools.reduce(lambda node, key: node[str(key)], keys, nested)


def accepted(call: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """Returns those of the arguments that a function has a parameter for."""
    parameters = inspect.signature(call).parameters
    return {name: value for name, value in arguments.items() if name in parameters}


def named_outputs(returned: Any, output: str, model: str) -> dict[str, Any]:
    """Returns what a module returned as a dict of outputs; a bare array is called `output`."""
    if isinstance(returned, Mapping):
        return dict(returned)
    if isinstance(returned, jax.Array):
        return {output: returned}
    raise InputError(
        f"the module of model {model!r} must return an array or a dict of named arrays; got a {type(returned).__name__}"
    )


def check_fit(variables: Mapping[str, Any], shapes: Mapping[str, Any], model: str) -> None:
    """Raises where variables are not those of the model, by path and shape."""
    if any(wrong := tree.differences(tree.leaves_by_path(shapes), tree.leaves_by_path(variables))):
        raise InputError(f"the variables are not those of model {model!r} {wrong}")


def in_types_of(old: Any, new: Any) -> Any:
    """Returns the values of `new` in the types of `old`: a module that computes low keeps its state as it was."""
    return jax.tree.map(lambda o, n: jnp.asarray(n, o.dtype), old, new)


def without_axis(model: str, place: str, module: Any) -> InputError:
    """Returns the error for a module whose statistics would differ by device."""
    return InputError(
        f"model {model!r} keeps running state in {place or 'its module'}, a {type(module).__name__} without a field "
        f"`axis_name`: under pmap each device would keep its own. Average over that, or train with mode='jit'"
    )
