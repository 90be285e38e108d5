"""Supervised classification."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward, FrozenModel
from jaxtransfer.masks import mask_of
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch, Objective, view_of


def classification(model: Model | FrozenModel, *, label_smoothing: float = 0.0, view: str = "image") -> Objective:
    """Builds (1/n) Σᵢ L(yᵢ, f(xᵢ; w)) with cross-entropy as L.

    Reads `image` (or another `view`) and `label` (integers [B] or probabilities [B, C], as mixup makes them) and, where
    there is one, `mask` [B]. Metrics: `classification`, `accuracy`, and `top5` where there are more than five classes.

    Args:
      model: what gives `logits` [B, C].
      label_smoothing: ε in [0, 1): the targets are (1−ε)·label + ε/C.
      view: the entry of the batch that holds the inputs.

    Returns:
      An objective over the model's parameters.

    Raises:
      InputError: for ε out of range; at init, for labels that the model has no class for.
    """
    if not 0 <= label_smoothing < 1:
        raise InputError(f"label_smoothing must be in [0, 1); got {label_smoothing}")
    forward = Forward.of(model, view)

    def loss(outputs, params, state, batch, ctx):
        logits, labels, mask = outputs[forward]["logits"], view_of(batch, ("label",)), mask_of(batch)
        if mask is not None:  # what a row that does not count holds must not reach the gradient either: 0 · NaN is NaN
            logits = jnp.where(mask[:, None] > 0, logits, 0)
        value = ctx.mean(losses.cross_entropy(logits, labels, label_smoothing=label_smoothing), mask)
        metrics = {"classification": value, "accuracy": ctx.mean(losses.top_k(logits, labels), mask)}
        if logits.shape[-1] > 5:
            metrics["top5"] = ctx.mean(losses.top_k(logits, labels, k=5), mask)
        return value.value, state, metrics

    def check(outputs, batch):
        check_labels(forward.model.name, outputs[forward]["logits"].shape[-1], batch)

    return Objective("classification", (forward,), loss, check=check)


def check_labels(model: str, classes: int, batch: Batch) -> None:
    """Raises where a counted integer label of a batch is none of the model's classes."""
    labels = view_of(batch, ("label",))
    if isinstance(labels, jax.Array) and not labels.is_fully_addressable:
        return  # no process has them all
    labels = np.asarray(labels)  # one on a device would be compared inside of the trace
    if not np.issubdtype(labels.dtype, np.integer):
        return
    counted = np.asarray(batch.get("mask", np.ones(labels.shape))) > 0
    wrong = labels[counted & ((labels < 0) | (labels >= classes))]
    if wrong.size:
        raise InputError(
            f"labels must be in [0, {classes}), the classes of model {model!r}; got {wrong[0]}. Build the model with "
            f"as many classes as the data have"
        )
