"""A model that runs in micro-batches, so that a batch may be larger than what its activations would take."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import FROZEN, Model, given, state_of


def micro_batched(model: Model, size: int) -> Model:
    """Returns the model run on `size` examples at a time, whose activations are computed anew for the gradient.

    Gradient caching (Gao et al. 2021, arXiv:2101.06983): outputs and gradients are those of the whole batch, in the
    memory of the activations of one micro-batch and the outputs of all; one more forward pass is the price. Outputs
    that the loss does not read take no memory. Batch norm sees micro-batches: its statistics are theirs, and its
    running means move once for each. Dropout draws anew for each.

    Args:
      model: of examples along the first axis.
      size: examples at a time; it must divide the batch, and be a multiple of the devices under a mesh.

    Raises:
      InputError: for a size below one; when called, for a batch that doesn't divide.
    """
    if size < 1:
        raise InputError(f"a micro-batch needs at least one example; got {size}")

    def apply(variables, inputs, *, train, key, axis=None, still=None):
        rows = len(jax.tree.leaves(inputs)[0])
        if rows % size:
            raise InputError(f"a batch of {rows} doesn't divide into micro-batches of {size}")
        count = rows // size
        where = given(axis=axis, still=still)
        state = state_of(variables)
        fixed = {kind: values for kind, values in variables.items() if kind == FROZEN}

        @jax.checkpoint
        def run(params, state, inputs, number):
            drawn = None if key is None else jax.random.fold_in(key, number)
            return model.apply({"params": params, **state, **fixed}, inputs, train=train, key=drawn, **where)

        def one(state, part):
            outputs, state = run(variables["params"], state, *part)
            return dict(state), outputs

        # Every count-th example makes one micro-batch: each device then has a part of each.
        apart = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(size, count, *x.shape[1:]), 1, 0), inputs)
        if jax.default_backend() == "cpu":  # where convolutions inside of a loop are slow
            outputs = []
            for number in range(count):
                state, found = one(state, (jax.tree.map(lambda x, n=number: x[n], apart), number))
                outputs.append(found)
            outputs = jax.tree.map(lambda *x: jnp.stack(x), *outputs)
        else:
            state, outputs = jax.lax.scan(one, state, (apart, jnp.arange(count)))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, *x.shape[2:]), outputs), state

    return dataclasses.replace(model, apply=apply).made_from(model.recipe)
