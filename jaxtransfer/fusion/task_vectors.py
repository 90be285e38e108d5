"""Task vectors: what fine-tuning added to a base, as something to add, to negate and to scale."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.fusion.consensus import Consensus, weighted_sum
from jaxtransfer.fusion.leaves import (
    as_list,
    check_alike,
    check_number,
    double,
    fused,
    is_mixed,
    is_state,
    weights_of,
    wide,
)


def task_vector(model: Any, base: Any) -> Any:
    """Returns τ = w − w₀, what fine-tuning added (Ilharco et al. 2023, arXiv:2212.04089).

    Args:
      model: w, fine-tuned from the base.
      base: w₀.

    Returns:
      A tree of the same structure, in at least float32: in half precision most of a difference would be rounded off.
      Running state beside `params`, and leaves that are no floating-point numbers, are zeros.

    Raises:
      InputError: for another architecture than the base's.
    """
    check_alike([base, model], names=("the base", "the model"))
    tuned = tree.leaves_by_path(model)

    def difference(key_path, leaf):
        path = tree.path_of(key_path)
        if not is_mixed(leaf) or is_state(base, path):
            # of a leaf that isn't mixed the type is kept: keys have no zero
            return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.extended) else np.zeros(leaf.shape, leaf.dtype)
        return wide(tuned[path]) - wide(leaf)

    return jax.tree_util.tree_map_with_path(difference, base)


def apply_task_vector(base: Any, vector: Any, *, scale: float = 1.0) -> Any:
    """Returns w₀ + λτ; with a negative λ the base forgets the task. Running state stays the base's.

    Args:
      base: w₀.
      vector: τ, as `task_vector` makes it, or a sum of such, scaled or not.
      scale: λ.

    Raises:
      InputError: where the vector does not fit the base by path and shape.
    """
    check_number(scale, "scale")
    ours, added = tree.leaves_by_path(base), tree.leaves_by_path(vector)
    if any(wrong := tree.differences(ours, added)):
        raise InputError(f"a task vector must match its base by path and shape {wrong}")

    def moved(path, values, _):
        return double(values[0]) + scale * double(wide(added[path]))

    return fused([base], moved)


def task_arithmetic(
    base: Any,
    models: Sequence[Any],
    *,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    consensus: Consensus = weighted_sum,
) -> Any:
    """Returns w₀ + λ Σᵢ aᵢ (wᵢ − w₀).

    (Ilharco et al. 2023, arXiv:2212.04089.) The paper has one λ for all tasks, 0.3 or so for many. The order of the
    models does not matter. Negative weights negate: 1, −1, 1 is an analogy.

    Args:
      base: w₀, what all were fine-tuned from.
      models: wᵢ, one or more.
      weights: a, one number a model; 1 each by default.
      scale: λ.
      consensus: `jt.fusion.weighted_sum`, as in peft and mergekit; or `weighted_mean`, mergekit's `normalize: true`.

    Returns:
      A tree of the same structure and types. Batch statistics are to be renewed: `jt.fusion.renewed`.

    Raises:
      InputError: for models of different architectures.
    """
    return merged(base, models, None, weights=weights, scale=scale, consensus=consensus)


def merged(
    base: Any,
    models: Sequence[Any],
    sparsify: Any,
    *,
    weights: Sequence[float] | None,
    scale: float,
    consensus: Consensus,
) -> Any:
    """Returns w₀ + λ · consensus(sparse τ, a), leaf by leaf: what all methods of task vectors are.

    Args:
      base: w₀.
      models: wᵢ.
      sparsify: `sparsify(vector, path, number) -> vector` of model number i at a leaf; None keeps all.
      weights: a, 1 each by default.
      scale: λ.
      consensus: makes one vector of all.
    """
    check_number(scale, "scale")
    shares = weights_of(weights, len(as_list(models)))

    def combine(path, values, start):
        vectors = [double(value) - double(start) for value in values]
        if sparsify is not None:
            vectors = [sparsify(vector, path, number) for number, vector in enumerate(vectors)]
        return double(start) + scale * double(np.asarray(consensus(vectors, shares)))

    return fused(models, combine, base=base)
