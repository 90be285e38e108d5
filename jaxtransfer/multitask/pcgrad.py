"""PCGrad: a task's gradient loses what points against that of another one."""

from typing import Any

import jax
import jax.numpy as jnp


def pcgrad(gram: jax.Array, values: jax.Array, key: Any, state: Any) -> tuple[jax.Array, Any]:
    """Returns the weights of Σ_t g̃_t, each gradient projected onto the normal plane of those that it conflicts with.

    g̃_t begins as g_t; then, for the other tasks s in random order, where ⟨g̃_t, g_s⟩ < 0 it becomes

        g̃_t − ⟨g̃_t, g_s⟩ / ‖g_s‖² · g_s.

    (Yu et al. 2020, arXiv:2001.06782.) It needs no gradients: as g̃_t = Σ_s w_s g_s, the Gram matrix tells all products.

    Args:
      gram: ⟨g_s, g_t⟩ [T, T].
      values: of the losses [T]; they don't matter here.
      key: task t meets the others in the order `jax.random.permutation(jax.random.split(key, T)[t], T)`; in their own
        order where it is None.
      state: none.

    Returns:
      The weights [T], and the state as it is.
    """
    count = gram.shape[0]
    eye, square = jnp.eye(count, dtype=gram.dtype), jnp.diagonal(gram)
    scale = jnp.where(square > 0, 1 / jnp.where(square > 0, square, 1), 0)
    orders = jnp.tile(jnp.arange(count)[None], (count, 1))
    if key is not None:
        orders = jax.vmap(lambda key: jax.random.permutation(key, count))(jax.random.split(key, count))

    def projected(task, order):
        def meet(weights, other):
            product = weights @ gram[:, other]
            conflict = (other != task) & (product < 0)
            return weights - jnp.where(conflict, product * scale[other], 0) * eye[other], None

        return jax.lax.scan(meet, eye[task], order)[0]

    return jnp.sum(jax.vmap(projected)(jnp.arange(count), orders), axis=0), state
