"""Translated weights and the leaves of a model held against each other: adapted, left fresh, or told of."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtransfer import models, tree
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.models.recipe import as_arguments
from jaxtransfer.pretrained import adapt
from jaxtransfer.pretrained.layouts import Shapes
from jaxtransfer.pretrained.match import Match
from jaxtransfer.pretrained.schemes.own import OWN
from jaxtransfer.pretrained.source import Source

_FREE = ("classes", "dtype", "param_dtype", "dropout", "vocabulary", "positions", "pooling", "normalized")
"""Options that may differ: of the head and of training, of types, and those that are looked at elsewhere."""


class Fit(NamedTuple):
    """What goes where.

    Attributes:
      values: by path.
      adapted: what changed, by path.
      fresh: why a leaf stays as initialised, by path.
      left: why a tensor is left behind, by name.
      columns: of leaves that were mapped by class name: for each output whether it is the weights'.
    """

    values: dict[str, np.ndarray]
    adapted: dict[str, str]
    fresh: dict[str, str]
    left: dict[str, str]
    columns: dict[str, list[bool]]


def shape_of(model: Model, inputs: Any) -> Any:
    """Returns the shapes of the inputs that a model is laid out for.

    Args:
      model: the network.
      inputs: a batch, its shapes, or None.

    Raises:
      InputError: for None, where the model is not of the zoo.
    """
    if inputs is not None:
        if bad := [x for x in jax.tree.leaves(inputs) if not (hasattr(x, "shape") and hasattr(x, "dtype"))]:
            raise InputError(
                f"inputs= is a batch of inputs, or its shape and type, jax.ShapeDtypeStruct((1, 8), jnp.float32); got "
                f"{inputs!r:.60}, in which {bad[0]!r:.40} is no array"
            )
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    described = models.describe(model)
    if described is None:
        raise InputError(f"model {model.name!r} is not of the zoo: pass inputs=, a batch or its jax.ShapeDtypeStruct")
    row = models.ZOO[described["model"]]
    return jax.ShapeDtypeStruct((1, 1), row.dtype) if row.takes_text else row.inputs(1)  # weights are of any length


def without(tensors: Mapping[str, Any], ignore: tree.Patterns) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the tensors that no pattern selects, and the names of the others with the reason.

    Args:
      tensors: by name, words between dots or slashes.
      ignore: the patterns.
    """
    paths = {name: name.replace(".", "/") for name in tensors}
    tree.check_used(ignore, paths.values(), "ignore")
    out = {name: "ignored" for name, path in paths.items() if tree.matches(path, ignore)}
    return {name: value for name, value in tensors.items() if name not in out}, out


def check_heads(source: Source, matched: Match, shapes: Shapes) -> tuple[str, ...]:
    """Returns a note where neither the weights' shapes nor what stands beside them say how many heads attention has.

    Args:
      source: the weights.
      matched: the weights, as the scheme reads them.
      shapes: of the model's leaves, which are split into heads.

    Raises:
      InputError: where they say that they have another number than the model.
    """
    path = next((path for path in shapes if path.endswith("attention/query/bias")), "")
    if path not in matched.names:
        return ()
    ours, theirs = shapes[path][0], source.facts.heads
    if theirs not in (None, ours):
        raise InputError(f"{source.name} has {theirs} attention heads, the model {ours}; make it so")
    flat = source.tensors[matched.names[path]].ndim == 1
    return (f"heads: nothing says how many the weights have; the model has {ours}",) if flat and not theirs else ()


def check_options(source: Source, model: Model) -> None:
    """Raises where weights are of a network with options that no shape shows, and the model has others.

    Args:
      source: the weights.
      model: whose leaves they fit.
    """
    if source.facts.differs:
        raise InputError(f"{source.name} has {source.facts.differs}: the model would give something else in silence")
    network, recipe = source.facts.network, model.recipe
    if network is None or recipe is None or network.get("model") not in models.ZOO:
        return
    try:
        theirs = models.create(network["model"], 2, **as_arguments(network.get("model_options") or {})).recipe
    except (InputError, TypeError, ValueError):  # options of another version: nothing tells
        return
    if theirs is None or theirs.build != recipe.build:
        return
    pairs = {name: (value, recipe.arguments.get(name, value)) for name, value in theirs.arguments.items()}
    other = {name: pair for name, pair in pairs.items() if name not in _FREE and pair[0] != pair[1]}
    if other:
        theirs, ours = (", ".join(f"{name}={pair[which]!r}" for name, pair in other.items()) for which in (0, 1))
        raise InputError(
            f"{source.name} is of a network with {theirs}, the model has {ours}, and would give something else in "
            f"silence; make it so"
        )


def fit(
    matched: Match,
    shapes: Shapes,
    inputs: Any,
    reinit: tree.Patterns,
    class_names: Sequence[str],
    source_class_names: Sequence[str],
    size: tuple[int, int] | None,
) -> Fit:
    """Returns what goes where, as far as it fits.

    Args:
      matched: the weights.
      shapes: of the model's leaves.
      inputs: shapes of the inputs.
      reinit: patterns of leaves that stay fresh.
      class_names: of the model's outputs, to map the head by.
      source_class_names: of the weights'.
      size: (H, W) of the images that the weights were trained on; None where it isn't known.

    Raises:
      InputError: for a pattern that selects nothing, and for class names that don't count the outputs.
    """
    tree.check_used(reinit, shapes.keys() | matched.values.keys(), "reinit")
    out = Fit({}, {}, {path: "reinit" for path in shapes if tree.matches(path, reinit)}, {}, {})
    for path, value in matched.values.items():
        if tree.matches(path, reinit):
            out.left[matched.names[path]] = "reinit"
            continue
        if class_names and path.endswith(("head/kernel", "head/bias")) and path in shapes:
            value, mapped = _by_name(value, shapes[path], class_names, source_class_names)
            out.columns[path] = mapped
            out.adapted[path] = f"{sum(mapped)} of {len(mapped)} classes by name"
        elif path in shapes and (value.shape != shapes[path] or path.endswith("stem_position")):
            value, how = _adapted(path, value, shapes, inputs, size, matched.scheme is OWN)
            if how:
                out.adapted[path] = how
        out.values[path] = value
    return out


def fill(values: np.ndarray, drawn: np.ndarray, columns: Sequence[bool]) -> None:
    """Writes fresh values into the outputs of a head that the weights don't have.

    Args:
      values: the leaf [..., C], changed.
      drawn: a fresh one.
      columns: for each output whether it is the weights'.
    """
    fresh = np.flatnonzero(~np.asarray(columns))
    values[..., fresh] = drawn[..., fresh]


def check(
    found: Fit, matched: Match, shapes: Shapes, tensors: Mapping[str, np.ndarray], source: str, model: str
) -> None:
    """Raises where something doesn't fit, with the scheme that is closest and what it leaves over.

    Args:
      found: what fits.
      matched: the weights, as the scheme reads them.
      shapes: of the model's leaves.
      tensors: the weights, by name.
      source: its name.
      model: its name.
    """
    wanted = {path: shape for path, shape in shapes.items() if path not in found.fresh}
    missing = [f"{path} {shape}" for path, shape in wanted.items() if path not in found.values]
    astray = [matched.names[path] for path in found.values if path not in shapes]
    over = [f"{name} {tensors[name].shape}" for name in dict.fromkeys([*matched.unknown, *astray])]
    other = [
        f"{path}: expected {shape}, got {found.values[path].shape}"
        for path, shape in wanted.items()
        if path in found.values and found.values[path].shape != shape
    ]
    if not (missing or over or other):
        return
    told = [
        f"{len(items)} {what}: {tree.listed(items, limit=6)}"
        for what, items in (("left over", over), ("missing", missing), ("of another shape", other))
        if items
    ]
    fits = len(wanted) - len(missing) - len(other)
    heads = all("head" in text for text in (*missing, *other)) and not over
    remedy = "start the head afresh, reinit='head'" if heads else "choose the network that they were trained in"
    raise InputError(
        f"the weights ({source}) don't fit model {model!r}: the closest scheme is {matched.scheme.name}, by which "
        f"{fits} of {len(wanted)} leaves fit; {'; '.join(told)}. To go on, {remedy}"
        + ("" if heads else ", or name what to leave in ignore= and what to start afresh in reinit=")
    )


def _by_name(value, shape, class_names, source_class_names):
    for what, names, outputs in (
        ("class_names", class_names, shape[-1]),
        ("source_class_names", source_class_names, value.shape[-1]),
    ):
        if len(names) != outputs:
            raise InputError(f"expected {what} of {outputs} outputs, to map the head by name; got {len(names)}")
    rows = adapt.rows_by_name(class_names, source_class_names)
    picked = value[..., [0 if row is None else row for row in rows]]
    return picked, [row is not None for row in rows]


def _adapted(
    path: str, value: np.ndarray, shapes: Shapes, inputs: Any, size: tuple[int, int] | None, own: bool
) -> tuple[np.ndarray, str]:
    """Returns a value brought to the model's shape and how, or as it is and "" where nothing does it."""
    shape = shapes[path]
    if path.endswith(("stem_positions", "stem_words/embedding")) and value.ndim == 2 and value.shape[1] == shape[1]:
        return _of_texts(path, value, shape[0])
    if path.endswith("stem_position") and value.ndim == 3 and value.shape[::2] == shape[::2]:
        patch = shapes[path.removesuffix("stem_position") + "stem_conv/kernel"][:2]
        ours, count = _grid(inputs.shape[1:3], patch), value.shape[1] - 1
        theirs = _grid(size, patch) if size else ours if own else (0, 0)
        if math.prod(theirs) != count:  # not known: a square, where it can be one
            theirs = ours if math.prod(ours) == count and math.isqrt(count) ** 2 != count else adapt.square(value)
        if theirs == ours:
            return value, ""
        how = f"interpolated from {theirs[0]}×{theirs[1]} to {ours[0]}×{ours[1]}"
        return adapt.positions(value, ours, theirs), how
    if (
        path.endswith("stem_conv/kernel")
        and value.ndim == 4
        and value.shape[:2] + value.shape[3:] == (*shape[:2], shape[3])
    ):
        return adapt.stem(value, shape[2]), f"from {value.shape[2]} to {shape[2]} channels"
    return value, ""


def _of_texts(path: str, value: np.ndarray, rows: int) -> tuple[np.ndarray, str]:
    """Returns the first positions of a text encoder's, where the model's texts are shorter; no word is left out."""
    if path.endswith("stem_positions") and rows < len(value):
        return value[:rows], f"the first {rows} of {len(value)} positions"
    name = "positions" if path.endswith("stem_positions") else "vocabulary"
    raise InputError(f"the weights have {name} of {len(value)}, the model of {rows}; make it {name}={len(value)}")


def _grid(sides: Sequence[int], patch: Sequence[int]) -> tuple[int, int]:
    """Returns the (rows, columns) of patches of an image."""
    rows, columns = (side // size for side, size in zip(sides, patch, strict=True))
    return rows, columns
