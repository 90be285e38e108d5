"""Fisher merging: each parameter a mean of the models, weighted by how much each model's data say about it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.fusion.consensus import weighted_sum
from jaxtransfer.fusion.leaves import (
    as_list,
    check_alike,
    check_number,
    double,
    fused,
    is_mixed,
    is_state,
    weights_of,
    wide,
)


def fisher(
    models: Sequence[Any],
    information: Sequence[Any],
    *,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    floor: float = 1e-6,
) -> Any:
    """Returns Σᵢ aᵢ (Fᵢ + ε) wᵢ / Σᵢ aᵢ (Fᵢ + ε), entry by entry (Matena and Raffel 2022, arXiv:2111.09832).

    The order of the models does not matter, as long as their Fisher information is ordered alike. With `normalize` aᵢ
    is divided by ‖Fᵢ‖₂ + ε over all parameters, so that no model speaks louder than the others: FusionBench's (and
    MergeLM's) form with its defaults.

    Args:
      models: trees of one architecture.
      information: F, a tree a model of non-negative numbers, shaped like its parameters (like `variables["params"]`
        where models are variables): `jt.fisher_diagonal(jt.classification(model), ...)["model"]`.
      weights: a, one number a model, not negative; equal ones by default.
      normalize: see above.
      floor: ε > 0; where no F says anything, the result is the weighted mean.

    Returns:
      A tree of the same structure and types. Batch statistics are to be renewed: `jt.fusion.renewed`.

    Raises:
      InputError: where F does not fit, is negative or not finite; and for models of different architectures.
    """
    check_alike(as_list(models))
    check_number(floor, "floor")
    if floor <= 0:
        raise InputError(f"floor must be positive; got {floor}")
    if len(information) != len(models):
        raise InputError(f"expected the Fisher information of each of {len(models)} models; got {len(information)}")
    shares = weights_of(weights, len(models))
    if np.any(shares < 0) or not np.any(shares > 0):
        raise InputError(f"weights must not be negative, and not all 0; got {shares.tolist()}")
    found = [_checked(number, model, own) for number, (model, own) in enumerate(zip(models, information, strict=True))]
    if normalize:
        lengths = [np.sqrt(sum(float(np.sum(double(leaf) ** 2)) for leaf in own.values())) for own in found]
        shares = shares / (np.asarray(lengths) + floor)
        shares = shares / np.sum(shares)

    def combine(path, values, _):
        told = [double(own[path]) + floor for own in found]
        return weighted_sum([t * v for t, v in zip(told, values, strict=True)], shares) / weighted_sum(told, shares)

    return fused(models, combine)


def _checked(number: int, model: Any, own: Any) -> dict[str, np.ndarray]:
    """Returns the information by path of the model's leaves."""
    ours = {p: v for p, v in tree.leaves_by_path(model).items() if is_mixed(v) and not is_state(model, p)}
    given = {p: v for p, v in tree.leaves_by_path(own).items() if is_mixed(v) and not is_state(own, p)}
    if ours and all(path.startswith("params/") for path in ours) and not any(p.startswith("params/") for p in given):
        given = {f"params/{path}": value for path, value in given.items()}
    if any(wrong := tree.differences(ours, given)):
        raise InputError(f"the Fisher information of model {number} must match its parameters {wrong}")
    for path, value in given.items():
        if not np.all((wide(value) >= 0) & np.isfinite(wide(value))):
            raise InputError(
                f"Fisher information is a mean of squares; that of model {number} at {path!r} is negative, or not "
                f"finite: has it diverged?"
            )
    return {path: wide(value) for path, value in given.items()}
