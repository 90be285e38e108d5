"""One update of an optimiser, with a derivative that is finite also where a gradient is zero."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Tree = Any


def guarded_update(
    optimizer: optax.GradientTransformation, grads: Tree, state: Tree, params: Tree
) -> tuple[Tree, Tree]:
    """Computes `optimizer.update(grads, state, params)`, to the bit, with a derivative that is finite.

    Wherever automatic differentiation has a finite derivative, this is it. Infinities come up at entries that are zero,
    or so small that their squares underflow, and one 0 · ∞ would make a whole meta-gradient NaN. At such entries:

    - Where the update is linear from 10⁻¹⁰ to 10⁻⁶, the derivative is the one there: a clipping by norm that does not
      act divides by a norm of zero in the branch that is not taken.
    - Elsewhere none passes: Adam's g / (√(g²) + ε) has a slope of 1 / ε in the point zero, and none beside it.

    Args:
      optimizer: any optax optimiser.
      grads: a tree of floating arrays.
      state: the optimiser's.
      params: a tree like `grads`.

    Returns:
      `(updates, state)`.
    """
    fixed = jax.lax.stop_gradient(state)

    def update(both):
        return optimizer.update(both[0], fixed, both[1])

    at = jax.lax.stop_gradient((grads, params))
    here, pull = jax.vjp(update, at)
    if _is_linear(pull, grads):
        return optimizer.update(grads, state, params)
    pulled = pull(jax.tree.map(_ones, here))[0]
    broken = jax.tree.map(lambda a, b: ~(jnp.isfinite(a) & jnp.isfinite(b)), *pulled)

    def beside(number):
        def moved(leaf, broken):
            width = _widths(leaf.dtype)[number]
            return jnp.where(broken & (jnp.abs(leaf) < _widths(leaf.dtype)[0]), width, leaf)

        return tuple(jax.tree.map(moved, leaves, broken) for leaves in at)

    def slopes(number):
        return jax.jvp(update, (beside(number),), (jax.tree.map(_ones, at),))[1][0]

    linear = jax.tree.map(lambda a, b: jnp.isclose(a, b, rtol=1e-2, atol=0), slopes(0), slopes(1))

    def entry(leaf, at, near, linear):
        return jnp.where(linear | (near == at), _with_derivative_of(near, leaf), near)

    near = [jax.tree.map(entry, *leaves, linear) for leaves in zip((grads, params), at, beside(0), strict=True)]
    carrier = optimizer.update(near[0], state, near[1])
    return jax.tree.map(lambda a, b: _with_derivative_of(a, b) if _is_floating(a) else a, here, carrier)


def _is_linear(pull: Any, grads: Tree) -> bool:
    """Whether a derivative is that of a linear update (SGD, momentum): it has kept no array, but the rates at most."""
    kept = [isinstance(leaf, jax.Array) and not leaf.ndim for leaf in jax.tree.leaves(pull)]
    return all(kept) and all(leaf.ndim for leaf in jax.tree.leaves(grads))


def _widths(dtype: Any) -> tuple[float, float]:
    """A size near to zero whose square is far above what underflows, after clipping too, and one a good deal larger."""
    near = max(1e-10, float(jnp.finfo(dtype).tiny) ** 0.42)
    return near, max(1e-6, 4 * near)


def _ones(leaf: Any) -> Any:
    return jnp.ones_like(leaf) if _is_floating(leaf) else np.zeros(jnp.shape(leaf), jax.dtypes.float0)


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


@jax.custom_jvp
def _with_derivative_of(value: jax.Array, other: jax.Array) -> jax.Array:
    """The value of the one, the derivative of the other."""
    return value


@_with_derivative_of.defjvp
def _(primals, tangents):
    return _with_derivative_of(*primals), tangents[1]
