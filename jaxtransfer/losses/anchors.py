"""Quadratic penalties on parameter trees."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import tree


def _half_squares(leaves) -> jax.Array:
    return 0.5 * sum((jnp.sum(jnp.square(leaf)) for leaf in leaves), start=jnp.zeros((), jnp.float32))


def _wide(leaf) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def l2(params: Any) -> jax.Array:
    """Computes ½‖w‖² over every leaf of a tree, in at least float32.

    Args:
      params: any tree of arrays.

    Returns:
      A scalar.
    """
    return _half_squares(_wide(leaf) for leaf in jax.tree.leaves(params))


def l2_sp(params: Any, anchor: Any, *, exclude: tree.Patterns = ()) -> jax.Array:
    """Computes ½‖w − w₀‖², the squared distance to the starting point (Li et al. 2018, arXiv:1802.01483).

    Args:
      params: a tree of arrays, w.
      anchor: a tree with the same paths and shapes, w₀.
      exclude: path patterns of leaves left out (a replaced head).

    Returns:
      A scalar, in at least float32.

    Raises:
      InputError: where a leaf is neither matched by path and shape nor excluded.
    """
    pairs = tree.matched(params, anchor, exclude)
    return _half_squares(_wide(w) - _wide(w0) for w, w0 in pairs)


def fisher_l2_sp(params: Any, anchor: Any, fisher: Any, *, exclude: tree.Patterns = ()) -> jax.Array:
    """Computes ½ Σ_j F_j (w_j − w₀_j)², the penalty of EWC (Kirkpatrick et al. 2017, arXiv:1612.00796).

    Args:
      params: a tree of arrays, w.
      anchor: a tree with the same paths and shapes, w₀.
      fisher: a tree like `anchor` of non-negative weights, F, such as `fisher_diagonal` estimates.
      exclude: path patterns of leaves left out.

    Returns:
      A scalar, in at least float32.

    Raises:
      InputError: where a leaf is neither matched by path and shape nor excluded.
    """
    pairs = tree.matched(params, anchor, exclude)
    weights = [f for _, f in tree.matched(params, fisher, exclude)]
    total = jnp.zeros((), jnp.float32)
    for (w, w0), f in zip(pairs, weights, strict=True):
        total += jnp.sum(_wide(f) * jnp.square(_wide(w) - _wide(w0)))
    return 0.5 * total
