"""RegMean: linear layers merged so that the result answers each model's inputs as that model did."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.linalg

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.fusion.leaves import as_list, check_alike, check_share, double, fused


def regmean(models: Sequence[Any], grams: Sequence[Mapping[str, Any]], *, off_diagonal: float = 0.9) -> Any:
    """Returns, for linear layers, (Σᵢ Gᵢ)⁻¹ Σᵢ Gᵢ Wᵢ: the least squares fit to all models' outputs on their own inputs.

    (Jin et al. 2023, arXiv:2212.09849.) Gᵢ is the Gram matrix of the inputs that the layer sees in model i; its entries
    off the diagonal are multiplied by a number under 1. All other leaves become their mean. The order of the models
    does not matter, as long as that of the Gram matrices is the same. Where ΣG is singular (inputs that are always 0),
    what it does not determine is that of the mean, which the released inverse cannot do.

    Args:
      models: trees of one architecture.
      grams: one mapping a model, from the path of a kernel to G [D, D]: `jt.fusion.gram_matrices` collects them. A
        kernel [..., D axes, ...outputs] is read as a matrix of D rows, as Flax has it; paths begin below `params`.
      off_diagonal: in [0, 1]; 0.9 in the paper for most, 1 by default in the released code.

    Returns:
      A tree of the same structure and types. Batch statistics are to be renewed: `jt.fusion.renewed`.

    Raises:
      InputError: for a Gram matrix of no kernel, of another size or shape, or not finite; and for models of different
        architectures.
    """
    check_alike(as_list(models))
    check_share(off_diagonal, "off_diagonal")
    if len(grams) != len(models):
        raise InputError(f"expected the Gram matrices of each of {len(models)} models; got {len(grams)}")
    found = [{_below(path): np.asarray(gram, np.float64) for path, gram in own.items()} for own in grams]
    leaves = tree.leaves_by_path(models[0])
    paths = {_below(path): path for path in leaves}
    for number, own in enumerate(found):
        if own.keys() != found[0].keys():
            raise InputError(
                f"all models need Gram matrices of the same kernels; those of model {number} are of "
                f"{tree.listed(sorted(own))}, those of model 0 of {tree.listed(sorted(found[0]))}"
            )
        for path, gram in own.items():
            if path not in paths:
                raise InputError(f"grams has {path!r}, which is no leaf; there are {tree.listed(paths)}")
            _check_fits(gram, leaves[paths[path]].shape, path)
            if not np.all(np.isfinite(gram)):
                raise InputError(f"the Gram matrix of {path!r} of model {number} is not finite: has it diverged?")

    def combine(path: str, values: list[np.ndarray], _: Any) -> np.ndarray:
        mean = np.asarray(sum(double(value) for value in values) / len(values))
        if _below(path) not in found[0]:
            return mean
        shrunk = [_shrunk(own[_below(path)], off_diagonal) for own in found]
        rows = len(shrunk[0])
        away = sum(g @ (double(v) - mean).reshape(rows, -1) for g, v in zip(shrunk, values, strict=True))
        return mean + _solved(sum(shrunk), away).reshape(mean.shape)

    return fused(models, combine)


def gram(inputs: Any) -> np.ndarray:
    """Returns the mean of x xᵀ over all rows of inputs [..., D], a matrix [D, D] in double precision."""
    rows = np.asarray(inputs, np.float64)
    rows = rows.reshape(-1, rows.shape[-1])
    if not len(rows):
        raise InputError("a Gram matrix needs one row of inputs or more, got none")
    return rows.T @ rows / len(rows)


def _below(path: str) -> str:
    return path.removeprefix("params/")


def _check_fits(matrix: np.ndarray, shape: tuple[int, ...], path: str) -> None:
    sizes = [int(np.prod(shape[:axes])) for axes in range(1, len(shape))]
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) not in sizes:
        raise InputError(
            f"the Gram matrix of {path!r} must be [D, D], D the inputs of the kernel {list(shape)}; got "
            f"{list(matrix.shape)}"
        )


def _shrunk(matrix: np.ndarray, off_diagonal: float) -> np.ndarray:
    return off_diagonal * matrix + (1 - off_diagonal) * np.diag(np.diag(matrix))


def _solved(matrix: Any, right: Any) -> np.ndarray:
    """Returns matrix⁻¹ right; where the matrix is singular the shortest solution."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", scipy.linalg.LinAlgWarning)
            return scipy.linalg.solve(matrix, right, assume_a="pos")
    except (np.linalg.LinAlgError, scipy.linalg.LinAlgWarning):
        return np.linalg.pinv(matrix, rcond=1e-10, hermitian=True) @ right
