"""GradDrop: every entry of the gradient goes by one sign."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def graddrop(
    gram: Any,
    values: jax.Array,
    key: Any,
    state: Any,
    *,
    leak: float = 0.0,
    f: Callable[[jax.Array], jax.Array] = lambda purity: purity,
) -> tuple[Callable[[jax.Array, Any], jax.Array], Any]:
    """Returns the mixture that keeps, entry by entry, the parts of one sign: the positive ones by chance f(P).

    P = ½ (1 + Σ_t g_t / Σ_t |g_t|) is how pure an entry's sign is; a number U in [0, 1) is drawn for each entry, and
    the mixture is Σ_t (l + (1 − l) m_t) g_t, m_t = [f(P) > U] for positive g_t and [f(P) < U] for negative ones. (Chen
    et al. 2020, "Just pick a sign", arXiv:2010.06808, lines 10 to 15 of its algorithm 1, on the gradients of the shared
    parameters, as TorchJD takes it; the paper's own place, and LibMTL's, is the last shared activation.) It is no
    mixture of whole gradients, so that no weights are reported.

    Args:
      gram: not looked at.
      values: of the losses; they don't matter here.
      key: what is drawn with, for each parameter by its path; where it is None, U is ½ and the larger part is kept.
      state: none.
      leak: l in [0, 1], the share of what is dropped that passes all the same.
      f: increasing, from [0, 1] to [0, 1].

    Returns:
      A function of the gradients [T, ...] of one parameter and its key, and the state as it is.
    """

    def mixed(gradients: jax.Array, key: Any) -> jax.Array:
        wide = gradients.astype(jnp.promote_types(gradients.dtype, jnp.float32))
        fixed = jax.lax.stop_gradient(wide)
        size = jnp.sum(jnp.abs(fixed), axis=0)
        purity = f(0.5 * (1 + jnp.sum(fixed, axis=0) / jnp.where(size == 0, 1, size)))
        drawn = jnp.full(size.shape, 0.5) if key is None else jax.random.uniform(key, size.shape)
        positive = jnp.where((purity > drawn)[None], fixed > 0, False)
        negative = jnp.where((purity < drawn)[None], fixed < 0, False)
        kept = (positive | negative).astype(wide.dtype)
        return jnp.sum((leak + (1 - leak) * kept) * wide, axis=0)

    return mixed, state
