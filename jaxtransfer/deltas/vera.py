"""VeRA: one pair of random matrices for all layers, two small vectors for each."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.deltas.part import Part, at, check_whole, described, matrices
from jaxtransfer.errors import InputError


@described
def vera(rank: int, *, initial: float = 0.1, seed: int = 0, shared: Any = None) -> Part:
    """Returns W + (A · d) B · b, with d [r] and b [O] (Kopiczko et al. 2023, arXiv:2310.11454).

    A and B are random, drawn once as Kaiming does, for the largest layer; others take their first rows and columns.
    They do not train, and travel beside the base. b begins as zeros, so the function is the base's to the bit.

    Args:
      rank: r; above the rank of a kernel, too, as d only weighs random directions.
      initial: what d begins as.
      seed: of A and B.
      shared: (A [I, r], B [r, O]) for the largest I and O, those of another delta; drawn by default.

    Raises:
      InputError: for a rank below 1; on a base for matrices that are too small.
    """
    check_whole(rank, "the rank of a delta")

    def fixed(weights):
        rows, columns = (max(getattr(weight, side) for weight in weights.values()) for side in ("rows", "columns"))
        if shared is not None:
            a, b = (jnp.asarray(matrix) for matrix in shared)
            if a.shape[0] < rows or b.shape[1] < columns or a.shape[1] != rank or b.shape[0] != rank:
                raise InputError(
                    f"vera: the shared matrices must be [{rows}, {rank}] and [{rank}, {columns}] or larger; got "
                    f"{list(a.shape)} and {list(b.shape)}"
                )
            return {"a": a, "b": b}
        keys, dtype = jax.random.split(jax.random.key(seed)), next(iter(weights.values())).dtype
        a = jax.random.uniform(keys[0], (rows, rank), dtype, -1, 1) * (6 / rows) ** 0.5
        return {"a": a, "b": jax.random.uniform(keys[1], (rank, columns), dtype, -1, 1) * (6 / rank) ** 0.5}

    def init(key, weights):
        return tree.nested(
            {
                path: {"d": jnp.full(rank, initial, weight.dtype), "b": jnp.zeros(weight.columns, weight.dtype)}
                for path, weight in weights.items()
            }
        )

    def merge(weights, params, read):
        def of(weight, own):
            first = read["a"][: weight.rows] * own["d"][None]
            return weight.value + weight.shaped((first @ read["b"][:, : weight.columns]) * own["b"][None])

        return {path: of(weight, at(params, path)) for path, weight in weights.items()}

    return Part(init, merge, matrices, fixed)
