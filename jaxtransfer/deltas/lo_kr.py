"""LoKr: a Kronecker product of two small matrices, the second of low rank."""

import jax
import jax.numpy as jnp

from jaxtransfer.deltas.lo_ha import multiplied, uniform
from jaxtransfer.deltas.lora import scale_of
from jaxtransfer.deltas.part import Part, check_whole, described, leafwise


@described
def lo_kr(
    rank: int, *, alpha: float | None = None, factor: int | None = None, both: bool = False, tucker: bool = False
) -> Part:
    """Returns W + s · W₁ ⊗ W₂ (LyCORIS, Yeh et al. 2023, arXiv:2309.14859; KronA, Edalati et al. 2022).

    Inputs and outputs, of a convolution its channels, are split in two factors each, the smaller for W₁ [I₁, O₁]. W₂
    [I₂, O₂], with the places of a convolution's kernel, is ab of rank r where r < max(channels₂, O₂) / 2, else whole;
    so is W₁ with `both`. W₁ (b of it) begins as zeros, so the function is the base's to the bit. As in peft.

    Args:
      rank: r.
      alpha: s = α/r; r by default.
      factor: the first factor of a width that it divides, else the largest one up to it; by default the split is as
        near to the square root as it can be.
      both: whether W₁ is of low rank too.
      tucker: whether W₂ of a convolution larger than 1×1 has a core, as for `lo_ha`, where it is of low rank.

    Raises:
      InputError: for a rank or a factor below 1.
    """
    scale = scale_of(rank, alpha)
    if factor is not None:
        check_whole(factor, "lo_kr: the factor")

    def sizes(weight):
        channels = split(weight.rows // weight.taps, factor)
        return channels, split(weight.columns, factor)

    def init(key, weight):
        (small_in, large_in), (small_out, large_out) = sizes(weight)
        keys, dtype, rows = jax.random.split(key, 3), weight.dtype, large_in * weight.taps
        own = {}
        if both and rank < max(small_in, small_out) / 2:
            own["a1"] = uniform(keys[0], (small_in, rank), small_in, dtype)
            own["b1"] = jnp.zeros((rank, small_out), dtype)
        else:
            own["w1"] = jnp.zeros((small_in, small_out), dtype)
        if rank < max(large_in, large_out) / 2 and tucker and weight.taps > 1:
            own["a2"] = uniform(keys[1], (large_in, rank), large_in, dtype)
            own["b2"] = uniform(keys[2], (rank, large_out), large_out, dtype)
            core = jax.random.fold_in(keys[1], 1)
            own["t2"] = uniform(core, (rank, rank, weight.taps), rank * weight.taps, dtype)
        elif rank < max(large_in, large_out) / 2:
            own["a2"] = uniform(keys[1], (rows, rank), rows, dtype)
            own["b2"] = uniform(keys[2], (rank, large_out), rank, dtype)
        else:
            own["w2"] = uniform(keys[1], (rows, large_out), rows, dtype)
        return own

    def merge(weight, own):
        one = own["w1"] if "w1" in own else own["a1"] @ own["b1"]
        two = own["w2"] if "w2" in own else multiplied(own["a2"], own["b2"], own.get("t2"))
        return weight.value + weight.shaped(scale * jnp.kron(one, two))

    return leafwise(init, merge)


def split(width: int, factor: int | None = None) -> tuple[int, int]:
    """Returns two factors of a width, the smaller first, but for a `factor` that divides it, which is the first."""
    if factor is not None and width % factor == 0:
        return factor, width // factor
    largest = int(width**0.5) if factor is None else min(factor, int(width**0.5))
    first = next(number for number in range(largest, 0, -1) if width % number == 0)
    return first, width // first
