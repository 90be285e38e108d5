"""The adapter from Flax NNX modules to models."""

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model, without_frozen
from jaxtransfer.models.foreign import (
    Keys,
    accepted,
    check_fit,
    in_types_of,
    leaf_at,
    named_outputs,
    nest,
    without_axis,
)
from jaxtransfer.models.frozen_layers import StillParts, untold

ByKind = dict[str, dict[Keys, Any]]
STREAMS = "streams"  # random streams: no variables of the model, started anew by the key of each call
ARRAYS = "arrays"  # bare arrays among a module's attributes


def nnx(make: Any, *, name: str = "model", stages: tuple[str, ...] = (), output: str = "logits") -> Model:
    """Returns the model of a Flax NNX module.

    The module's `__call__(inputs)` returns a dict of named arrays, or one array; it is given `train` and `rngs` where
    it has such arguments. It needs none for batch norm and dropout: each call runs a copy of the module in training
    mode (`module.train()`) or inference mode (`module.eval()`; frozen layers always), whose random streams start from
    the call's key, each from one of its own.

    Each `nnx.Param` is a parameter, under the path of its attributes (`head/kernel`, `layers/0/kernel`). Other
    variables are state, by type (`batch_stats`), bare arrays too (`arrays`). What a module sows is dropped. Under
    `pmap` a module that holds statistics has its `axis_name` set to the device axis, as `nnx.BatchNorm` has one.

    Args:
      make: `make(rngs)` returns the module: its class, say. The weights of `init(key, ...)` are those of
        `make(nnx.Rngs(key))`. A module is taken too: then the model starts from its weights, and `init` draws nothing.
      name: key of the model's weights in params and state.
      stages: path patterns from the input to the head that partition the parameters.
      output: name of the output of a module that returns one array.

    Returns:
      The model. Its `init` runs no forward pass. Its `apply` keeps the structure and the types of the state, and raises
      InputError for variables of another model, for a module that draws in training without a key, and under `pmap`
      for statistics in a module without `axis_name`.

    Raises:
      InputError: where `make` is no module and returns none.
    """
    from flax import nnx as library

    made = isinstance(make, library.Module)
    if made:
        graph, found = _split(library, make)
        call = type(make).__call__
    else:
        graph, found, call = _layout(library, make, name)
    shapes = jax.eval_shape(lambda: _variables(found)) if made else _variables(found)

    def init(key, inputs):
        if made:
            return jax.tree.map(jnp.copy, _variables(found))
        return _variables(_split(library, _make(library, make, key, name))[1])

    def apply(variables, inputs, *, train, key, axis=None, still=None):
        variables = without_frozen(variables)
        check_fit(variables, shapes, name)
        streams = _streams(found.get(STREAMS, {}), key)
        leaves = {p: leaf_at(variables[kind], p) for kind, own in found.items() if kind != STREAMS for p in own}
        module = library.merge(graph, library.from_flat_state({**leaves, **streams}))
        (module.train if train else module.eval)()
        held = _hold(library, module, StillParts(still, name), found) if train and still is not None else []
        if axis is not None and train:
            _average_over(library, axis, module, found, name)
        rngs = None if key is None else library.Rngs(key)
        outputs = named_outputs(module(inputs, **accepted(call, train=train, rngs=rngs)), output, name)
        after = dict(library.to_flat_state(library.state(module)))
        if train and key is None and any(_value(library, after[path]) is not own for path, own in streams.items()):
            raise InputError(f"model {name!r} draws (dropout) when training: pass a key; got key=None")
        state = {kind: values for kind, values in variables.items() if kind != "params"}
        if not train:
            return outputs, state
        new = {kind: {path: _value(library, after[path]) for path in found[kind]} for kind in state}
        for path in (path for own in new.values() for path in own if path[:-1] in held):
            if after[path] is not leaves[path] and _value(library, after[path]) is not leaves[path]:
                raise untold(name, "/".join(map(str, path[:-1])), str(path[-1]), "use_running_average")
        return outputs, in_types_of(state, {kind: nest(leaves) for kind, leaves in new.items()})

    return Model(init, apply, name, tuple(stages))


def _make(library: Any, make: Any, key: jax.Array, name: str) -> Any:
    """Returns the module of `make`, for which a bare array is an array also where it is traced."""
    rngs, function = library.Rngs(key), make
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, type):
        function = function.__init__  # the class itself takes anything, by its signature
    calls = callable(make) and not isinstance(make, flax.linen.Module)
    module = make
    if calls:
        module = make(rngs=rngs) if accepted(function, rngs=rngs) else make(rngs)
    if not isinstance(module, library.Module):
        raise InputError(
            f"model {name!r}: expected an nnx.Module, or a function of nnx.Rngs that returns one; got "
            f"{'a function that returns ' if calls else ''}{type(module).__name__}"
        )
    for _, node in library.iter_graph(module):
        if isinstance(node, library.Pytree):
            for attribute, value in list(vars(node).items()):
                if isinstance(value, jax.Array):
                    setattr(node, attribute, library.data(value))  # NNX takes a traced one for a constant
    return module


def _split(library: Any, module: Any) -> tuple[Any, ByKind]:
    """Returns the graph of a module, which is static, and its leaves by kind and path."""
    graph, state = library.split(module)
    found: ByKind = {"params": {}}
    for path, leaf in library.to_flat_state(state):
        found.setdefault(_kind(library, leaf), {})[path] = _value(library, leaf)
    return graph, found


def _layout(library: Any, make: Any, name: str) -> tuple[Any, ByKind, Any]:
    """Returns the graph of the module that `make` gives, the shapes of its leaves, and its `__call__`."""
    static = []

    def values(key):
        module = _make(library, make, key, name)
        graph, found = _split(library, module)
        static.extend((graph, {kind: list(leaves) for kind, leaves in found.items()}, type(module).__call__))
        return {kind: list(leaves.values()) for kind, leaves in found.items()}

    shapes = jax.eval_shape(values, jax.random.key(0))
    graph, paths, call = static
    return graph, {kind: dict(zip(paths[kind], leaves, strict=True)) for kind, leaves in shapes.items()}, call


def _kind(library: Any, leaf: Any) -> str:
    if isinstance(leaf, library.Param):
        return "params"
    if isinstance(leaf, library.RngState):
        return STREAMS
    if not isinstance(leaf, library.Variable):
        return ARRAYS
    try:
        return library.variable_name_from_type(type(leaf))
    except ValueError:  # a type of the user's own, which NNX has no name for
        return type(leaf).__name__


def _value(library: Any, leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, library.Variable) else leaf


def _variables(found: ByKind) -> dict[str, Any]:
    return {kind: nest(leaves) for kind, leaves in found.items() if kind != STREAMS}


def _streams(found: Mapping[Keys, Any], key: jax.Array | None) -> dict[Keys, Any]:
    """Returns random streams at their start: keys that differ by path, counts of zero."""
    root: jax.Array = jax.random.key(0) if key is None else key
    if not jnp.issubdtype(root.dtype, jax.dtypes.prng_key):
        root = jax.random.wrap_key_data(root)

    def start(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros(leaf.shape, leaf.dtype)
        own = jax.random.fold_in(root, zlib.crc32("/".join(map(str, path)).encode()))
        return jax.random.split(own, leaf.shape) if leaf.shape else own

    return {path: start(path, leaf) for path, leaf in found.items()}


def _hold(library: Any, module: Any, parts: StillParts, found: ByKind) -> list[Keys]:
    """Puts the layers that are still into inference mode; returns their paths."""
    keep = {path[:-1] for kind, own in found.items() if kind not in ("params", STREAMS, ARRAYS) for path in own}
    held = []
    for path, node in library.iter_modules(module):
        if parts.around(path, statistics=path in keep):
            node.eval()
            held.append(path)
    return held


def _average_over(library: Any, axis: str, module: Any, found: ByKind, name: str) -> None:
    """Sets the field `axis_name` of each module that holds statistics."""
    modules = {path: node for path, node in library.iter_graph(module) if isinstance(node, library.Module)}
    for path in [path for kind, own in found.items() if kind not in ("params", STREAMS, ARRAYS) for path in own]:
        place = next(path[:end] for end in range(len(path), -1, -1) if path[:end] in modules)
        if not hasattr(modules[place], "axis_name"):
            raise without_axis(name, "/".join(map(str, place)), modules[place])
        modules[place].axis_name = axis
