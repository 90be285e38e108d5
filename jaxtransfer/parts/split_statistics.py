"""A model run on each part of a batch by itself: batch norm then takes its statistics from a part alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError


@dataclasses.dataclass(frozen=True)
class Parts:
    """How a batch is split into parts that see nothing of each other.

    Outputs are those of the model on each part, in the order of the batch. Running statistics move to the mean over
    the parts of what each would make of them.

    Attributes:
      count: parts, which divide the batch. Under `pmap` parts of neighbours must be a multiple of the devices, so that
        each lies on one; parts of strided rows must divide the rows of a device.
      strided: whether every count-th example makes one part; else neighbours do. A part of the one kind has as few
        examples in common with a part of the other as can be.
    """

    count: int
    strided: bool = False

    def apply(
        self, apply: Callable, variables: Any, inputs: Any, *, key: Any, axis: str | None = None, **how: Any
    ) -> Any:
        """Returns the outputs [B, ...] and the new state of a model that is trained on each part by itself.

        Raises:
          InputError: for a batch that doesn't divide.
        """
        rows = len(jax.tree.leaves(inputs)[0])
        count, local = self._counts(rows, axis)
        where = how | ({"axis": axis} if axis is not None and self.strided else {})

        def one(part, number):
            drawn = None if key is None else jax.random.fold_in(key, number)
            return apply(variables, part, train=True, key=drawn, **where)

        outputs, new = jax.vmap(one)(jax.tree.map(lambda x: self._split(x, count), inputs), jnp.arange(count))
        outputs = jax.tree.map(lambda x: self._join(x, rows), outputs)
        return outputs, jax.tree.map(lambda leaf: _mean(leaf, axis if local else None), new)

    def _counts(self, rows: int, axis: str | None) -> tuple[int, bool]:
        """Returns the number of parts that this device has a share of, and whether they lie on it as a whole."""
        if axis is None or self.strided:
            if rows % self.count:
                where = "" if axis is None else " of each device"
                raise InputError(f"{rows} rows{where} don't divide into {self.count} parts for their statistics")
            return self.count, axis is None
        devices = jax.lax.axis_size(axis)
        if self.count % devices or rows % (self.count // devices):
            raise InputError(
                f"under pmap the parts for statistics must be a multiple of the {devices} devices and divide their "
                f"{rows} rows each; got {self.count} parts: choose {devices}, or train with mode='jit'"
            )
        return self.count // devices, True

    def _split(self, x: jax.Array, count: int) -> jax.Array:
        size = x.shape[0] // count
        if self.strided:
            return jnp.moveaxis(x.reshape(size, count, *x.shape[1:]), 1, 0)
        return x.reshape(count, size, *x.shape[1:])

    def _join(self, x: jax.Array, rows: int) -> jax.Array:
        return (jnp.moveaxis(x, 0, 1) if self.strided else x).reshape(rows, *x.shape[2:])


def _mean(leaf: jax.Array, axis: str | None) -> jax.Array:
    """Returns the mean over the parts, and over the devices that have others; of what can't be averaged the first."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf[0]
    wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    mean = wide[0] + jnp.mean(wide - wide[:1], axis=0)  # what no part moves keeps its bits
    return (mean if axis is None else jax.lax.pmean(mean, axis)).astype(leaf.dtype)
