"""Task vectors of which chance drops entries: DARE, all alike; DELLA, the small ones sooner."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.fusion.consensus import Consensus, weighted_disjoint_mean, weighted_sum
from jaxtransfer.fusion.leaves import check_share
from jaxtransfer.fusion.task_vectors import merged

Rescale = Callable[[np.ndarray, np.ndarray, Any], np.ndarray]


def by_probability(vector: np.ndarray, mask: np.ndarray, probability: Any) -> np.ndarray:
    """Returns mᵢ τᵢ / pᵢ: what stays is divided by its chance to stay, so that the expectation is τ (papers, peft).

    Args:
      vector: τ.
      mask: m, which entries stay.
      probability: p, of each entry or of all.
    """
    return np.where(mask, vector, 0) / np.where(np.asarray(probability) > 0, probability, 1)


def by_norm(vector: np.ndarray, mask: np.ndarray, probability: Any) -> np.ndarray:
    """Returns m τ · ‖τ‖₁ / ‖m τ‖₁: what stays has the size of the whole leaf (mergekit since 2025).

    Args:
      vector: τ.
      mask: m, which entries stay.
      probability: not used.
    """
    kept = np.where(mask, vector, 0)
    before, after = (float(np.sum(np.abs(one), dtype=np.float64)) for one in (vector, kept))
    return kept if min(before, after) < 1e-7 else kept * (before / after)


def unscaled(vector: np.ndarray, mask: np.ndarray, probability: Any) -> np.ndarray:
    """Returns m τ, what stays as it is.

    Args:
      vector: τ.
      mask: m, which entries stay.
      probability: not used.
    """
    return np.where(mask, vector, 0)


def dare(
    base: Any,
    models: Sequence[Any],
    *,
    key: jax.Array | int,
    density: float = 0.5,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    rescale: Rescale = by_probability,
    consensus: Consensus = weighted_sum,
) -> Any:
    """Returns w₀ + λ · consensus(m τᵢ / density), m ~ Bernoulli(density): drop and rescale.

    (Yu et al. 2024, arXiv:2311.03099.) The released forms by arguments:

    - peft's `dare_linear`, the paper's: as it is by default; `dare_ties`: `consensus=jt.fusion.disjoint_mean`.
    - mergekit's `dare_linear`: `rescale=jt.fusion.by_norm`; `dare_ties`: that and
      `consensus=jt.fusion.weighted_disjoint_sum`. (Before 2025 mergekit rescaled as the paper does.)

    Args:
      base: w₀, what all were fine-tuned from.
      models: wᵢ, one or more. What is dropped depends on the key, the place of the model in the list and the path of
        the leaf.
      key: of the draw, a JAX key or a seed. (The draws are NumPy's, the same on each machine.)
      density: the chance of an entry to stay, in (0, 1].
      weights: a, one number a model; 1 each by default.
      scale: λ.
      rescale: `jt.fusion.by_probability`, `by_norm` or `unscaled`.
      consensus: makes one vector of all.

    Returns:
      A tree of the same structure and types. Batch statistics are to be renewed: `jt.fusion.renewed`.

    Raises:
      InputError: for another density, and for models of different architectures.
    """
    check_share(density, "density", above=True)
    words = _words(key)

    def dropped(vector, path, number):
        if density >= 1:
            return vector
        return rescale(vector, _uniform(words, number, path, vector.shape) < density, density)

    return merged(base, models, dropped, weights=weights, scale=scale, consensus=consensus)


def della(
    base: Any,
    models: Sequence[Any],
    *,
    key: jax.Array | int,
    density: float = 0.6,
    epsilon: float = 0.15,
    axis: int = -2,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    rescale: Rescale = by_norm,
    consensus: Consensus = weighted_disjoint_mean,
) -> Any:
    """Returns w₀ + λ · consensus(m τᵢ rescaled), m ~ Bernoulli(p), p from density − ε to density + ε by magnitude.

    (Deep et al. 2024, arXiv:2406.11617: DELLA with MagPrune.) Among the inputs of each output p grows evenly with the
    rank of |τ|, so that large entries stay oftener. The defaults are mergekit's `della`; its `della_linear` has
    `consensus=jt.fusion.weighted_sum`, the paper `rescale=jt.fusion.by_probability`. A leaf of one entry, of which
    mergekit makes NaN, stays with the chance `density`.

    Args:
      base: w₀, what all were fine-tuned from.
      models: wᵢ, one or more. What is dropped depends on the key, the place of the model in the list and the path.
      key: of the draw, a JAX key or a seed.
      density: the mean chance of an entry to stay; at 1 all do.
      epsilon: ε; density ± ε lie in (0, 1).
      axis: along which entries are ranked, in leaves of two axes or more: −2 for kernels [..., in, out], the inputs of
        an output, as mergekit's axis 1 is in PyTorch's order [out, in, ...]. Vectors are ranked as a whole.
      weights: a, one number a model; 1 each by default.
      scale: λ.
      rescale: `jt.fusion.by_norm`, `by_probability` or `unscaled`.
      consensus: makes one vector of all.

    Returns:
      A tree of the same structure and types. Batch statistics are to be renewed: `jt.fusion.renewed`.

    Raises:
      InputError: where density ± ε is not in (0, 1), and for models of different architectures.
    """
    check_share(density, "density", above=True)
    if density < 1 and not (epsilon >= 0 and density - epsilon > 0 and density + epsilon < 1):
        raise InputError(f"density ± epsilon must lie in (0, 1); got {density} ± {epsilon}")
    words = _words(key)

    def dropped(vector, path, number):
        if density >= 1:
            return vector
        chances = density - epsilon + 2 * epsilon * _ranks(np.abs(vector), axis)
        return rescale(vector, _uniform(words, number, path, vector.shape) < chances, chances)

    return merged(base, models, dropped, weights=weights, scale=scale, consensus=consensus)


def _ranks(sizes: np.ndarray, axis: int) -> np.ndarray:
    """Returns the ranks along an axis, from 0 for the smallest to 1 for the largest."""
    if not -sizes.ndim <= axis < sizes.ndim and sizes.ndim > 1:
        raise InputError(f"axis {axis} is none of a leaf of shape {sizes.shape}")
    along = sizes.reshape(-1) if sizes.ndim < 2 else np.moveaxis(sizes, axis, -1)
    if along.shape[-1] < 2:
        return np.full(sizes.shape, 0.5)
    places = np.argsort(np.argsort(along, axis=-1, kind="stable"), axis=-1, kind="stable")
    ranks = places / (along.shape[-1] - 1)
    return ranks.reshape(sizes.shape) if sizes.ndim < 2 else np.moveaxis(ranks, -1, axis)


def _words(key: jax.Array | int) -> list[int]:
    """Returns a key as numbers."""
    if isinstance(key, int | np.integer):
        if key < 0:
            raise InputError(f"a seed must not be negative; got {key}")
        return [int(key)]
    if not hasattr(key, "dtype"):
        raise InputError(f"expected a key, jax.random.key(0), or a seed; got {key!r}")
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return [int(word) for word in np.asarray(jax.random.key_data(key) if typed else key).reshape(-1)]


def _uniform(words: list[int], number: int, path: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.Generator(
        np.random.Philox(np.random.SeedSequence([*words, number, zlib.crc32(path.encode())]))
    )
    return generator.random(shape)
