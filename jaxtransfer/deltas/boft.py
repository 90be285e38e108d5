"""BOFT: rotations of all inputs as products of sparse ones, as a fast Fourier transform is."""

import jax.numpy as jnp
import numpy as np

from jaxtransfer.deltas.oft import cayley, check_block, rotated
from jaxtransfer.deltas.part import Part, check_whole, described, leafwise
from jaxtransfer.errors import InputError


@described
def boft(block: int, *, factors: int = 1) -> Part:
    """Returns s ∘ W(Rx), R = B_m … B₂B₁ of m butterfly factors (Liu et al. 2023, arXiv:2311.06243).

    Each factor rotates blocks of inputs, which the i-th gathers from 2^(i−1) · block neighbours; so with few numbers
    every output of R reads every input. One factor is OFT with whole matrices, of which the skew-symmetric half counts.
    s [O] scales the outputs. At first R = I and s = 1, so the function is the base's to the bit.

    Args:
      block: width of the blocks; it must divide the inputs of each layer, and be even with several factors.
      factors: m; 2^(m−1) must divide the number of blocks.

    Raises:
      InputError: for blocks below 2, an odd one with several factors, no factor; on a base where they don't divide.
    """
    check_whole(block, "boft: the width of its blocks", 2)
    check_whole(factors, "boft: the number of its factors")
    if factors > 1 and block % 2:
        raise InputError(f"boft takes even blocks with several factors; got blocks of {block}")

    def init(key, weight):
        check_block(block, weight)
        count = weight.rows // block
        if count % 2 ** (factors - 1):
            raise InputError(
                f"boft: {factors} factors need a multiple of {2 ** (factors - 1)} blocks, but {weight.path!r} has "
                f"{count}; take fewer factors or smaller blocks"
            )
        skew = jnp.zeros((factors, count, block, block), weight.dtype)
        return {"skew": skew, "scale": jnp.ones(weight.columns, weight.dtype)}

    def merge(weight, own):
        matrix = weight.matrix
        for number, half in enumerate(own["skew"]):
            order = _gathered(weight.rows, block, number)
            back = np.argsort(order)
            turned = rotated(matrix[back], cayley(0.5 * (half - half.swapaxes(1, 2))))
            matrix = turned[order]
        return weight.shaped(matrix * own["scale"][None])

    return leafwise(init, merge)


def _gathered(rows: int, block: int, number: int) -> np.ndarray:
    """Returns the order of the inputs of a factor: within 2^number · block neighbours even half-blocks, then odd."""
    halves = np.arange(rows).reshape(-1, 2 ** (number + 1), block // 2) if block % 2 == 0 else np.arange(rows)
    if number == 0:
        return np.arange(rows)
    return np.concatenate([halves[:, ::2], halves[:, 1::2]], 1).reshape(-1)
