"""A run and a data set that count the same classes otherwise: labels and heads by the names of the classes."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxtransfer as jt
from jaxtransfer import tree
from jaxtransfer.cli.runs import Run, build_model
from jaxtransfer.data.classes import Places, match_classes, not_among
from jaxtransfer.errors import InputError


def labelled_as(run: Run, dataset: jt.data.Dataset, directory: Path | str) -> jt.data.Dataset:
    """Returns the data set with the labels of a run: each class the one of its name.

    Raises:
      InputError: names a class that the run doesn't know, or says that names don't tell.
    """
    known = run.config["class_names"]
    try:
        found = match_classes(dataset.class_names, known, of=dataset.name, whose=str(directory))
        labelled = dataset.as_classes(known, whose=str(directory))
    except InputError as error:
        raise InputError(
            f"{directory} knows {len(known)} classes, {dataset.name} has {dataset.classes}; finetune it on "
            f"{dataset.name} first: {error}"
        ) from None
    _warn_of_numbers(found, known, dataset, directory)
    if dataset.classes < len(known):
        warnings.warn(
            f"{dataset.name} has {dataset.classes} of the {len(known)} classes of {directory}: only those occur, and "
            f"predictions are among all {len(known)}",
            stacklevel=2,
        )
    return labelled


def places_in(run: Run, dataset: jt.data.Dataset, directory: Path | str) -> Places:
    """Returns where the classes of a data set stand among those of a run.

    Raises:
      InputError: names a class that the run doesn't know, or says that names don't tell.
    """
    known = run.config["class_names"]
    found = match_classes(dataset.class_names, known, of=dataset.name, whose=str(directory))
    for label in np.flatnonzero(found.places < 0):
        raise not_among(dataset.class_names[label], known, of=dataset.name, whose=str(directory))
    return found


def with_classes_of(run: Run, dataset: jt.data.Dataset, directory: Path | str, found: Places) -> Run:
    """Returns the run with outputs for the classes of a data set alone, in their order, `found` by `places_in`."""
    known = run.config["class_names"]
    _warn_of_numbers(found, known, dataset, directory)
    if found.same:
        return run
    if dataset.classes < len(known):
        warnings.warn(
            f"of the {len(known)} classes of {directory}, the {dataset.classes} of {dataset.name} are used",
            stacklevel=2,
        )
    config = {**run.config, "class_names": list(dataset.class_names)}
    params = pick_classes(run.config, run.params[run.model.name], found.places)
    model = build_model(config)
    return run._replace(config=config, model=model, params={**run.params, model.name: params})


def pick_classes(config: dict[str, Any], values: Any, places: np.ndarray) -> Any:
    """Returns the parameters of a run's model, or values like them, for the classes `places` of its own.

    Which axis counts the classes shows where the shapes of the same model with one class more differ.
    """
    names = config["class_names"]
    shapes = [_shapes({**config, "class_names": more}) for more in (names, [*names, "one more"])]

    def picked(path: str, leaf: Any) -> Any:
        for axis, (size, larger) in enumerate(zip(*(one[path].shape for one in shapes), strict=True)):
            if size != larger:
                leaf = np.take(np.asarray(leaf), places, axis=axis)
        return leaf

    return jax.tree_util.tree_map_with_path(lambda path, leaf: picked(tree.path_of(path), leaf), values)


def _shapes(config: dict[str, Any]) -> dict[str, Any]:
    image = jax.ShapeDtypeStruct((1, *config["image_shape"]), np.uint8)
    return tree.leaves_by_path(jax.eval_shape(build_model(config).init, jax.random.key(0), image)["params"])


def _warn_of_numbers(found: Places, known: Sequence[str], dataset: jt.data.Dataset, directory: Path | str) -> None:
    """Says that numbers decided which class is which."""
    if found.by_number:
        place, theirs = int(found.places[0]), dataset.class_names[0]
        warnings.warn(
            f"class {place} is {known[place]!r} in {directory} and {theirs!r} in {dataset.name}", stacklevel=3
        )
