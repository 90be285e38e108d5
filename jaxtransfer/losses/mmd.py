"""Maximum mean discrepancy: how far two sets of features are from samples of one distribution, in linear memory."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_temperature, kept_rows, wide
from jaxtransfer.losses.blockwise import everywhere, numbers, total
from jaxtransfer.losses.kernel_sums import Points, Rates, kernel_sum

Alphas = Sequence[float]


def mmd(
    source: jax.Array,
    target: jax.Array,
    *,
    alphas: Alphas = (0.5, 1.0, 2.0),
    linear: bool = False,
    offset: bool = True,
    source_mask: jax.Array | None = None,
    target_mask: jax.Array | None = None,
    chunk: int | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes the squared maximum mean discrepancy of several Gaussian kernels (Long et al. 2015, arXiv:1502.02791).

    Σ_{i≠j} k(sᵢ, sⱼ) / n(n−1) + Σ_{i≠j} k(tᵢ, tⱼ) / m(m−1) − 2 Σᵢⱼ k(sᵢ, tⱼ) / nm  +  1/(n−1) + 1/(m−1)

    with k(x, y) = Σ_α exp(−‖x − y‖² / 2ασ²) and σ² the mean of ‖x − y‖² over all (n + m)² pairs of both sets, each with
    itself included, which is not differentiated. The first three are the unbiased estimate, which is negative at times
    and for equal sets; the constant behind them, of no gradient, is what Transfer-Learning-Library adds (2 / (n − 1)
    at equal sizes) to keep it positive. `linear` is the estimate of linear time with the same constant,

    (1/n) Σᵢ k(sᵢ, sᵢ₊₁) + k(tᵢ, tᵢ₊₁) − k(sᵢ, tᵢ₊₁) − k(sᵢ₊₁, tᵢ)  +  2/(n−1)

    where the first example follows the last. Values and gradients at equal sizes are those of that library's
    `MultipleKernelMaximumMeanDiscrepancy`, but for `linear` with two examples, where it counts cross pairs once that
    stand in the formula twice.

    The matrix of pairs is never held (`kernel_sum`): memory (n + m)·D and one tile, for the gradient too.

    Args:
      source: float [n, ...], s; axes behind the first are one vector.
      target: float [m, ...], t, of as many dimensions.
      alphas: α > 0, one for each kernel.
      linear: whether to take the estimate of linear time, for n = m.
      offset: whether to add the constant; without it the value is the unbiased estimate.
      source_mask: [n]; 0 leaves an example out. In `linear` the ring runs over as many as are kept of both.
      target_mask: [m].
      chunk: the largest side of a tile.
      axis_name: of the axis over which both are split under `pmap`: the value is that of the rows of all devices.

    Returns:
      A scalar, in at least float32; 0, with gradient 0, where a set has fewer than two examples or all are equal.

    Raises:
      InputError: where shapes do not fit, an α isn't positive, or `linear` is asked for at unequal sizes.
    """
    return jmmd(
        (source,),
        (target,),
        alphas=(tuple(alphas),),
        linear=linear,
        offset=offset,
        source_mask=source_mask,
        target_mask=target_mask,
        chunk=chunk,
        axis_name=axis_name,
    )


def jmmd(
    sources: Sequence[jax.Array],
    targets: Sequence[jax.Array],
    *,
    alphas: Alphas | Sequence[Alphas] = (0.5, 1.0, 2.0),
    sigmas: Sequence[float | None] | None = None,
    linear: bool = False,
    offset: bool = True,
    source_mask: jax.Array | None = None,
    target_mask: jax.Array | None = None,
    chunk: int | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes `mmd` of the joint distribution of several layers (Long et al. 2017, arXiv:1605.06636).

    The kernel is the product over the layers, k(x, y) = Π_l Σ_α exp(−‖x_l − y_l‖² / 2ασ_l²); σ_l² is the mean over all
    pairs of that layer, or given. All else is as for `mmd`. Values and gradients at equal sizes are those of
    Transfer-Learning-Library's `JointMultipleKernelMaximumMeanDiscrepancy`, which has no default kernels: its example
    takes α = ½, 1, 2 for the first layer and 1 for the second; its training of JAN α = ⅛, ¼, ½, 1, 2 for the features
    and one kernel of fixed σ = 0.92 for the probabilities,
    `alphas=((.125, .25, .5, 1, 2), (1,)), sigmas=(None, .92)`.

    Args:
      sources: for each layer float [n, ...], of the same n examples.
      targets: for each layer float [m, ...].
      alphas: α > 0, for all layers alike, or one sequence for each.
      sigmas: for each layer σ > 0, or None for the mean; None for all.
      linear: as for `mmd`.
      offset: as for `mmd`.
      source_mask: [n]; 0 leaves an example out.
      target_mask: [m].
      chunk: the largest side of a tile.
      axis_name: as for `mmd`.

    Returns:
      A scalar, in at least float32; 0, with gradient 0, where a set has fewer than two examples or all are equal.

    Raises:
      InputError: as for `mmd`, and for numbers of layers that differ.
    """
    by_layer = _checked(sources, targets, alphas, sigmas, linear)
    sigmas = (None,) * len(by_layer) if sigmas is None else sigmas
    keep = kept_rows(source_mask, len(sources[0])), kept_rows(target_mask, len(targets[0]))
    counts = [total(jnp.sum(one), axis_name) for one in keep]
    layers, rates, spread, usual = [], [], jnp.zeros((), bool), 1.0
    for pair, own, sigma in zip(zip(sources, targets, strict=True), by_layer, sigmas, strict=True):
        pair, rate, distance = _standardised(pair, keep, counts, own, sigma, axis_name)
        layers.append(pair)
        rates.append(rate)
        spread |= distance > 0
        usual *= jnp.sum(jnp.exp(-rate * distance))
    number = [numbers(len(one), axis_name) for one in keep]
    s, t = (
        Points(tuple(pair[side] for pair in layers), keep[side], number[side] if side == 0 else -1 - number[side])
        for side in (0, 1)
    )
    n, m = (count.astype(layers[0][0].dtype) for count in counts)
    if linear:
        value = _ring(s, t, tuple(rates), axis_name)
    else:
        value = _all_pairs(s, t, tuple(rates), usual, n, m, chunk, axis_name)
    if offset:
        value += 1 / jnp.maximum(n - 1, 1) + 1 / jnp.maximum(m - 1, 1)
    return jnp.where(spread & (n > 1) & (m > 1), value, 0)


def _all_pairs(s: Points, t: Points, rates: Rates, usual, n, m, chunk: int | None, axis_name: str | None) -> jax.Array:
    """The unbiased estimate; weights of pairs add up to 0, so that a usual kernel can be subtracted from all."""
    options = {"less": usual, "chunk": chunk}
    within = [
        kernel_sum(side, everywhere(side, axis_name), rates, **options) / jnp.maximum(count * (count - 1), 1)
        for side, count in ((s, n), (t, m))
    ]
    across = kernel_sum(s, everywhere(t, axis_name) or t, rates, **options) / jnp.maximum(n * m, 1)
    return total(within[0] + within[1] - 2 * across, axis_name)


def _ring(s: Points, t: Points, rates: Rates, axis_name: str | None) -> jax.Array:
    """The mean over a ring of the examples that are kept, which come first, as many of one set as of the other."""
    s, t = (everywhere(side, axis_name) or side for side in (s, t))
    size = jnp.minimum(jnp.sum(s.keep), jnp.sum(t.keep))
    place = jnp.arange(len(s.keep))
    follower = jnp.where(place + 1 < size, place + 1, 0)

    def in_order(side):
        order = jnp.argsort(~side.keep, stable=True)
        return [x[order] for x in side.layers]

    def kernel(one, other):
        product = jnp.ones((), one[0].dtype)
        for x, y, rate in zip(one, other, rates, strict=True):
            squares = jnp.sum(jnp.square(x - y), axis=1)
            product = product * jnp.sum(jnp.exp(-rate[:, None] * squares[None]), axis=0)
        return product

    a, b = in_order(s), in_order(t)
    a_next, b_next = ([x[follower] for x in side] for side in (a, b))
    terms = kernel(a, a_next) + kernel(b, b_next) - kernel(a, b_next) - kernel(a_next, b)
    return jnp.sum(jnp.where(place < size, terms, 0)) / jnp.maximum(size, 1).astype(terms.dtype)


def _standardised(pair, keep, counts, alphas: Alphas, sigma: float | None, axis_name: str | None):
    """Returns a layer of both sets less their mean, the rates 1/2ασ², and the mean squared distance, 0 if none.

    In units of the largest entry, so that no square is out of range; neither it nor the mean has a gradient, as
    distances don't change with the mean and rates are in the same unit.
    """
    one, other = (jnp.where(k[:, None], x.reshape(len(x), -1), 0) for x, k in zip(wide(*pair), keep, strict=True))
    fixed = [jax.lax.stop_gradient(x) for x in (one, other)]
    largest = jnp.maximum(*(jnp.max(jnp.abs(x), initial=0) for x in fixed))
    largest = largest if axis_name is None else jax.lax.pmax(largest, axis_name)
    unit = jnp.where(largest > 0, largest, 1)
    count = jnp.maximum(counts[0] + counts[1], 1).astype(one.dtype)
    mean = total(jnp.sum(fixed[0] / unit, axis=0) + jnp.sum(fixed[1] / unit, axis=0), axis_name) / count

    def centred(x, kept):
        return jnp.where(kept[:, None], x / unit - mean[None], 0)

    pair = centred(one, keep[0]), centred(other, keep[1])
    rest, whole = (
        total(jnp.sum(jnp.square(a)) + jnp.sum(jnp.square(b)), axis_name)
        for a, b in (jax.lax.stop_gradient(pair), (fixed[0] / unit, fixed[1] / unit))
    )
    varies = rest > jnp.square(4 * jnp.finfo(one.dtype).eps) * whole  # else what is left is rounding
    distance = jnp.where(varies, 2 * rest / count, 0)
    variance = distance if sigma is None else jnp.square(sigma / unit)
    widths = jnp.asarray(alphas if sigma is None else (1.0,), one.dtype) * jnp.where(varies, variance, 1)
    return pair, jnp.where(varies, 1 / (2 * widths), 0), distance


def _checked(sources, targets, alphas, sigmas, linear: bool) -> tuple[Alphas, ...]:
    """Returns the alphas of each layer, after everything has been looked at."""
    count = len(sources)
    if not count or len(targets) != count or (sigmas is not None and len(sigmas) != count):
        raise InputError(
            f"expected one layer or more, as many of source and target, and of sigmas if there are any; got {count}, "
            f"{len(targets)}" + ("" if sigmas is None else f" and {len(sigmas)} sigmas")
        )
    for s, t in zip(sources, targets, strict=True):
        fit = s.ndim > 1 and t.ndim > 1 and s.shape[1:] == t.shape[1:]
        if not fit or len(s) != len(sources[0]) or len(t) != len(targets[0]):
            raise InputError(
                f"source and target must be features [examples, ...] that differ in the number of examples alone, the "
                f"same in all layers; got {s.shape} and {t.shape}"
            )
    if linear and len(sources[0]) != len(targets[0]):
        raise InputError(
            f"the estimate of linear time pairs the examples up, so that both domains need as many; got "
            f"{len(sources[0])} and {len(targets[0])}: take linear=False, or batches of one size"
        )
    nested = [not hasattr(alpha, "ndim") and hasattr(alpha, "__len__") for alpha in alphas]
    by_layer = tuple(tuple(own) for own in alphas) if any(nested) and all(nested) else (tuple(alphas),) * count
    if len(by_layer) != count or not all(by_layer) or (any(nested) and not all(nested)):
        raise InputError(f"alphas are numbers, or one sequence of them for each of {count} layers; got {alphas}")
    for own in by_layer:
        for alpha in own:
            check_temperature(alpha, "an alpha")
    for sigma in sigmas or ():
        if sigma is not None:
            check_temperature(sigma, "a sigma")
    return by_layer
