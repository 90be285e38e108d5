"""Moving averages of the gradients of tasks, over the updates: what a rule of `jt.balance` may ask to look at."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import tree

Tree = Any
Average = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def begun(params: Tree, shared: tree.Patterns, count: int) -> dict[str, Any]:
    """Returns the first averages, zeros: for each parameter that the patterns select one of all tasks [T, ...].

    Args:
      params: the parameters, or their shapes.
      shared: path patterns.
      count: T.
    """
    chosen = {path: leaf for path, leaf in tree.leaves_by_path(params).items() if tree.matches(path, shared)}
    zeros = {path: jnp.zeros((count, *leaf.shape), _wide(leaf.dtype)) for path, leaf in chosen.items()}
    return {"gradients": tree.nested(zeros), "updates": jnp.zeros((), jnp.int32)}


def followed(
    memory: Mapping[str, Any], gradients: list[Tree], values: jax.Array, average: Average
) -> tuple[list[Tree], dict[str, Any]]:
    """Returns the gradients with the moving averages in the place of those that are averaged, and the new memory.

    ĝ_t ← b ĝ_t + (1 − b) f_t g_t.

    Args:
      memory: as `begun` returns it.
      gradients: g_t of each task, trees like the parameters.
      values: of the losses [T].
      average: `average(values, update) -> (f [T], b)`, the updates counted from 1.
    """
    update = memory["updates"] + 1
    factors, decay = average(values, update)
    old = tree.leaves_by_path(memory["gradients"])
    by_task = [tree.leaves_by_path(gradient) for gradient in gradients]
    new = {}
    for path, before in old.items():
        now = jnp.stack([leaves[path].astype(before.dtype) for leaves in by_task])
        now = factors.astype(before.dtype).reshape(-1, *[1] * (now.ndim - 1)) * now
        new[path] = now + jnp.asarray(decay, before.dtype) * (before - now)
    structure = jax.tree.structure(gradients[0])
    found = [
        jax.tree.unflatten(structure, [new[path][task] if path in new else leaf for path, leaf in leaves.items()])
        for task, leaves in enumerate(by_task)
    ]
    return found, {"gradients": tree.nested(new), "updates": update}


def _wide(dtype: Any) -> Any:
    """The type of an average: a small step is less than half precision can add."""
    return jnp.promote_types(dtype, jnp.float32)
