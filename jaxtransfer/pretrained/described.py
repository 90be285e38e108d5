"""What leaves the library: a model, its weights, and what is known of them, wherever they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtransfer import models, tree
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.parts.learns import CLASSES, LABELS
from jaxtransfer.pretrained.load import Pretrained
from jaxtransfer.pretrained.preprocessing import Preprocessing
from jaxtransfer.runs.deltas import folded
from jaxtransfer.runs.load import Run, load_run

Exportable = str | Path | Run | Pretrained | tuple[Model, Mapping[str, Any]]


class Described(NamedTuple):
    """A model with its weights, and what is known of them.

    Attributes:
      name: for errors.
      model: the model.
      variables: its weights and statistics, complete.
      preprocessing: what its images become; None where nothing says it.
      image_shape: (H, W, C) of its images; None where nothing says it.
      class_names: of its outputs; empty where nothing says it.
      classes: whether its logits are of classes that it has learned.
      step: of the run; None where it is none.
      labels: whether its logits are of labels, any number of which hold together: their probabilities are sigmoids.
    """

    name: str
    model: Model
    variables: Mapping[str, Any]
    preprocessing: Preprocessing | None
    image_shape: tuple[int, int, int] | None
    class_names: tuple[str, ...]
    classes: bool = True
    step: int | None = None
    labels: bool = False

    @property
    def leaves(self) -> dict[str, np.ndarray]:
        """Parameters and batch statistics by path, `params/head/kernel`.

        Raises:
          InputError: for a model with a frozen part: its weights are not all of it.
        """
        if self.model.frozen:
            raise InputError(f"{self.name}: a part of the model is frozen, which names of tensors don't show")
        leaves = tree.leaves_by_path({kind: self.variables[kind] for kind in self.variables if kind != "frozen"})
        return {path: np.asarray(leaf) for path, leaf in jax.device_get(leaves).items()}

    def entries(self) -> dict[str, Any]:
        """Returns what is known as plain data, for JSON."""
        return {
            "network": models.describe(self.model),
            "image_shape": None if self.image_shape is None else list(self.image_shape),
            "preprocessing": None if self.preprocessing is None else self.preprocessing.as_entries(),
            "class_names": list(self.class_names),
            "step": self.step,
            **({"labels": True} if self.labels else {}),
        }


def describe(source: Exportable) -> Described:
    """Returns what is to leave the library, with all that is known of it.

    Args:
      source: a run directory, a `Run`, what `load_pretrained` gave, or a pair (model, variables).

    Raises:
      InputError: for anything else, and where a run can't be read.
    """
    if isinstance(source, str | Path):
        source = load_run(source)
    if isinstance(source, Run):
        source = folded(source)
        shape, mean, std = source.preprocessing
        size = None if shape is None else (shape[0], shape[1])
        known = Preprocessing(size, source.resizing.crop, mean, std, source.resizing.interpolation)
        variables = source.model.complete(source.variables)
        learned, labels = CLASSES in source.knows, LABELS in source.knows
        name = f"the run {source.directory}"
        return Described(name, source.model, variables, known, shape, source.class_names, learned, source.step, labels)
    if isinstance(source, Pretrained):
        known = source.preprocessing
        shape = None if known is None else known.image_shape
        learned = not any(tree.matches(path, source.model.head) for path in source.report.fresh)
        name, names = source.report.source, source.class_names
        return Described(name, source.model, source.variables, known, shape, names, learned, labels=source.labels)
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Model):
        model, variables = source
        if not isinstance(variables, Mapping) or "params" not in variables:
            raise InputError('expected (model, variables) with {"params": ..., "batch_stats": ...} for variables')
        return Described(f"model {model.name!r}", model, model.complete(variables), None, None, ())
    raise InputError(
        f"expected a run directory, a Run, what load_pretrained gave, or (model, variables); got a "
        f"{type(source).__name__}"
    )
