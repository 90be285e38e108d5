"""Layers that run in inference mode while the others train: of Linen modules, and of those that hold their weights."""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.models.batch_norm import BatchNorm


class StillLayers:
    """Intercepts the layers of one forward pass in training, and runs those that are still in inference mode.

    A layer is still where all its parameters are; one without parameters, dropout or batch norm without scale and
    bias, goes with the layer called before it. Layers are told by their fields: `use_running_average` (`nn.BatchNorm`
    and what is written like it), `deterministic` (`nn.Dropout`, attention), and ours.

    Args:
      still: a tree like the module's parameters, of bools or traced scalars.
      name: of the model, for errors.
    """

    def __init__(self, still: Any, name: str):
        self.still, self.name = still, name
        self._flags: dict[tuple[str, ...], tuple] = {}  # by the path of a layer
        self._seen: set[tuple[str, ...]] = set()  # the layers run here
        self._last: tuple = ()
        self._inside = False

    @contextlib.contextmanager
    def intercepted(self) -> Iterator[None]:
        """Runs what is applied inside with the still layers in inference mode."""
        with nn.intercept_methods(self._intercept):
            yield

    def check(self, old: Any, new: Any) -> None:
        """Raises where the state of a still layer moved: a layer that says its mode in a way that isn't known here.

        Args:
          old: the state before the forward pass.
          new: the state after it; what did not move is the same object.
        """
        before, after = tree.leaves_by_path(old), tree.leaves_by_path(new)
        for path, leaf in after.items():
            layer = tuple(path.split("/")[1:-1])
            if layer in self._seen or before.get(path) is leaf or not _any(self._flags.get(layer, ())):
                continue
            raise untold(self.name, "/".join(layer), path.split("/")[-1], "use_running_average")

    def _intercept(self, call, args, kwargs, context) -> Any:
        module = context.module
        if self._inside or context.method_name != "__call__":
            return call(*args, **kwargs)
        flags = _below(self.still, module.path) or self._last
        self._last = self._flags[module.path] = flags
        mode = _inference_mode(module) if _any(flags) else None
        if mode is None:
            return call(*args, **kwargs)
        before = {kind: dict(values) for kind, values in module.variables.items() if kind != "params"}
        if any(hasattr(value, "keys") for values in before.values() for value in values.values()):
            return call(*args, **kwargs)  # the layers inside have the state: they are told themselves
        self._seen.add(module.path)
        inference = functools.partial(self._inference, module, mode, args, kwargs)
        if all(flag is True for flag in flags):
            return inference()
        still, kept = _all(flags), inference()
        trained = call(*args, **kwargs)
        for kind, values in before.items():
            for name, value in values.items():
                moved = module.get_variable(kind, name)
                module.put_variable(kind, name, jnp.where(still, value, moved))
        return jax.tree.map(lambda a, b: jnp.where(still, a, b), kept, trained)

    def _inference(self, module, mode, args, kwargs) -> Any:
        given = inspect.signature(type(module).__call__).bind(module, *args, **kwargs)
        for field in mode:
            given.arguments.pop(field, None)
        self._inside = True
        try:
            return module.clone(parent=None, **mode).apply(module.variables, *given.args[1:], **given.kwargs)
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


def _inference_mode(module: nn.Module) -> dict[str, bool] | None:
    """Returns the fields that put a layer into inference mode; None for one that knows no modes."""
    if isinstance(module, BatchNorm):
        return {"train": False}
    if hasattr(module, "use_running_average"):
        return {"use_running_average": True}
    drops = getattr(module, "rate", getattr(module, "dropout_rate", 1)) != 0
    return {"deterministic": True} if hasattr(module, "deterministic") and drops else None


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
