"""Layers that run in inference mode while the others train: of Linen modules, and of those that hold their weights."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError


class StillLayers:
    """Intercepts the layers of one forward pass in training, and runs those that are still in inference mode.

    A layer is still where all its parameters are; one without parameters goes with the layer that it wraps (spectral
    norm) or the one called before it (dropout, batch norm without scale and bias). Layers are told by what says their
    mode, a field or an argument of their call: `use_running_average` (`nn.BatchNorm`), `deterministic` (`nn.Dropout`,
    attention), `update_stats` (`nn.SpectralNorm`), or `train`, `training`, `is_training` (layers of users, and ours).

    Args:
      still: a tree like the module's parameters, of bools or traced scalars.
      name: of the model, for errors.
    """

    def __init__(self, still: Any, name: str):
        self.still, self.name = still, name
        self._last: tuple = ()
        self._inside = False

    @contextlib.contextmanager
    def intercepted(self) -> Iterator[None]:
        """Runs what is applied inside with the still layers in inference mode."""
        with nn.intercept_methods(self._intercept):
            yield

    def _intercept(self, call, args, kwargs, context) -> Any:
        module = context.module
        if self._inside or context.method_name != "__call__":
            return call(*args, **kwargs)
        wrapped = getattr(getattr(module, "layer_instance", None), "path", ())
        flags = _below(self.still, module.path) or (_below(self.still, wrapped) if wrapped else ()) or self._last
        self._last = flags
        if not _any(flags):
            return call(*args, **kwargs)
        own = {
            (kind, name): value
            for kind, values in module.variables.items()
            for name, value in values.items()
            if kind != "params" and not hasattr(value, "keys")
        }
        state = [kind for kind, values in module.variables.items() if kind != "params" and values]
        alone = len(own) == sum(len(module.variables[kind]) for kind in state)  # else the layers inside are told
        mode = _Mode.of(module, args, kwargs) if alone else None
        certain = all(flag is True for flag in flags)
        if mode is not None and (mode.fields or not certain) and _holds_modules(module):
            mode = None  # a copy would lose those that live elsewhere: they are told themselves
        if mode is None:
            returned = call(*args, **kwargs)
            for (kind, name), value in own.items():
                if module.get_variable(kind, name) is not value:
                    raise untold(self.name, "/".join(module.path), name, "use_running_average")
            return returned
        if certain:
            return self._inference(module, mode) if mode.fields else call(*mode.args, **mode.kwargs)
        still, kept = _all(flags), self._inference(module, mode)
        trained = call(*args, **kwargs)
        for (kind, name), value in own.items():
            moved = module.get_variable(kind, name)
            module.put_variable(kind, name, jnp.where(still, value, moved))
        return jax.tree.map(lambda a, b: jnp.where(still, a, b), kept, trained)

    def _inference(self, module, mode) -> Any:
        self._inside = True
        try:
            return module.clone(parent=None, **mode.fields).apply(module.variables, *mode.args, **mode.kwargs)
        finally:
            self._inside = False


class StillParts:
    """Says which layers of a module that holds its weights are still: in Equinox and NNX, where nothing intercepts.

    Args:
      still: a tree like the module's parameters, of bools.
      name: of the model, for errors.

    Raises:
      InputError: where a flag is traced: which layers are frozen changes within the program.
    """

    def __init__(self, still: Any, name: str):
        if any(flag is not True and flag is not False for flag in jax.tree.leaves(still)):
            raise InputError(
                f"model {name!r} unfreezes layers within one program (gradual_unfreeze), which only modules of Linen "
                f"can: train it in several runs, each with jt.optim.only, or with adapt_statistics=True"
            )
        self.name = name
        self._still, self._last = still, ()

    def in_order(self, path: Sequence[Any]) -> bool:
        """Returns whether a layer is still; asked from the first to the last, one without parameters goes with it."""
        self._last = _below(self._still, tuple(map(str, path))) or self._last
        return bool(self._last) and all(self._last)

    def around(self, path: Sequence[Any], *, statistics: bool) -> bool:
        """Returns whether a layer is still; one without parameters goes with the module that holds it.

        Raises:
          InputError: where that module is frozen in part, and the layer has statistics.
        """
        keys = tuple(map(str, path))
        places = (_below(self._still, keys[:end]) for end in range(len(keys), -1, -1))
        flags = next(flags for flags in places if flags)
        if statistics and any(flags) and not all(flags) and not _below(self._still, keys):
            raise InputError(
                f"layer {'/'.join(keys)!r} of model {self.name!r} has running state but no parameters, and stands "
                f"among frozen and trained layers: nothing says whether it is frozen. Give it a scale or a bias, train "
                f"model.inference(), or let statistics move with jt.optim.only(..., adapt_statistics=True)"
            )
        return all(flags)


def untold(model: str, layer: str, entry: str, field: str) -> InputError:
    """Returns the error for a frozen layer that keeps statistics and can't be told to leave them."""
    return InputError(
        f"layer {layer!r} of model {model!r} is frozen, but its running state {entry!r} moves: nothing tells it to run "
        f"in inference mode. Give its module the field {field}, as batch norm has it, train model.inference(), or let "
        f"statistics move with jt.optim.only(..., adapt_statistics=True)"
    )


_SWITCHES = {  # what says a layer's mode, and how it says inference
    **dict.fromkeys(("use_running_average", "deterministic"), True),
    **dict.fromkeys(("train", "training", "is_training", "update_stats"), False),
}


class _Mode(NamedTuple):
    """How a layer is put into inference mode: by fields of its own, and what its call is then given."""

    fields: dict[str, bool]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module, args: Any, kwargs: Any) -> "_Mode | None":
        """Returns the inference mode of a call; None for a layer that knows no modes, or needs none.

        Layers without state or parameters, and those that drop, are told too.
        """
        signature = inspect.signature(type(module).__call__)
        drops = hasattr(module, "deterministic") and getattr(module, "rate", getattr(module, "dropout_rate", 1)) != 0
        known = _SWITCHES
        if module.variables.keys() <= {"params"} and module.variables.get("params"):
            known = {"deterministic": True} if drops else {}
        names = {field.name for field in dataclasses.fields(module)}
        fields = {name: value for name, value in known.items() if name in names}
        told = {name: value for name, value in known.items() if name in signature.parameters and name not in fields}
        if fields == {"deterministic": True} and not drops:
            fields = {}
        if not fields and not told:
            return None
        given = signature.bind(module, *args, **kwargs)
        for name in fields:
            given.arguments.pop(name, None)
        given.arguments.update(told)
        return cls(fields, given.args[1:], given.kwargs)


def _holds_modules(module: nn.Module) -> bool:
    """Whether a layer was given others as fields."""
    fields = [getattr(module, field.name) for field in dataclasses.fields(module) if field.name != "parent"]
    leaves = jax.tree.leaves(fields, is_leaf=lambda value: isinstance(value, nn.Module))
    return any(isinstance(value, nn.Module) for value in leaves)


def _below(still: Any, path: tuple[str, ...]) -> tuple:
    """Returns the distinct flags of the parameters below a path; none where there are none."""
    for key in path:
        if not hasattr(still, "keys") or key not in still:
            return ()
        still = still[key]
    return tuple({id(flag): flag for flag in jax.tree.leaves(still)}.values())


def _any(flags: tuple) -> bool:
    """Whether a layer with these flags may be still: none of its parameters certainly moves."""
    return bool(flags) and all(flag is not False for flag in flags)


def _all(flags: tuple) -> Any:
    return functools.reduce(jnp.logical_and, flags)
