"""LoHa: the entrywise product of two differences of low rank."""

import jax
import jax.numpy as jnp

from jaxtransfer.deltas.lora import scale_of
from jaxtransfer.deltas.part import Part, check_rank, described, leafwise


@described
def lo_ha(rank: int, *, alpha: float | None = None, tucker: bool = False) -> Part:
    """Returns W + s · (a₁b₁) ∘ (a₂b₂): rank r² of the numbers of rank 2r (FedPara, Hyeon-Woo et al. 2021,
    arXiv:2108.06098; LyCORIS, Yeh et al. 2023, arXiv:2309.14859).

    a₂ begins as zeros, so the function is the base's to the bit; the others as in peft.

    Args:
      rank: r, at most that of each matrix.
      alpha: s = α/r; r by default.
      tucker: whether of a convolution larger than 1×1 each factor is t ×₁ b ×₂ a, with a core t [r, r, k·k] of its own,
        a [C, r] and b [r, O]; with fewer numbers than by a [C·k·k, r]. peft's `use_effective_conv2d`.

    Raises:
      InputError: for a rank below 1, and on a base for one above a kernel's.
    """
    scale = scale_of(rank, alpha)

    def init(key, weight):
        check_rank(rank, weight)
        keys, rows, columns = jax.random.split(key, 3), weight.rows, weight.columns
        if tucker and weight.taps > 1:
            return _cores(keys, rank, weight)
        return {
            "a1": uniform(keys[0], (rows, rank), rows, weight.dtype),
            "b1": uniform(keys[1], (rank, columns), rank, weight.dtype),
            "a2": jnp.zeros((rows, rank), weight.dtype),
            "b2": uniform(keys[2], (rank, columns), rank, weight.dtype),
        }

    def merge(weight, own):
        one, two = ((own[f"a{n}"], own[f"b{n}"], own.get(f"t{n}")) for n in (1, 2))
        return weight.value + weight.shaped(scale * multiplied(*one) * multiplied(*two))

    return leafwise(init, merge)


def multiplied(a: jax.Array, b: jax.Array, core: jax.Array | None) -> jax.Array:
    """Returns ab [I, O]; with a core [r, r, k] the matrix [C·k, O] of Σ_ij t_ijk a_cj b_io."""
    if core is None:
        return a @ b
    return jnp.einsum("ijk,cj,io->cko", core, a, b).reshape(-1, b.shape[1])


def _cores(keys, rank, weight):
    channels, keys = weight.rows // weight.taps, jax.random.split(keys[0], 5)
    inputs = rank * weight.taps
    return {
        "a1": uniform(keys[0], (channels, rank), channels, weight.dtype),
        "b1": uniform(keys[1], (rank, weight.columns), weight.columns, weight.dtype),
        "t1": uniform(keys[2], (rank, rank, weight.taps), inputs, weight.dtype),
        "a2": jnp.zeros((channels, rank), weight.dtype),
        "b2": uniform(keys[3], (rank, weight.columns), weight.columns, weight.dtype),
        "t2": uniform(keys[4], (rank, rank, weight.taps), inputs, weight.dtype),
    }


def uniform(key: jax.Array, shape: tuple[int, ...], inputs: int, dtype) -> jax.Array:
    """Draws from U(−1/√n, 1/√n), of n inputs: PyTorch's start of a linear layer."""
    return jax.random.uniform(key, shape, dtype, -(inputs**-0.5), inputs**-0.5)
