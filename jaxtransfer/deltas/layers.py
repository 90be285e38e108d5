"""Which parameters make a layer: a kernel or a norm's scale, and the bias beside it."""

import dataclasses

from jaxtransfer import tree
from jaxtransfer.deltas.part import matrices, some
from jaxtransfer.deltas.weight import KERNELS, Layout, Weight, Weights

BIASES = ("bias", "b")


def is_bias(path: str) -> bool:
    """Returns whether a parameter is a layer's bias."""
    return path.split("/")[-1] in BIASES


def is_scale(path: str, weight: Weight) -> bool:
    """Returns whether a parameter is the scale of a norm: of one axis, by its name."""
    return len(weight.shape) == 1 and path.split("/")[-1] in ("scale", "weight")


def bias_of(path: str, weights: Weights) -> str | None:
    """Returns the path of the bias beside a kernel or a scale; None where there is none."""
    above = path.rpartition("/")[0]
    return next((p for name in BIASES if (p := f"{above}/{name}" if above else name) in weights), None)


def kernels_and_biases(weights: Weights, only: tree.Patterns | None, as_matrix: Layout | None) -> dict[str, Weight]:
    """Chooses kernels, and the bias beside each of them."""
    return _with_biases(matrices(weights, only, as_matrix), weights)


def layers(weights: Weights, only: tree.Patterns | None, as_matrix: Layout | None) -> dict[str, Weight]:
    """Chooses kernels and scales of norms, and the bias beside each of them."""
    scales = {
        path: dataclasses.replace(weight, inputs=())
        for path, weight in weights.items()
        if is_scale(path, weight) and (only is None or tree.matches(path, only))
    }
    names = tree.as_patterns(only) if only is not None else ()
    rest = [p for p, w in weights.items() if (only is None or tree.matches(p, names)) and len(w.shape) > 1]
    found = matrices(weights, only, as_matrix) if _any_kernel(rest, only) or not scales else {}
    return _with_biases({**found, **scales}, weights)


def biases(weights: Weights, only: tree.Patterns | None, as_matrix: Layout | None) -> dict[str, Weight]:
    """Chooses all biases, of layers and of norms."""
    found = {p: w for p, w in weights.items() if is_bias(p) and (only is None or tree.matches(p, only))}
    return some(found, weights, only, "no bias")


def norms(weights: Weights, only: tree.Patterns | None, as_matrix: Layout | None) -> dict[str, Weight]:
    """Chooses the scales and biases of norms."""
    above = {path.rpartition("/")[0] for path, weight in weights.items() if is_scale(path, weight)}
    found = {
        path: weight
        for path, weight in weights.items()
        if path.rpartition("/")[0] in above
        and (is_scale(path, weight) or is_bias(path))
        and (only is None or tree.matches(path, only))
    }
    return some(found, weights, only, "no norm")


def _any_kernel(paths: list[str], only: tree.Patterns | None) -> bool:
    return any((path.split("/")[-1] in KERNELS) if only is None else not is_bias(path) for path in paths)


def _with_biases(found: dict[str, Weight], weights: Weights) -> dict[str, Weight]:
    beside = [bias for path in found if (bias := bias_of(path, weights)) is not None]
    return {**found, **{path: weights[path] for path in beside}}
