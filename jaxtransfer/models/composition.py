"""Models made of models: parts with weights of their own, run one after another by a function."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model, given
from jaxtransfer.models.heads import by_kind, by_part, outputs_of

Call = Callable[[str, Any], Mapping[str, Any]]


def composed(
    like: Model, parts: Mapping[str, Model], run: Callable[[Call, Any], dict[str, Any]], *, stages: tuple[str, ...]
) -> Model:
    """Returns one model of several, its parameters and state nested by part.

    Args:
      like: whose name it has.
      parts: by name; one object may stand under several names, and has other weights under each.
      run: `run(call, inputs) -> outputs`, where `call(part, inputs)` gives the outputs of a part; each once.
      stages: path patterns from the input to the head, for layer-wise rates.

    Raises:
      InputError: for a part that is a twin.
    """
    if twins := [model.name for model in parts.values() if model.shares is not None]:
        raise InputError(f"model {twins[0]!r} is a twin: make the model of several parts first, and then its twin")

    def init(key, inputs):
        keys = dict(zip(parts, jax.random.split(key, len(parts)), strict=True))
        variables: dict[str, Any] = {}

        def call(part, x):
            variables[part] = dict(parts[part].init(keys[part], x))
            return _zeros(outputs_of(parts[part], variables[part], x))

        run(call, inputs)
        return {"params": {}, **by_kind({part: variables[part] for part in parts})}  # all may be fixed

    def apply(variables, inputs, *, train, key, axis=None, still=None):
        own, states = by_part(variables, tuple(parts)), {}

        def call(part, x):
            drawn = None if key is None else jax.random.fold_in(key, list(parts).index(part))
            where = given(axis=axis, still=None if still is None else still.get(part))
            outputs, state = parts[part].apply(own[part], x, train=train, key=drawn, **where)
            states[part] = dict(state)
            return outputs

        outputs = run(call, inputs)
        return outputs, by_kind({part: states[part] for part in parts})

    frozen = {part: model.frozen for part, model in parts.items() if model.frozen}
    return Model(init, apply, like.name, stages, frozen)


def vectors_of(model: str, outputs: Mapping[str, Any]) -> jax.Array:
    """Returns what the next part reads of a part: an encoder's features, a head's output."""
    for name in ("features", "output"):
        if name in outputs:
            return outputs[name]
    raise InputError(f"{model!r} gives neither features nor an output; it gives {', '.join(sorted(outputs))}")


def distinct(*names: str) -> None:
    """Raises where two parts have one name."""
    if twice := sorted(name for name in set(names) if names.count(name) > 1):
        raise InputError(f"two parts of the model are called {twice[0]!r}; call the task otherwise")


def _zeros(shapes: Mapping[str, Any]) -> dict[str, Any]:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dict(shapes))
