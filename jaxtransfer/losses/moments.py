"""Moment matching: means, covariances and higher moments of several domains are drawn together."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import EXACT, check_domains, kept_rows, root, wide
from jaxtransfer.losses.blockwise import total


def coral(
    source: jax.Array,
    target: jax.Array,
    *,
    released: bool = False,
    source_mask: jax.Array | None = None,
    target_mask: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes ‖C_s − C_t‖²_F / 4d² of two covariances over n − 1 and m − 1 (Sun, Saenko 2016, arXiv:1607.01719).

    With `released` it is what Transfer-Learning-Library and DomainBed compute under this name: the mean, not a quarter
    of it, of squared differences of covariances, plus that of means, ‖C_s − C_t‖²_F / d² + ‖μ_s − μ_t‖² / d.

    Args:
      source: float [n, d].
      target: float [m, d].
      released: whether to take that form.
      source_mask: [n]; 0 leaves an example out.
      target_mask: [m].
      axis_name: of the axis over which both are split under `pmap`: the value is that of the rows of all devices.

    Returns:
      A scalar, in at least float32. Where a domain has a single example it has no covariance, and their difference
      counts as 0; that of the means does where a domain has none.

    Raises:
      InputError: where the shapes do not fit.
    """
    check_domains(source, target)
    keep = kept_rows(source_mask, len(source)), kept_rows(target_mask, len(target))
    (mean, cov, n), (other_mean, other_cov, m) = (
        _moments(x, one, axis_name) for x, one in zip(wide(source, target), keep, strict=True)
    )
    gap = jnp.where((n > 1) & (m > 1), jnp.mean(jnp.square(cov - other_cov)), 0)
    if not released:
        return gap / 4
    return gap + jnp.where((n > 0) & (m > 0), jnp.mean(jnp.square(mean - other_mean)), 0)


def _moments(x: jax.Array, keep: jax.Array, axis_name: str | None):
    """Returns the mean [d], the covariance [d, d] over n − 1, and n, of the rows of all devices."""
    n = total(jnp.sum(keep), axis_name).astype(x.dtype)
    mean = total(jnp.sum(jnp.where(keep[:, None], x, 0), axis=0), axis_name) / jnp.maximum(n, 1)
    rest = jnp.where(keep[:, None], x - mean[None], 0)
    products = total(jnp.matmul(rest.T, rest, precision=EXACT), axis_name)
    return mean, products / jnp.maximum(n - 1, 1), n


def moment_distance(
    sources: Sequence[jax.Array],
    target: jax.Array,
    *,
    moments: int = 2,
    central: bool = False,
    source_masks: Sequence[jax.Array | None] | None = None,
    target_mask: jax.Array | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes how far the moments of several sources are from the target's and each other's (Peng et al. 2019).

    Σ_k (1/N) Σᵢ ‖E[Xᵢᵏ] − E[X_Tᵏ]‖ + Σ_k Σ_{i<j} ‖E[Xᵢᵏ] − E[Xⱼᵏ]‖ / C(N, 2) over k = 1, …, K, powers by entry: MD² of
    M³SDA (arXiv:1812.01754). The released code differs from the paper: it subtracts each batch's mean first, compares
    the first power example by example, leaves out a pair of sources, and divides by 6; `central` takes that of it which
    has a meaning, powers from the second on of what is left after the mean, whose own difference stays as k = 1.

    Args:
      sources: for each source float [n_i, d], of any number.
      target: float [m, d].
      moments: K.
      central: whether powers from the second on are those of the distance to the mean.
      source_masks: for each source [n_i], or None; 0 leaves an example out.
      target_mask: [m].
      axis_name: of the axis over which all are split under `pmap`: the value is that of the rows of all devices.

    Returns:
      A scalar, in at least float32. The gradient of distance 0 is 0; a domain without examples is in no pair.

    Raises:
      InputError: where the shapes do not fit, there is no source, or `moments` is below 1.
    """
    if not sources or moments < 1:
        raise InputError(f"expected one source or more and one moment or more; got {len(sources)} and {moments}")
    masks = (None,) * len(sources) if source_masks is None else source_masks
    if len(masks) != len(sources):
        raise InputError(f"expected a mask, or None, for each of {len(sources)} sources; got {len(masks)}")
    for source in sources:
        check_domains(source, target)
    domains = []
    for x, mask in zip(wide(*sources, target), (*masks, target_mask), strict=True):
        domains.append(_powers(x, kept_rows(mask, len(x)), moments, central, axis_name))
    *own, (aim, aimed) = domains
    to_target, apart = jnp.zeros((), aim[0].dtype), jnp.zeros((), aim[0].dtype)
    for number, (one, some) in enumerate(own):
        to_target += jnp.where(some & aimed, _gap(one, aim), 0)
        for other, others in own[number + 1 :]:
            apart += jnp.where(some & others, _gap(one, other), 0)
    pairs = len(sources) * (len(sources) - 1) // 2
    return to_target / len(sources) + apart / max(pairs, 1)


def _powers(x: jax.Array, keep: jax.Array, moments: int, central: bool, axis_name: str | None):
    """Returns E[xᵏ] [d] for k = 1, …, and whether there is an example."""
    n = total(jnp.sum(keep), axis_name)
    count = jnp.maximum(n, 1).astype(x.dtype)
    x = jnp.where(keep[:, None], x, 0)
    means = [total(jnp.sum(x, axis=0), axis_name) / count]
    if central:
        x = jnp.where(keep[:, None], x - means[0][None], 0)
    for power in range(2, moments + 1):
        means.append(total(jnp.sum(x**power, axis=0), axis_name) / count)
    return means, n > 0


def _gap(one: list[jax.Array], other: list[jax.Array]) -> jax.Array:
    return sum((root(jnp.sum(jnp.square(a - b))) for a, b in zip(one, other, strict=True)), jnp.zeros((), one[0].dtype))
