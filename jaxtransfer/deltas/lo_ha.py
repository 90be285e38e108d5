"""LoHa: the entrywise product of two differences of low rank."""

import jax
import jax.numpy as jnp

from jaxtransfer.deltas.lora import scale_of
from jaxtransfer.deltas.part import Part, check_rank, described, leafwise


@described
def lo_ha(rank: int, *, alpha: float | None = None) -> Part:
    """Returns W + s · (a₁b₁) ∘ (a₂b₂): rank r² of the numbers of rank 2r (FedPara, Hyeon-Woo et al. 2021,
    arXiv:2108.06098; LyCORIS, Yeh et al. 2023, arXiv:2309.14859).

    a₂ begins as zeros, so the function is the base's to the bit; the others as in peft.

    Args:
      rank: r, at most that of each matrix.
      alpha: s = α/r; r by default.

    Raises:
      InputError: for a rank below 1, and on a base for one above a kernel's.
    """
    scale = scale_of(rank, alpha)

    def init(key, weight):
        check_rank(rank, weight)
        keys, rows, columns = jax.random.split(key, 3), weight.rows, weight.columns
        return {
            "a1": uniform(keys[0], (rows, rank), rows, weight.dtype),
            "b1": uniform(keys[1], (rank, columns), rank, weight.dtype),
            "a2": jnp.zeros((rows, rank), weight.dtype),
            "b2": uniform(keys[2], (rank, columns), rank, weight.dtype),
        }

    def merge(weight, own):
        return weight.value + weight.shaped(scale * (own["a1"] @ own["b1"]) * (own["a2"] @ own["b2"]))

    return leafwise(init, merge)


def uniform(key: jax.Array, shape: tuple[int, ...], inputs: int, dtype) -> jax.Array:
    """Draws from U(−1/√n, 1/√n), of n inputs: PyTorch's start of a linear layer."""
    return jax.random.uniform(key, shape, dtype, -(inputs**-0.5), inputs**-0.5)
