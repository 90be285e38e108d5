"""How the two factors of a low-rank delta begin: drawn, or read off the base's weights or the data.

A start is `start(key, weight, rank, scale) -> (a [I, r], b [r, O])`. Where it gives None for b, zeros stand there. One
with a b depends on the weight alone, not on the key: s·ab is then taken off the base, which keeps the function.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.deltas.weight import Weight
from jaxtransfer.errors import InputError

Start = Callable[[jax.Array, Weight, int, float], tuple[jax.Array, jax.Array | None]]


def kaiming(key: jax.Array, weight: Weight, rank: int, scale: float) -> tuple[jax.Array, None]:
    """Draws a from U(−1/√I, 1/√I), b = 0: as LoRA was released, and peft's default."""
    bound = weight.rows**-0.5
    return jax.random.uniform(key, (weight.rows, rank), weight.dtype, -bound, bound), None


def gaussian(key: jax.Array, weight: Weight, rank: int, scale: float) -> tuple[jax.Array, None]:
    """Draws a from N(0, 1/r²), b = 0: LoRA as in the paper (Hu et al. 2021), with the variance of peft."""
    return jax.random.normal(key, (weight.rows, rank), weight.dtype) / rank, None


def pissa(key: jax.Array, weight: Weight, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """Takes the r largest singular directions: s·ab = U_r S_r V_r (PiSSA, Meng et al. 2024, arXiv:2404.02948)."""
    left, sizes, right = jnp.linalg.svd(weight.matrix, full_matrices=False)
    root = jnp.sqrt(sizes[:rank] / scale)
    return left[:, :rank] * root[None], root[:, None] * right[:rank]


def olora(key: jax.Array, weight: Weight, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """Takes the first r columns of Q and rows of R, Wᵀ = QR (OLoRA, Büyükakyüz 2024, arXiv:2406.01775).

    b = Q_rᵀ is orthonormal, a = R_rᵀ.
    """
    q, r = jnp.linalg.qr(weight.matrix.T)
    return r[:rank].T, q[:, :rank].T


def eva(grams: Mapping[str, Any]) -> Start:
    """Returns the start whose a are the r largest principal directions of what each layer sees, b = 0.

    (EVA, Paischer et al. 2024, arXiv:2410.07170, with the same rank for each layer, ρ = 1.) They are the eigenvectors
    of E[x xᵀ], so that a delta moves first what the data of the new task excite.

    Args:
      grams: [I, I] by the path of the kernel, as `jt.fusion.gram_matrices` collects them: inputs are counted in the
        order of the kernel's axes, (k, k, C) of a convolution's [k, k, C, D].
    """

    def eva_start(key, weight, rank, scale):
        if weight.path not in grams:
            raise InputError(f"eva: no Gram matrix of what {weight.path!r} sees; there are those of {sorted(grams)}")
        gram = jnp.asarray(grams[weight.path], weight.dtype)
        if gram.shape != (weight.rows, weight.rows):
            raise InputError(
                f"eva: {weight.path!r} has {weight.rows} inputs, its Gram matrix must be [{weight.rows}, "
                f"{weight.rows}]; got {list(gram.shape)}"
            )
        return weight.rows_of(jnp.linalg.eigh(gram)[1][:, ::-1][:, :rank]), None

    return eva_start
