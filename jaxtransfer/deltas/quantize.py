"""Weight-only quantisation of a base to eight bits."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.deltas.int8 import Int8
from jaxtransfer.deltas.part import matrices
from jaxtransfer.deltas.weight import Layout, weights_of


def quantize(base: Mapping[str, Any], *, only: tree.Patterns | None = None, as_matrix: Layout | None = None) -> Any:
    """Returns variables whose kernels are `Int8`: w ≈ round(w/c) · c, c = max |w| / 127 of each output.

    An entry is off by c/2 at most. The kernels take a quarter of the memory; a delta on them trains in float32 (as
    QLoRA does, Dettmers et al. 2023, arXiv:2305.14314, with another number format):
    `jt.deltas.delta(model, jt.deltas.quantize(variables), jt.deltas.lora(8))`.

    Args:
      base: variables `{"params": ..., **state}` of floating-point numbers.
      only: path patterns of what is quantised; all kernels by default.
      as_matrix: input axes by pattern, for layers that `input_axes` does not know.

    Raises:
      InputError: where the patterns select no kernel.
    """
    chosen = matrices(weights_of(base["params"]), None if only is None else tree.as_patterns(only), as_matrix)

    def held(key_path, leaf):
        weight = chosen.get(tree.path_of(key_path))
        if weight is None:
            return leaf
        value = weight.value
        largest = jnp.max(jnp.abs(value), axis=weight.inputs, keepdims=True)
        scale = jnp.where(largest > 0, largest / 127, 1).astype(value.dtype)
        return Int8(jnp.round(value / scale).astype(jnp.int8), scale)

    return {**base, "params": jax.tree_util.tree_map_with_path(held, base["params"])}
