"""The adapter from Flax Linen modules to models."""

import contextlib
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model, state_of, without_frozen
from jaxtransfer.models.frozen_layers import StillLayers


def linen(module: nn.Module, *, name: str = "model", stages: tuple[str, ...] = ()) -> Model:
    """Returns the model of a Flax Linen module.

    The module's `__call__(inputs, *, train)` returns a dict of named arrays; `train` may be left out where
    it has no meaning, and a bare array stands for the logits. Dropout draws from the stream "dropout". Under
    `pmap` the module is cloned with its field `axis` set to the name of the device axis, to hand on to
    `nn.BatchNorm(axis_name=axis)`; a module with batch statistics needs that field there. Where a part of it is
    frozen, those layers run in inference mode, batch norm and dropout, whatever `train` says (see `StillLayers`).

    Args:
      module: the module; it holds no weights.
      name: key of the model's weights in params and state.
      stages: path patterns from the input to the head that partition the parameters.

    Returns:
      The model. Its `init` takes arrays or their shapes (`jax.ShapeDtypeStruct`), and needs their values only for a
      module that initialises from data, which is refused shapes alone. Its `apply` raises InputError for inputs that
      don't fit the weights, and keeps the structure and the types of the state.

    Raises:
      InputError: for what is no Linen module, a class of one, say.
    """
    if not isinstance(module, nn.Module):
        came = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
        remedy = f"make one: {module.__name__}(...)" if isinstance(module, type) else "jt.Model takes plain functions"
        raise InputError(f"model {name!r}: expected a module of flax.linen, got {came}; {remedy}")
    mode = "train" in inspect.signature(type(module).__call__).parameters
    fields = {field.name for field in dataclasses.fields(module)}

    def arguments(train) -> dict[str, Any]:
        return {"train": train} if mode else {}

    def over(axis, variables, train):
        if axis is None or "axis" in fields:
            return module if axis is None else module.clone(axis=axis)
        if train and "batch_stats" in variables:
            raise InputError(
                f"model {name!r} has batch statistics, and its module {type(module).__name__} has no field "
                "`axis`: add `axis: str | None = None` and pass it to nn.BatchNorm(axis_name=self.axis)"
            )
        return module

    def initialised(inputs, keys):
        return module.init(keys, inputs, **arguments(False))

    def init(key, inputs):
        keys = {"params": key, "dropout": jax.random.fold_in(key, 1)}
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), jax.eval_shape(lambda x: x, inputs))
        with _one_line_errors(name, inputs):
            drawn = _without_inputs(initialised, shapes, keys)
            if drawn is not None:
                return drawn
            if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(inputs)):
                return _of_any(lambda x: initialised(x, keys), shapes, name)
            return initialised(inputs, keys)

    def apply(variables, inputs, *, train, key, axis=None, still=None):
        variables, state = without_frozen(variables), state_of(variables)
        layers = StillLayers(still, name) if train and still is not None else None
        with _one_line_errors(name, inputs), layers.intercepted() if layers else contextlib.nullcontext():
            outputs, new = over(axis, variables, train).apply(
                variables,
                inputs,
                **arguments(train),
                mutable=list(state) if train else [],
                rngs={} if key is None else {"dropout": key},
            )
        outputs = outputs if isinstance(outputs, Mapping) else {"logits": outputs}
        return outputs, _like(state, new, name) if train else state

    return Model(init, apply, name, tuple(stages))


def _like(state, new, name):
    """Returns the values of `new` with the structure and the types of `state`."""
    if extra := sorted(tree.leaves_by_path(new).keys() - tree.leaves_by_path(state).keys()):
        raise InputError(f"the variables are not those of model {name!r}: its state lacks {tree.listed(extra)}")
    old, structure = jax.tree.flatten(state)
    leaves = [jnp.asarray(n, o.dtype) for n, o in zip(jax.tree.leaves(new), old, strict=True)]
    return jax.tree.unflatten(structure, leaves)


def _without_inputs(init, shapes, keys):
    """Returns what `init(inputs, keys)` gives whatever the inputs are, or None where it may depend on their values.

    Layers that loop or remat count, too: newer versions of Flax's `lazy_init` take zeros for them without a word. It is
    traced, once for each kind of inputs, and of the program only that is run which draws the variables, operation by
    operation: layers of one shape share what is compiled.
    """
    program, out = jax.make_jaxpr(init, return_shape=True)(shapes, keys)
    jaxpr, seen = program.jaxpr, len(jax.tree.leaves(shapes))
    reached = set(jaxpr.invars[:seen])

    def met(variables, some) -> bool:
        return any(isinstance(v, jax.extend.core.Var) and v in some for v in variables)

    for equation in jaxpr.eqns:
        if met(equation.invars, reached):
            reached.update(equation.outvars)
    if met(jaxpr.outvars, reached):
        return None
    needed, kept = {v for v in jaxpr.outvars if isinstance(v, jax.extend.core.Var)}, []
    for equation in reversed(jaxpr.eqns):
        if met(equation.outvars, needed):
            kept.append(equation)
            needed.update(v for v in equation.invars if isinstance(v, jax.extend.core.Var))
    drawing = jax.extend.core.ClosedJaxpr(jaxpr.replace(eqns=kept[::-1]), program.consts)
    unread = [None] * seen
    leaves = jax.extend.core.jaxpr_as_fun(drawing)(*unread, *jax.tree.leaves(keys))
    return jax.tree.unflatten(jax.tree.structure(out), leaves)


def _of_any(init, shapes, name):
    """Returns variables that are the same whatever the inputs are, of which only the shapes are known."""
    zeros, ones = (init(jax.tree.map(lambda x, fill=fill: jnp.full(x.shape, fill, x.dtype), shapes)) for fill in (0, 1))
    if any(not bool(jnp.all(a == b)) for a, b in zip(*map(jax.tree.leaves, (zeros, ones)), strict=True)):
        raise InputError(f"model {name!r} initialises from data: give its init arrays, not shapes alone")
    return zeros


@contextlib.contextmanager
def _one_line_errors(name, inputs):
    try:
        yield
    except flax.errors.ScopeParamShapeError as error:
        shapes = jax.tree.map(jnp.shape, inputs)
        reason = str(error).split(" (http")[0]
        raise InputError(f"inputs of shape {shapes} don't fit the weights of model {name!r}: {reason}") from None
    except (
        flax.errors.ScopeParamNotFoundError,
        flax.errors.ScopeCollectionNotFound,
        flax.errors.ScopeVariableNotFoundError,
    ) as error:
        reason = str(error).split(" (http")[0]
        raise InputError(f"the variables are not those of model {name!r}: {reason}") from None
    except flax.errors.InvalidRngError:
        raise InputError(f"model {name!r} draws (dropout) when training: pass a key; got key=None") from None
