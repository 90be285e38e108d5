"""Weights held in eight bits: a base that takes a quarter of its memory, under deltas in float32."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Int8:
    """A parameter as whole numbers times a scale for each output: w ≈ values · scale.

    Attributes:
      values: int8, of the parameter's shape.
      scale: float32, of the same rank, 1 along the inputs.
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """The type of what it stands for."""
        return self.scale.dtype


def floating(leaf: Any) -> jax.Array:
    """Returns a leaf as the floating-point array that it stands for: an `Int8` multiplied out, others as they are."""
    return leaf.values.astype(leaf.scale.dtype) * leaf.scale if isinstance(leaf, Int8) else jnp.asarray(leaf)


def plain(params: Any) -> Any:
    """Returns a tree with each `Int8` in it multiplied out."""
    return jax.tree.map(
        lambda leaf: floating(leaf) if isinstance(leaf, Int8) else leaf, params, is_leaf=lambda n: isinstance(n, Int8)
    )
