"""OFT: rotations of the inputs, block by block."""

import math

import jax
import jax.numpy as jnp

from jaxtransfer.deltas.part import Part, check_whole, described, leafwise
from jaxtransfer.deltas.weight import Weight
from jaxtransfer.errors import InputError


@described
def oft(block: int, *, shared: bool = False, terms: int | None = None) -> Part:
    """Returns W(Rx), R orthogonal in blocks of inputs (Qiu et al. 2023, arXiv:2306.07280).

    Each block is Cayley's R = (I − Q)(I + Q)⁻¹ of a skew-symmetric Q, whose upper triangle trains; angles between
    neurons stay. Q begins as zeros, so R = I and the function is the base's to the bit. Inputs of a convolution are
    counted (C, k, k).

    Args:
      block: width of the blocks; it must divide the inputs of each layer.
      shared: one rotation for all blocks of a layer.
      terms: of the Neumann series I + 2Q + 2Q² + … + Qⁿ⁻¹, which peft takes for the inverse, 5 by default there; the
        inverse itself by default.

    Raises:
      InputError: for blocks below 2 and fewer than 2 terms; on a base where a block does not divide the inputs.
    """
    check_whole(block, "oft: the width of its blocks", 2)
    if terms is not None:
        check_whole(terms, "oft: the number of terms", 2)
    count = block * (block - 1) // 2

    def init(key, weight):
        check_block(block, weight)
        return {"skew": jnp.zeros((1 if shared else weight.rows // block, count), weight.dtype)}

    def merge(weight, own):
        rows, columns = jnp.triu_indices(block, 1)
        upper = jnp.zeros((*own["skew"].shape[:1], block, block), weight.dtype).at[:, rows, columns].set(own["skew"])
        skew = upper - upper.swapaxes(1, 2)
        rotations = cayley(skew) if terms is None else _neumann(skew, terms)
        return weight.shaped(rotated(weight.matrix, rotations))

    return leafwise(init, merge)


def check_block(block: int, weight: Weight) -> None:
    """Raises where blocks do not divide the inputs of a layer."""
    if weight.rows % block:
        near = [n for n in range(2, weight.rows + 1) if weight.rows % n == 0]
        best = min(near, key=lambda n: (abs(math.log(n / block)), n))
        raise InputError(
            f"blocks of {block} don't divide the {weight.rows} inputs of {weight.path!r}; {best} would, or leave it "
            f"out of only="
        )


def cayley(skew: jax.Array) -> jax.Array:
    """Returns (I − Q)(I + Q)⁻¹ [N, n, n] of skew-symmetric Q; the factors commute."""
    one = jnp.eye(skew.shape[-1], dtype=skew.dtype)[None]
    return jnp.linalg.solve(one + skew, one - skew)


def rotated(matrix: jax.Array, rotations: jax.Array) -> jax.Array:
    """Returns a matrix [I, O] with each block of its rows multiplied by R [N or 1, n, n]."""
    size = rotations.shape[-1]
    blocks = matrix.reshape(-1, size, matrix.shape[-1])
    return jnp.matmul(jnp.broadcast_to(rotations, (blocks.shape[0], size, size)), blocks).reshape(matrix.shape)


def _neumann(skew: jax.Array, terms: int) -> jax.Array:
    power = one = jnp.broadcast_to(jnp.eye(skew.shape[-1], dtype=skew.dtype)[None], skew.shape)
    total = one
    for number in range(1, terms):
        power = jnp.matmul(power, skew)
        total = total + (power if number == terms - 1 and terms > 2 else 2 * power)
    return total
