"""Weighted means of the weights: uniform soups, and the line between two models."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.fusion.consensus import weighted_sum
from jaxtransfer.fusion.leaves import as_list, check_share, double, fused, weights_of


def average(models: Sequence[Any], *, weights: Sequence[float] | None = None, normalize: bool = True) -> Any:
    """Returns Σᵢ aᵢ wᵢ / Σᵢ aᵢ: a uniform soup, or a weighted one.

    (Wortsman et al. 2022, arXiv:2203.05482; of checkpoints of one run, Izmailov et al. 2018, arXiv:1803.05407.) The
    order of the models does not matter. mergekit calls it `linear`, peft too.

    Args:
      models: trees of one architecture; see `jt.fusion` on statistics and on leaves that are no numbers to mix.
      weights: a, one number a model; equal ones by default.
      normalize: whether to divide by their sum. Without it, it is the plain weighted sum.

    Returns:
      A tree of the same structure and types. Running state is averaged by the same weights, by equal ones where one of
      them is negative; batch statistics are to be renewed: `jt.fusion.renewed`.

    Raises:
      InputError: for models of different architectures, and for weights that sum to 0.
    """
    shares = weights_of(weights, len(as_list(models)))
    if normalize:
        total = shares.sum()
        if abs(total) < 1e-8 * max(1.0, float(np.abs(shares).sum())):
            raise InputError(f"weights must not sum to 0, by which they are divided; got {shares.tolist()}")
        shares = shares / total
    kept = shares / shares.sum() if np.all(shares >= 0) and np.any(shares > 0) else None  # variances stay positive
    state = None if kept is None else lambda path, values, _: weighted_sum(values, kept)
    return fused(models, lambda path, values, _: weighted_sum(values, shares), state=state)


def wise_ft(base: Any, model: Any, *, alpha: float = 0.5) -> Any:
    """Returns (1 − α) w₀ + α w: weight-space ensembling of a pretrained model and its fine-tuned form.

    (Wortsman et al. 2022, arXiv:2109.01903: WiSE-FT.) Accuracy off the new distribution often rises with none lost on
    it; choose α on validation data. Running state is mixed alike, so that 0 and 1 are the two models; in between batch
    statistics are to be renewed: `jt.fusion.renewed`.

    Args:
      base: w₀, the pretrained model.
      model: w, fine-tuned from it.
      alpha: in [0, 1].

    Raises:
      InputError: for another α; `jt.fusion.task_arithmetic(scale=)` goes beyond both ends.
    """
    check_share(alpha, "alpha")

    def between(path, values, at):
        return (1 - alpha) * double(at) + alpha * double(values[0])

    return fused([model], between, base=base, state=between)


def slerp(first: Any, second: Any, *, t: float = 0.5) -> Any:
    """Returns the point at t on the great circle from `first` to `second`, for each leaf: spherical interpolation.

    With θ the angle between the leaves as vectors: [sin((1 − t)θ) w₁ + sin(tθ) w₂] / sin θ (Shoemake 1985, SIGGRAPH).
    Lengths are kept where a mean would shorten them. Leaves that are nearly parallel, |cos θ| > 0.9995, are mixed
    linearly, as in mergekit, of which this is the form; a leaf of zeros counts as orthogonal. Running state is mixed
    linearly, so that 0 and 1 are the two models; in between batch statistics are to be renewed: `jt.fusion.renewed`.

    Args:
      first: the model at t = 0, mergekit's base model.
      second: the model at t = 1.
      t: in [0, 1].

    Raises:
      InputError: for another t, and for models of different architectures.
    """
    check_share(t, "t")

    def linear(path, values, _):
        return (1 - t) * double(values[0]) + t * double(values[1])

    def between(path, values, _):
        one, two = (double(value) for value in values)
        lengths = [float(np.linalg.norm(value)) for value in (one, two)]
        units = [v / n if n > 1e-8 else v for v, n in zip((one, two), lengths, strict=True)]
        cosine = float(np.sum(units[0] * units[1]))
        if abs(cosine) > 0.9995:
            return linear(path, values, None)
        angle = np.arccos(cosine)
        return (np.sin((1 - t) * angle) * one + np.sin(t * angle) * two) / np.sin(angle)

    return fused([first, second], between, state=linear)
