"""A parameter of the base as a matrix from inputs to outputs: which of its axes are inputs, for the layers we know."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.deltas.int8 import Int8, floating
from jaxtransfer.errors import InputError

Layout = Mapping[str, Sequence[int]]
KERNELS = ("kernel", "weight", "w")


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter of the base, or what an earlier part of a chain made of it.

    Attributes:
      path: its path among the parameters.
      held: the array, or an `Int8`.
      inputs: the axes that are inputs, in the order in which they make the rows of the matrix; None where the part that
        chose it asks for no matrix.
    """

    path: str
    held: Any
    inputs: tuple[int, ...] | None = None

    @property
    def value(self) -> jax.Array:
        """The array, in at least float32."""
        value = floating(self.held)
        return value.astype(jnp.promote_types(value.dtype, jnp.float32))

    @property
    def dtype(self) -> Any:
        """The type of what is computed with it: float32 at least."""
        return jnp.promote_types(self.held.dtype, jnp.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return tuple(self.held.shape)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The axes that are outputs, in order."""
        return tuple(axis for axis in range(len(self.shape)) if axis not in self._inputs)

    @property
    def rows(self) -> int:
        """I, the number of inputs."""
        return math.prod(self.shape[axis] for axis in self._inputs)

    @property
    def columns(self) -> int:
        """O, the number of outputs."""
        return math.prod(self.shape[axis] for axis in self.outputs)

    @property
    def matrix(self) -> jax.Array:
        """The matrix [I, O]: y = x · matrix + bias."""
        return self.value.transpose(*self._inputs, *self.outputs).reshape(self.rows, self.columns)

    @property
    def taps(self) -> int:
        """The places of a convolution's kernel, k · k: the inputs of each channel; 1 for other layers."""
        inputs = self._inputs
        moved = inputs != tuple(sorted(inputs)) or self.path.split("/")[-1] == "weight"
        return math.prod(self.shape[axis] for axis in inputs[1:]) if moved else 1

    def shaped(self, matrix: jax.Array) -> jax.Array:
        """Returns a matrix [I, O] in the shape of the parameter."""
        order = (*self._inputs, *self.outputs)
        return matrix.reshape([self.shape[axis] for axis in order]).transpose(_inverse(order))

    def rows_of(self, matrix: jax.Array) -> jax.Array:
        """Returns a matrix [I, n] whose inputs are counted as the axes stand, in the order of `matrix`."""
        order = sorted(self._inputs)
        apart = matrix.reshape(*(self.shape[axis] for axis in order), -1)
        return apart.transpose(*(order.index(axis) for axis in self._inputs), len(order)).reshape(self.rows, -1)

    def beside(self, factor: jax.Array, *, of_inputs: bool = False) -> jax.Array:
        """Returns numbers [O] for the outputs, or [I] for the inputs, to be multiplied with the parameter as it is."""
        own = self._inputs if of_inputs else self.outputs
        order = (*own, *(axis for axis in range(len(self.shape)) if axis not in own))
        sizes = [self.shape[axis] if axis in own else 1 for axis in order]
        return factor.reshape(sizes).transpose(_inverse(order))

    def named(self, held: Any) -> "Weight":
        """Returns the same parameter with another value."""
        return dataclasses.replace(self, held=held)

    @property
    def _inputs(self) -> tuple[int, ...]:
        if self.inputs is None:
            raise InputError(f"{self.path!r} {list(self.shape)} was chosen by a part that makes no matrix of it")
        return self.inputs


Weights = Mapping[str, Weight]


def weights_of(params: Any) -> dict[str, Weight]:
    """Returns the parameters of a base by path, without layouts."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: isinstance(node, Int8))
    return {tree.path_of(path): Weight(tree.path_of(path), leaf) for path, leaf in leaves}


def input_axes(path: str, weights: Weights, as_matrix: Layout | None = None) -> tuple[int, ...] | None:
    """Returns which axes of a parameter are inputs, in the order in which they are the rows of its matrix.

    A `kernel` (Flax, or Haiku's `w`) has its outputs last: as many axes as its layer's bias, so that attention's
    [D, H, d] and [H, d, D] are told apart, by the names query, key, value and out where there is no bias. A convolution
    [k, k, C, D], grouped and depthwise ones too, has the rows (C, k, k), as PyTorch counts them. A `weight` (Equinox,
    PyTorch) has its outputs first, or is an embedding where the layer's name says so. Rows of an `embedding` and of
    tables of positions are inputs.

    Args:
      path: of the parameter.
      weights: all parameters of the base.
      as_matrix: patterns of parameters and their input axes, for layers that none of this fits.

    Returns:
      The axes; None for vectors and biases, which are no matrices.

    Raises:
      InputError: for a parameter that no rule fits, and for axes that it does not have.
    """
    shape = weights[path].shape
    for pattern, axes in (as_matrix or {}).items():
        if tree.matches(path, pattern):
            return _checked(path, shape, axes)
    *above, name = path.split("/")
    layer, count = above[-1] if above else "", len(shape)
    if count < 2 or name in ("bias", "b"):
        return None
    if name == "embedding" or re.search(r"positions?$", name) or (name == "weight" and "embed" in layer.lower()):
        return tuple(range(count - 1))
    if name == "weight":
        return tuple(range(1, count))
    if name in KERNELS:
        bias = next((weights[p].shape for end in ("bias", "b") if (p := "/".join((*above, end))) in weights), None)
        if bias is not None and len(bias) > 1 and shape[-len(bias) :] == bias:
            return tuple(range(count - len(bias)))
        if bias is None and count == 3 and layer in ("query", "key", "value"):
            return (0,)
        if count == 2 or (count == 3 and layer == "out"):
            return tuple(range(count - 1))
        if count > 3 or bias is not None:  # a convolution; without a bias [k, C, D] may be another layer
            return (count - 2, *range(count - 2))
    raise InputError(
        f"which axes of {path!r} {list(shape)} are inputs can't be told: name them, as_matrix={{{path!r}: (0,)}} say, "
        f"or leave it out of only="
    )


def _checked(path: str, shape: tuple[int, ...], axes: Sequence[int]) -> tuple[int, ...]:
    own = tuple(axes)
    if not own or len(set(own)) != len(own) or len(own) >= len(shape) or not all(0 <= a < len(shape) for a in own):
        raise InputError(
            f"as_matrix: the input axes of {path!r} {list(shape)} must be some of {list(range(len(shape)))}, each once "
            f"and not all; got {list(own)}"
        )
    return own


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=lambda place: order[place])
