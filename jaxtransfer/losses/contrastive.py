"""Contrastive losses: an example against all others of the batch, in linear memory.

Each of them compares the score of the right pair with a sum over the wrong ones, so that a small loss keeps its digits
and no row is empty by accident. The matrix of scores is never held (`reduce_pairs`), value and gradient are exact to
rounding, and temperature and bias may be learned.

Three arguments are the same in all: `chunk`, the largest side of a tile of the matrix, is chosen by size if None; where
`mask` [B] is 0 the example is in no pair, its value is 0, and what stands in its rows doesn't matter. Under `jit` a
batch that is split over a mesh is one batch by itself. Where each device has a program and rows of its own, under
`pmap` or `shard_map`, `axis_name` tells over which axis: each device's rows are compared with those of all, and it gets
the values of its own. The means over the devices, of values and of gradients by parameters, are the whole batch's.
"""

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import EXACT, check_temperature, kept_rows, wide
from jaxtransfer.losses._numerics import normalize as unit
from jaxtransfer.losses.blockwise import LOG_SUM_EXP, SOFTPLUS_SUM, Side, everywhere, numbers, others, reduce_pairs


def _pair(one: jax.Array, other: jax.Array, temperature, mask: jax.Array | None, normalize: bool):
    """Returns both embeddings in at least float32, 0 where they are left out, and what is kept [B]."""
    check_temperature(temperature)
    if one.ndim != 2 or one.shape != other.shape:
        raise InputError(
            f"the two sides must be embeddings [batch, dim] of one shape, row i of each a pair; got {one.shape} and "
            f"{other.shape}: project them to the same number of dimensions"
        )
    keep = kept_rows(mask, len(one))
    one, other = (jnp.where(keep[:, None], x, 0) for x in wide(one, other))
    return (unit(one), unit(other), keep) if normalize else (one, other, keep)


def info_nce(
    anchors: jax.Array,
    positives: jax.Array,
    *,
    temperature: float | jax.Array,
    negatives: jax.Array | None = None,
    ids: tuple[jax.Array, jax.Array] | None = None,
    symmetric: bool = False,
    normalize: bool = False,
    chunk: int | None = None,
    mask: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes −log exp(aᵢ·pᵢ/τ) / Σ_j exp(aᵢ·pⱼ/τ) (van den Oord et al. 2018, arXiv:1807.03748).

    Args:
      anchors: float [B, D], a.
      positives: float [B, D], p; the positives of the others are the negatives, unless some are given.
      temperature: τ > 0.
      negatives: float [M, D], shared by all anchors (a queue: He et al. 2020, arXiv:1911.05722), or [B, K, D], each
        anchor's own. The sum then runs over the positive and these alone.
      ids: numbers of the anchors' examples [B] and of the shared negatives' [M]: what comes from the anchor's own
        example is no negative of it.
      symmetric: whether to take the mean of both directions, a → p and p → a (CLIP: Radford et al. 2021,
        arXiv:2103.00020); without given negatives only.
      normalize: whether to bring rows to length 1 first; otherwise the scores are raw dot products.
      chunk: the largest side of a tile.
      mask: [B]; 0 leaves an example out.
      axis_name: of the axis over which the batch is split under `pmap`.

    Returns:
      The loss [B], in at least float32; 0 for a row without negatives.

    Raises:
      InputError: where the shapes do not fit, τ isn't positive, or both directions are asked for with given negatives.
    """
    a, p, keep = _pair(anchors, positives, temperature, mask, normalize)
    own = jnp.sum(a * p, axis=1) / temperature
    a = a / temperature
    if ids is not None and (negatives is None or negatives.ndim != 2 or len(ids[1]) != len(negatives)):
        raise InputError("ids are the numbers of the anchors and of the negatives [M, D] that all anchors share")
    if negatives is None:
        number = numbers(len(a), axis_name)
        sides = Side(a, keep, number), Side(p, keep, number)
        rows, columns = _both_ways(*sides, symmetric, chunk, axis_name)
        values = jax.nn.softplus(rows - own)
        return values if columns is None else (values + jax.nn.softplus(columns - own)) / 2
    if symmetric:
        raise InputError("symmetric needs the negatives of the batch: given negatives belong to the anchors alone")
    own_ones = negatives.ndim == 3 and negatives.shape[::2] == a.shape
    if negatives.shape[1:] != a.shape[1:] and not own_ones:
        raise InputError(
            f"negatives must be [any, {a.shape[1]}], shared, or [{len(a)}, any, {a.shape[1]}], each anchor's own; got "
            f"{negatives.shape}"
        )
    _, n = wide(a, jnp.where(keep[:, None, None], negatives, 0) if own_ones else negatives)
    n = unit(n) if normalize else n
    if not own_ones:
        one, other = Side(a, keep), Side(n, jnp.ones(len(n), bool))
        if ids is None:
            rows, _ = reduce_pairs(LOG_SUM_EXP, one, other, chunk=chunk)
        else:
            one, other = (side._replace(tags=tags) for side, tags in zip((one, other), ids, strict=True))
            rows, _ = reduce_pairs(LOG_SUM_EXP, one, other, pairs=others, chunk=chunk)
    else:
        rows = jax.nn.logsumexp(jnp.einsum("bd,bkd->bk", a, n, precision=EXACT), axis=1)
    return jnp.where(keep, jax.nn.softplus(rows - own), 0)


def _both_ways(one: Side, other: Side, symmetric: bool, chunk: int | None, axis_name: str | None):
    """Returns log Σ exp of each row of one side over the other of all devices, and the same the other way round."""
    options = {"pairs": others, "chunk": chunk}
    if axis_name is None:
        return reduce_pairs(LOG_SUM_EXP, one, other, both=symmetric, **options)
    rows, _ = reduce_pairs(LOG_SUM_EXP, one, everywhere(other, axis_name), **options)
    if not symmetric:
        return rows, None
    return rows, reduce_pairs(LOG_SUM_EXP, other, everywhere(one, axis_name), **options)[0]


def _views(z1, z2, temperature, chunk: int | None, mask: jax.Array | None, axis_name: str | None):
    """Returns cosines z1·z2 [B], log Σ exp over the views of other examples [B, 2], −∞ if none, and what is kept."""
    z1, z2, keep = _pair(z1, z2, temperature, mask, True)
    z = jnp.stack([z1, z2], axis=1).reshape(-1, z1.shape[1])  # views side by side: rows stay on their device
    side = Side(z / jnp.sqrt(temperature), jnp.repeat(keep, 2), jnp.repeat(numbers(len(z1), axis_name), 2))
    sums, _ = reduce_pairs(LOG_SUM_EXP, side, everywhere(side, axis_name), pairs=others, chunk=chunk)
    return jnp.sum(z1 * z2, axis=1), sums.reshape(-1, 2), keep


def nt_xent(
    z1: jax.Array,
    z2: jax.Array,
    *,
    temperature: float | jax.Array = 0.5,
    chunk: int | None = None,
    mask: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes −log exp(cos(z, z⁺)/τ) / Σ_{z' ≠ z} exp(cos(z, z')/τ), the mean over the two views z of an example.

    SimCLR (Chen et al. 2020, arXiv:2002.05709): each of the 2B views against the 2B − 1 others. The mean over the
    examples is the released scalar.

    Args:
      z1: float [B, D], the first views; they are brought to length 1 here.
      z2: float [B, D], the second views.
      temperature: τ > 0.
      chunk: the largest side of a tile.
      mask: [B]; 0 leaves an example out.
      axis_name: of the axis over which the batch is split under `pmap`.

    Returns:
      The loss [B], in at least float32; 0 in a batch of one.

    Raises:
      InputError: where the shapes do not fit, or τ isn't positive.
    """
    own, sums, _ = _views(z1, z2, temperature, chunk, mask, axis_name)
    return jnp.mean(jax.nn.softplus(sums - own[:, None] / temperature), axis=1)


def dcl(
    z1: jax.Array,
    z2: jax.Array,
    *,
    temperature: float | jax.Array = 0.1,
    sigma: float | None = None,
    chunk: int | None = None,
    mask: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes −w·cos(z, z⁺)/τ + log Σ_{z' of others} exp(cos(z, z')/τ), the mean over the two views z of an example.

    Decoupled contrastive learning (Yeh et al. 2022, arXiv:2110.06848, equation 6): `nt_xent` without the positive in
    the sum. The paper adds the two views, here as in lightly it is their mean; but lightly adds the logarithms of two
    sums, one per view. The weight w is 1, or with σ 2 − exp(z1·z2/σ) / mean exp(z1·z2/σ), without a gradient.

    Args:
      z1: float [B, D], the first views; they are brought to length 1 here.
      z2: float [B, D], the second views.
      temperature: τ > 0.
      sigma: σ of the weight, 0.5 in the paper; None for none.
      chunk: the largest side of a tile.
      mask: [B]; 0 leaves an example out.
      axis_name: of the axis over which the batch is split under `pmap`.

    Returns:
      The loss [B], in at least float32; 0 for an example without negatives.

    Raises:
      InputError: where the shapes do not fit, or τ isn't positive.
    """
    cosines, sums, keep = _views(z1, z2, temperature, chunk, mask, axis_name)
    own = cosines / temperature
    if sigma is not None:
        check_temperature(sigma, "sigma")
        exponents = jax.lax.stop_gradient(cosines) / sigma
        whole, kept = (exponents, keep) if axis_name is None else everywhere((exponents, keep), axis_name)
        share = jnp.where(keep, jnp.exp(exponents - jax.nn.logsumexp(whole, where=kept)), 0)
        own = own * (2 - jnp.sum(kept) * share)
    some = ~jnp.isneginf(sums)
    return jnp.mean(jnp.where(some, jnp.where(some, sums, 0) - own[:, None], 0), axis=1)


def _alike(one, other):
    """Counts pairs of different examples with one label."""
    return (one[0] != other[0]) & (one[1] == other[1])


def _another(one, other):
    """Counts pairs of different examples."""
    return one[0] != other[0]


def supcon(
    features: jax.Array,
    labels: jax.Array,
    *,
    temperature: float | jax.Array = 0.07,
    base_temperature: float | None = 0.07,
    inside: bool = False,
    chunk: int | None = None,
    mask: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes −mean_{p of i's label} log exp(zᵢ·z_p/τ) / Σ_{a≠i} exp(zᵢ·z_a/τ) (Khosla et al. 2020, arXiv:2004.11362).

    That is the outer form, the released one. The inner has the mean inside of the logarithm: −log mean_p (…).

    Args:
      features: float [B, D], or [B, V, D] with V views of each example, which share its label. As released they are not
        brought to length 1 here.
      labels: integers [B].
      temperature: τ > 0.
      base_temperature: τ₀ of the factor τ/τ₀ that the released code has and the paper has not; None leaves it out.
      inside: whether to take the inner form.
      chunk: the largest side of a tile.
      mask: [B]; 0 leaves an example out.
      axis_name: of the axis over which the batch is split under `pmap`.

    Returns:
      The loss [B], the mean over the views, in at least float32; 0 for a row without a positive. The mean over all B
      counts those rows too (the released code is NaN there).

    Raises:
      InputError: where the shapes do not fit, or τ isn't positive.
    """
    check_temperature(temperature)
    if base_temperature is not None:
        check_temperature(base_temperature, "base_temperature")
    hard = jnp.issubdtype(labels.dtype, jnp.integer)
    if features.ndim not in (2, 3) or labels.shape != features.shape[:1] or not hard:
        raise InputError(
            f"features must be [batch, dim] or [batch, views, dim] and labels integers [batch]; got {features.shape} "
            f"and {labels.dtype} {labels.shape}"
        )
    batch, views = len(features), 1 if features.ndim == 2 else features.shape[1]
    keep, label = jnp.repeat(kept_rows(mask, batch), views), jnp.repeat(labels, views)
    (z,) = wide(features.reshape(batch * views, -1))
    z = jnp.where(keep[:, None], z, 0) / jnp.sqrt(temperature)
    side = Side(z, keep, (numbers(len(z), axis_name), label))
    columns = everywhere(side, axis_name)
    sums, _ = reduce_pairs(LOG_SUM_EXP, side, columns, pairs=_another, chunk=chunk)
    of_all = columns or side
    order, size = jnp.sort(of_all.tags[1]), len(of_all.x)
    group, groups = (jnp.searchsorted(order, labels) for labels in (label, of_all.tags[1]))  # a number for each label
    count = jax.ops.segment_sum(of_all.keep.astype(z.dtype), groups, size)[group] - 1
    some = keep & (count > 0)
    count = jnp.where(some, count, 1)
    if inside:
        right = reduce_pairs(LOG_SUM_EXP, side, columns, pairs=_alike, chunk=chunk)[0] - jnp.log(count)
    else:
        right = jnp.sum(z * (jax.ops.segment_sum(of_all.x, groups, size)[group] - z), axis=1) / count
    values = jnp.where(some, jnp.where(some, sums, 0) - jnp.where(some, right, 0), 0)
    if base_temperature is not None:
        values = values * (temperature / base_temperature)
    return jnp.mean(values.reshape(batch, views), axis=1)


def siglip(
    a: jax.Array,
    b: jax.Array,
    *,
    temperature: float | jax.Array,
    bias: float | jax.Array,
    normalize: bool = False,
    chunk: int | None = None,
    mask: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes −Σ_j log σ(z_ij (aᵢ·bⱼ/τ + bias)), z_ij = 1 for i = j, else −1 (Zhai et al. 2023, arXiv:2303.15343).

    Args:
      a: float [B, D].
      b: float [B, D]; row i belongs to row i of `a`.
      temperature: τ > 0, 0.1 at the paper's start; its learned t' is −log τ.
      bias: added to each score, −10 at the paper's start.
      normalize: whether to bring rows to length 1 first, as the paper's towers do.
      chunk: the largest side of a tile.
      mask: [B]; 0 leaves an example out.
      axis_name: of the axis over which the batch is split under `pmap`.

    Returns:
      The sum of each row [B], in at least float32: the mean over the examples is the released loss.

    Raises:
      InputError: where the shapes do not fit, or τ isn't positive.
    """
    a, b, keep = _pair(a, b, temperature, mask, normalize)
    number, one = numbers(len(a), axis_name), jnp.ones((len(a), 1), a.dtype)
    a = a / temperature
    own = jnp.sum(a * b, axis=1) + bias
    rows, columns = (Side(jnp.concatenate(x, axis=1), keep, number) for x in ((a, bias * one), (b, one)))
    wrong, _ = reduce_pairs(SOFTPLUS_SUM, rows, everywhere(columns, axis_name) or columns, pairs=others, chunk=chunk)
    return jnp.where(keep, wrong + jax.nn.softplus(-own), 0)
