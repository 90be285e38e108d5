"""Outputs of models by name, and their shapes: what a term reads, and from what it sizes its own parameters."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxtransfer.errors import unknown
from jaxtransfer.forward import Forward
from jaxtransfer.objective import Batch, view_of

Tap = str | tuple[str, ...]


def pick(whose: str, outputs: Mapping[str, Any], tap: Tap) -> Any:
    """Returns the output called `tap`, or a tuple of them; `whose` they are is for the message."""
    if isinstance(tap, tuple):
        return tuple(pick(whose, outputs, name) for name in tap)
    if tap not in outputs:
        raise unknown(f"output of {whose}", tap, outputs)
    return outputs[tap]


def shapes_of(forward: Forward, batch: Batch) -> Any:
    """Returns the shapes and types of a forward's outputs, a dict by name, computing nothing.

    What a term sizes its own weights by, in its `setup(key, batch)`:
    `jt.shapes_of(jt.Forward.of(model), batch)["features"].shape`.

    Args:
      forward: a run of a model; of joined views, the outputs of the first.
      batch: an example of the batches to come.

    Raises:
      InputError: where the batch lacks the view.
    """

    def run(inputs):
        variables = forward.model.complete(forward.weights.example(jax.random.key(0), inputs))
        return forward.model.apply(variables, inputs, train=False, key=None)[0]

    return jax.eval_shape(run, view_of(batch, forward.view))
