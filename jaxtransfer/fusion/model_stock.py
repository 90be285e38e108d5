"""Model stock: the point near the centre of fine-tuned weights that two or more of them and the base tell."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.fusion.leaves import double, fused


def model_stock(base: Any, models: Sequence[Any], *, filters: int | None = None) -> Any:
    """Returns t w̄ + (1 − t) w₀ with t = N cos θ / (1 + (N − 1) cos θ), for each leaf: w̄ the mean of N models.

    (Jang et al. 2024, arXiv:2403.19522.) θ is the angle between differences from the base; of more than two models the
    mean of the cosines of all pairs, as in mergekit, whose form it is (cosines of differences shorter than 1e-3, of
    products of lengths under 1e-6, are taken as smaller there, too). The order of the models does not matter. Where
    1 + (N − 1) cos θ is 0, w₀ stays.

    Args:
      base: w₀, what all were fine-tuned from.
      models: two or more, fine-tuned alike from other seeds or by other rates.
      filters: the axis of the outputs, for a t of each filter, mergekit's `filter_wise`: −1 for kernels [..., in, out];
        0 where PyTorch's order [out, in] was kept. By default a leaf has one t. Vectors have one in any case.

    Returns:
      A tree of the same structure and types. Batch statistics are to be renewed: `jt.fusion.renewed`.

    Raises:
      InputError: for fewer than two models, and for models of different architectures.
    """
    if len(models) < 2:
        raise InputError(f"model stock takes a base and two models or more fine-tuned from it; got {len(models)}")

    def centre(path, values, start):
        start, values = double(start), [double(value) for value in values]
        rows = [_rows(value - start, filters) for value in values]
        cosines = np.mean([_cosine(one, two) for one, two in itertools.combinations(rows, 2)], axis=0)
        below = 1 + (len(values) - 1) * cosines
        ratio = np.where(np.abs(below) < 1e-6, 0, len(values) * cosines / np.where(np.abs(below) < 1e-6, 1, below))
        if len(ratio) > 1:
            shape = [1] * start.ndim
            shape[filters] = -1  # pyright: ignore[reportArgumentType, reportCallIssue]
            ratio = ratio.reshape(shape)
        else:
            ratio = ratio[0]
        return ratio * (sum(values) / len(values)) + (1 - ratio) * start

    return fused(models, centre, base=base)


def _rows(vector: np.ndarray, filters: int | None) -> np.ndarray:
    """Returns the vectors whose angles count, [filters, ...] or a single one."""
    if filters is None or vector.ndim < 2:
        return vector.reshape(1, -1)
    if not -vector.ndim <= filters < vector.ndim:
        raise InputError(f"filters={filters} is no axis of a leaf of shape {vector.shape}")
    return np.moveaxis(vector, filters, 0).reshape(vector.shape[filters], -1)


def _cosine(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(two, axis=-1)
    return np.clip(np.sum(one * two, axis=-1) / np.maximum(lengths, 1e-6), -1, 1)
