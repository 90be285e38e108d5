"""New small layers inside of a frozen network: where they stand, how they are drawn, and the model with them."""

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.models.frozen_base import FrozenBase

Leaves = Mapping[str, jax.Array]
Hook = Callable[..., Any]


class Drawn(NamedTuple):
    """How a new parameter starts.

    Attributes:
      init: `init(key, shape, dtype)`.
      shape: its shape.
    """

    init: Callable[[Any, tuple[int, ...], Any], jax.Array]
    shape: tuple[int, ...]


class Insert(NamedTuple):
    """What is put into a network.

    Attributes:
      params: how each of the new parameters starts, by path.
      hooks: `hooks(leaves) -> {path of a layer: hook}`, called anew for each forward pass with the new parameters by
        path. `hook(layer, call, *args, **kwargs)` stands for `call(*args, **kwargs)`, the call of the layer, and may
        look at the module `layer`.
    """

    params: Mapping[str, Drawn]
    hooks: Callable[[Leaves], dict[str, Hook]]


def inserted(model: Model, base: Any, what: str, insert: Callable[[Mapping[str, Any]], Insert], own: Any) -> Model:
    """Returns the model with new layers on frozen weights; the new parameters and its own are all that trains.

    Args:
      model: of Flax Linen, or made of such a model.
      base: its weights, see `FrozenBase`.
      what: the name of the method, for errors.
      insert: what is inserted, given the base's parameters by path.
      own: path patterns of the parameters that are not the base's, see `FrozenBase`.

    Raises:
      InputError: as `FrozenBase` does; when called, where the network does not run the layers by these paths.
    """
    weights = FrozenBase(model, base, own, what)
    new = insert(weights.params)

    def init(key, inputs):
        params, state = weights.init(key, inputs)
        for path, drawn in new.params.items():
            own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
            params[path] = drawn.init(own_key, drawn.shape, jnp.float32)
        return {"params": tree.nested(params), **state}

    def apply(variables, inputs, *, train, key, axis=None, still=None):
        leaves = tree.leaves_by_path(variables["params"])
        rest = {path: leaf for path, leaf in leaves.items() if path not in new.params}
        if missing := [path for path in new.params if path not in leaves]:
            raise InputError(f"the variables are not those of {what}: they lack {tree.listed(missing)}")
        flags = None if still is None else tree.leaves_by_path(still)
        layers = _Intercepted(new.hooks({path: leaves[path] for path in new.params}), weights)
        with layers.on():
            return weights.apply(variables, rest, inputs, train=train, key=key, axis=axis, still=flags)

    stages = weights.stages(new.params)
    return dataclasses.replace(model, init=init, apply=apply, stages=stages, frozen=weights.frozen, recipe=None)


class _Intercepted:
    """Runs hooks around the layers of one forward pass, by the paths of their parameters in the base."""

    def __init__(self, hooks: Mapping[str, Hook], weights: FrozenBase):
        self.hooks, self.weights = hooks, weights
        self.met: set[str] = set()
        self._trail: list[str] = []  # paths of the layers that are running, from the outermost
        self._above = ""  # what stands before a module's path: of a part of a model, or of a layer run by itself

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Hooks what is applied inside, and sees to it that all hooks were met."""
        with nn.intercept_methods(self._intercept):
            yield
        if missed := [path for path in self.hooks if path not in self.met]:
            raise InputError(
                f"{self.weights.what}: model {self.weights.model.name!r} runs no layer of Flax Linen called "
                f"{tree.listed(missed, limit=3)}; it changes layers by their paths, which modules of other libraries "
                f"don't tell"
            )

    def _intercept(self, call, args, kwargs, context) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        before = self._above
        # A module without a path is the network itself, or a layer that is run in inference mode among others.
        alone = not module.path
        if alone:
            self._above = self._trail[-1] if self._trail else self._place_of(module)
        path = "/".join(filter(None, (self._above, *module.path)))
        hook = None if alone and self._trail else self.hooks.get(path)
        self._trail.append(path)
        try:
            if hook is None:
                return call(*args, **kwargs)
            self.met.add(path)
            return hook(module, call, *args, **kwargs)
        finally:
            self._trail.pop()
            self._above = before

    def _place_of(self, network: nn.Module) -> str:
        """Returns where the parameters of a network stand in the base: of an encoder below heads, `encoder`."""
        own = set(network.variables.get("params", {}))
        above = {"/".join(path.split("/")[:depth]) for path in self.hooks for depth in range(path.count("/") + 1)}
        keys: dict[str, set[str]] = {place: set() for place in above}
        for path in self.weights.params:
            parts = path.split("/")
            for depth in range(len(parts)):
                if (place := "/".join(parts[:depth])) in keys:
                    keys[place].add(parts[depth])
        # Layers of its own may be new to the base: it has no head, say.
        new = {key for key in own if tree.matches(key, self.weights.own)} if self.weights.own else set()
        found = sorted(place for place in above if keys[place] - new == own - new)
        if len(found) > 1:
            raise InputError(
                f"{self.weights.what}: two parts of model {self.weights.model.name!r} have the same layers, "
                f"{' and '.join(found)}; change each part by itself, and make the model of them"
            )
        return found[0] if found else "?"  # no parameter's path: nothing is hooked below it
