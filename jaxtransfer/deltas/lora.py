"""LoRA: a difference of low rank."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtransfer import tree
from jaxtransfer.deltas.part import Part, check_rank, check_share, check_whole, described, leafwise
from jaxtransfer.deltas.starts import Start, kaiming
from jaxtransfer.deltas.weight import Weight
from jaxtransfer.errors import InputError


@described
def lora(
    rank: int,
    *,
    alpha: float | None = None,
    rank_stabilized: bool = False,
    start: Start = kaiming,
    dropout: float = 0.0,
) -> Part:
    """Returns W + s·ab, with a [I, r] and b [r, O] (Hu et al. 2021, arXiv:2106.09685).

    Of a kernel of any layer, by its matrix from inputs to outputs. b begins as zeros, so the function is the base's to
    the bit; a start that has a b (`pissa`, `olora`) is taken off again: W + s·(ab − a₀b₀).

    Args:
      rank: r, at most that of each matrix.
      alpha: s = α/r; r by default, s = 1.
      rank_stabilized: s = α/√r (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732).
      start: what a and b begin as: `kaiming`, `gaussian`, `pissa`, `olora`, `eva(grams)`.
      dropout: the probability with which an input is left out of the difference in a step of training; the others are
        divided by 1 − it. The difference is in the weights, so an input is left out for a whole batch, as by Lin et al.
        2024 (arXiv:2404.09610); in peft for each example anew.

    Raises:
      InputError: for a rank below 1, and a dropout that is none from 0 to below 1; on a base for a rank above that of a
        kernel.
    """
    scale = scale_of(rank, alpha, rank_stabilized=rank_stabilized)

    def merge(weight, params, begun):
        return weight.value + weight.shaped(low_rank(params, begun, scale))

    def init(key, weight):
        return factors(key, weight, rank, scale, start)

    return leafwise(init, merge, fixed=lambda weight: begun_as(weight, rank, scale, start), drop=dropping(dropout))


def dropping(share: float) -> Callable[[jax.Array, dict[str, jax.Array]], dict[str, jax.Array]] | None:
    """Returns what leaves rows of a out with a probability, and divides the others by 1 − it; None for 0."""
    check_share(share, "dropout")
    if share == 0:
        return None

    def drop(key, own):
        stays = jax.random.bernoulli(key, 1 - share, (own["a"].shape[0], 1))
        return {**own, "a": jnp.where(stays, own["a"] / (1 - share), 0)}

    return drop


def scale_of(rank: int, alpha: float | None, *, rank_stabilized: bool = False) -> float:
    """Returns s = α/r, or α/√r; α = r by default."""
    check_whole(rank, "the rank of a delta")
    if alpha is not None and not 0 < alpha < math.inf:
        raise InputError(f"alpha must be positive and finite; got {alpha}")
    return (rank if alpha is None else alpha) / (rank**0.5 if rank_stabilized else rank)


def factors(key: jax.Array, weight: Weight, rank: int, scale: float, start: Start) -> dict[str, jax.Array]:
    """Returns the first a and b of one matrix."""
    check_rank(rank, weight)
    a, b = start(key, weight, rank, scale)
    return {"a": a, "b": jnp.zeros((rank, weight.columns), weight.dtype) if b is None else b}


def begun_as(weight: Weight, rank: int, scale: float, start: Start) -> dict[str, jax.Array]:
    """Returns the a and b that one matrix began with, where their product was not zero; else nothing."""
    check_rank(rank, weight)
    if jax.eval_shape(lambda key: start(key, weight, rank, scale)[1], jax.random.key(0)) is None:
        return {}
    return factors(jax.random.key(0), weight, rank, scale, start)


def low_rank(params: Any, begun: Any, scale: float) -> jax.Array:
    """Returns s·ab [I, O], less s·a₀b₀ where that is what it began as."""
    product = params["a"] @ params["b"]
    return scale * (product - begun["a"] @ begun["b"] if begun else product)


def lora_plus(optimizer: optax.GradientTransformation, *, ratio: float = 16.0) -> optax.GradientTransformation:
    """Multiplies the updates of all b beside an a by λ (LoRA+, Hayou et al. 2024, arXiv:2402.12354).

    With an optimiser of Adam's kind that is a rate λ times as high for b.

    Args:
      optimizer: makes the updates.
      ratio: λ; the paper takes 2⁴ for language models.

    Raises:
      InputError: for a ratio that is not positive and finite; at its init, where no parameter is a low-rank delta's.
    """
    if not 0 < ratio < math.inf:
        raise InputError(f"the ratio of the rates must be positive and finite; got {ratio}")

    def second(params):
        paths = tree.leaves_by_path(params)

        def is_b(key_path, _):
            above, _, name = tree.path_of(key_path).rpartition("/")
            return name == "b" and f"{above}/a" in paths

        mask = jax.tree_util.tree_map_with_path(is_b, params)
        if not any(jax.tree.leaves(mask)):
            raise InputError(f"lora_plus: no parameter is b of a low-rank delta; there are {tree.listed(paths)}")
        return mask

    return optax.chain(optimizer, optax.masked(optax.scale(ratio), second))
