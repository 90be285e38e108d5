"""The adapter from Equinox modules to models."""

import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model, without_frozen
from jaxtransfer.models.foreign import Keys, accepted, check_fit, in_types_of, leaf_at, named_outputs, nest
from jaxtransfer.models.frozen_layers import StillParts, untold

BATCH = "batch"  # the axis of examples, over which batch norm averages
ROWS = "rows"  # its name beside a device axis, which is called "batch", too


def equinox(make: Any, *, name: str = "model", stages: tuple[str, ...] = (), output: str = "logits") -> Model:
    """Returns the model of an Equinox module.

    As is usual there, the module sees one example: `__call__(x, state, *, key)` runs under `jax.vmap` with
    `axis_name="batch"`; `state` is given to a module that has some, `key`, one for each example, where there is such an
    argument. It returns a dict of named arrays, or one array; with a state, that and the new state.

    Floating-point arrays are the parameters, under the path of their fields (`head/weight`, `layers/0/weight`); what
    `eqx.nn.State` holds and other arrays are state (`state`, `arrays`); all else is static. `eqx.nn.inference_mode`
    sets training and inference mode; frozen layers are always in the latter. Under `pmap` batch norm averages over the
    device axis, too; a module that averages over "batch" by hand (`jax.lax.pmean`) needs `mode="jit"`.

    Args:
      make: `make(key)` returns the module: `lambda key: Net(10, key=key)`. One with state (batch norm) comes with it:
        `lambda key: eqx.nn.make_with_state(Net)(10, key=key)`. A module, or such a pair, is taken too: then the
        model starts from its weights, and `init` draws nothing.
      name: key of the model's weights in params and state.
      stages: path patterns from the input to the head that partition the parameters.
      output: name of the output of a module that returns one array.

    Returns:
      The model. Its `init` runs no forward pass. Its `apply` keeps the structure and the types of the state, and raises
      InputError for variables of another model, and under `pmap` for state elsewhere than in batch norm.

    Raises:
      InputError: without Equinox (`pip install 'jaxtransfer[equinox]'`), where `make` is no module and returns none,
        for a module whose state has not been made apart, and for batch norm over an axis of another name.
    """
    eqx = _library()
    made = isinstance(make, eqx.Module | tuple) or not callable(make)
    static: list[_Static] = []

    def traced(key):
        parts, variables = _split(eqx, make if made else make(key), name)
        static.append(parts)
        return variables

    shapes = jax.eval_shape(traced, jax.random.key(0))
    parts = static[0]
    call = type(parts.module).__call__

    def init(key, inputs):
        variables = _split(eqx, make if made else make(key), name)[1]
        return jax.tree.map(jnp.array, variables)  # copies: what the caller gave may be donated

    def apply(variables, inputs, *, train, key, axis=None, still=None):
        variables = without_frozen(variables)
        check_fit(variables, shapes, name)
        module, state = _join(eqx, parts, variables)
        module = eqx.nn.inference_mode(module, value=not train)
        if train and still is not None:
            module = _held(eqx, module, StillParts(still, name))
        rows = BATCH
        if axis is not None and train:
            module, rows = _averaged_over(eqx, axis, module, name), ROWS

        def one(x, key):
            given = accepted(call, key=key)
            if state is None:
                return named_outputs(module(x, **given), output, name), None
            returned = module(x, state, **given)
            if not isinstance(returned, tuple) or len(returned) != 2:
                raise InputError(f"the module of model {name!r} has state: expected it to return outputs and new state")
            return named_outputs(returned[0], output, name), returned[1]

        keys = None if key is None else jax.random.split(key, len(jax.tree.leaves(inputs)[0]))
        outputs, new = jax.vmap(one, out_axes=(0, None), axis_name=rows)(inputs, keys)
        old = {kind: values for kind, values in variables.items() if kind != "params"}
        if not train or state is None:
            return outputs, old
        leaves = dict(zip(parts.state_paths, jax.tree.leaves(new), strict=True))
        return outputs, in_types_of(old, {**old, "state": nest(leaves)})

    return Model(init, apply, name, tuple(stages))


class _Static(NamedTuple):
    """What of a module and its state is no array: in which kind and under which path each array is."""

    module: Any
    structure: Any
    paths: list[tuple[str, Keys]]
    state: Any
    state_paths: list[Keys]


def _split(eqx: Any, given: Any, name: str) -> tuple[_Static, dict[str, Any]]:
    """Returns the static part of a module and its state, and their arrays as variables."""
    module, state = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(module, eqx.Module) or not isinstance(state, eqx.nn.State | None):
        raise InputError(
            f"model {name!r}: expected an eqx.Module, a pair of one and its eqx.nn.State, or a function of a key that "
            f"returns such; got {type(given).__name__}"
        )
    _check_norms(eqx, module, name)
    arrays, static = eqx.partition(module, eqx.is_array)
    leaves, structure = jax.tree.flatten_with_path(arrays)
    paths = [("params" if eqx.is_inexact_array(leaf) else "arrays", _keys(path)) for path, leaf in leaves]
    found: dict[str, dict[Keys, Any]] = {"params": {}}
    for (kind, path), (_, leaf) in zip(paths, leaves, strict=True):
        found.setdefault(kind, {})[path] = leaf
    values, state_structure = jax.tree.flatten(state)
    state_paths = _state_paths(eqx, module, state_structure, name)
    if values:
        found["state"] = dict(zip(state_paths, values, strict=True))
    parts = _Static(static, structure, paths, state_structure, state_paths)
    return parts, {kind: nest(own) for kind, own in found.items()}


def _join(eqx: Any, parts: _Static, variables: Any) -> tuple[Any, Any]:
    """Returns the module and its state, with the arrays of the variables: the inverse of `_split`."""
    leaves = [leaf_at(variables[kind], path) for kind, path in parts.paths]
    module = eqx.combine(jax.tree.unflatten(parts.structure, leaves), parts.module)
    return module, jax.tree.unflatten(parts.state, [leaf_at(variables["state"], path) for path in parts.state_paths])


def _state_paths(eqx: Any, module: Any, structure: Any, name: str) -> list[Keys]:
    """Returns for each leaf of the state the path of the layer's field that it belongs to."""
    indices = _nodes(module, eqx.nn.StateIndex)
    positions = jax.tree.unflatten(structure, range(structure.num_leaves))
    if indices and positions is None:
        raise InputError(
            f"model {name!r} has a module with state: give the pair of `eqx.nn.make_with_state(...)`, as in "
            f"lambda key: eqx.nn.make_with_state(Net)(key=key)"
        )
    found = {number: (str(number),) for number in range(structure.num_leaves)}
    for path, index in indices:
        for inner, number in jax.tree.leaves_with_path(positions.get(index)):
            found[number] = (*path, *_keys(inner))
    return list(found.values())


def _held(eqx: Any, module: Any, parts: StillParts) -> Any:
    """Returns the module with the layers that are still in inference mode, in the order of their fields."""

    def told(path, node):
        keys = _keys(path)
        layer = keys if isinstance(node, eqx.Module) and not isinstance(node, eqx.nn.StateIndex) else keys[:-1]
        holds = parts.in_order(layer)
        if isinstance(node, eqx.nn.StateIndex) and holds:
            raise untold(parts.name, "/".join(layer), keys[-1], "inference")
        return eqx.nn.inference_mode(node) if layer == keys and holds else node

    def knows(node):
        return isinstance(node, eqx.nn.StateIndex) or (isinstance(node, eqx.Module) and hasattr(node, "inference"))

    return jax.tree.map_with_path(told, module, is_leaf=knows)


def _averaged_over(eqx: Any, axis: str, module: Any, name: str) -> Any:
    """Returns the module with batch norm averaging over the device axis as well."""
    norms = [path for path, _ in _nodes(module, eqx.nn.BatchNorm)]
    for path, _ in _nodes(module, eqx.nn.StateIndex):
        if path[:-1] not in norms:
            raise InputError(
                f"model {name!r} has running state at {'/'.join(path)}, outside of batch norm: under pmap each device "
                f"would keep its own. Train with mode='jit'"
            )
    if not norms:
        return module
    names = lambda module: [norm.axis_name for _, norm in _nodes(module, eqx.nn.BatchNorm)]  # noqa: E731
    return eqx.tree_at(
        names, module, replace_fn=lambda own: (*(ROWS if one == BATCH else one for one in _names(own)), axis)
    )


def _check_norms(eqx: Any, module: Any, name: str) -> None:
    for path, norm in _nodes(module, eqx.nn.BatchNorm):
        if BATCH not in _names(norm.axis_name):
            raise InputError(
                f"model {name!r}: {'/'.join(path)} averages over axis_name={norm.axis_name!r}, but the examples' axis "
                f"is called {BATCH!r}: eqx.nn.BatchNorm(..., axis_name={BATCH!r})"
            )


def _names(axis_name: Any) -> tuple[Any, ...]:
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)


def _nodes(module: Any, kind: type) -> list[tuple[Keys, Any]]:
    """Returns the parts of a module that are of a kind, by path."""
    nodes = jax.tree.leaves_with_path(module, is_leaf=lambda node: isinstance(node, kind))
    return [(_keys(path), node) for path, node in nodes if isinstance(node, kind)]


def _keys(path: tuple) -> Keys:
    return tuple(tree.path_of((key,)) for key in path)


def _library() -> Any:
    try:
        return importlib.import_module("equinox")
    except ImportError:
        raise InputError("models of Equinox need it: pip install 'jaxtransfer[equinox]'") from None
