"""DoRA: a low-rank difference of direction, and a length for each output."""

import jax
import jax.numpy as jnp

from jaxtransfer.deltas.lora import begun_as, dropping, factors, low_rank, scale_of
from jaxtransfer.deltas.part import Part, described, leafwise
from jaxtransfer.deltas.starts import Start, kaiming


@described
def dora(
    rank: int,
    *,
    alpha: float | None = None,
    rank_stabilized: bool = False,
    start: Start = kaiming,
    dropout: float = 0.0,
) -> Part:
    """Returns m · V / ‖V‖ with V = W + s·ab, norms by output (Liu et al. 2024, arXiv:2402.09353).

    m [O] begins as ‖W‖, so the function is the base's to rounding. No gradient passes through ‖V‖, as in the paper
    (section 4.3) and peft. An output whose V is zero stays zero. Over another delta, a DoRA too, it is what the formula
    says of the weights that the other made: running and merging are the same.

    Args:
      rank: r of ab, at most that of each matrix.
      alpha: as for `lora`.
      rank_stabilized: as for `lora`.
      start: as for `lora`.
      dropout: as for `lora`; ‖V‖ is of what is left.

    Raises:
      InputError: as `lora` does.
    """
    scale = scale_of(rank, alpha, rank_stabilized=rank_stabilized)

    def merge(weight, params, begun):
        direction = weight.matrix + low_rank(params, begun, scale)
        length = jax.lax.stop_gradient(_norms(direction))
        return weight.shaped(direction * (params["m"] / jnp.where(length > 0, length, 1))[None])

    def init(key, weight):
        return {**factors(key, weight, rank, scale, start), "m": _norms(weight.matrix)}

    return leafwise(init, merge, fixed=lambda weight: begun_as(weight, rank, scale, start), drop=dropping(dropout))


def _norms(matrix: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(matrix), 0))
