"""Supervised classification."""

from typing import Any

import jax
import numpy as np

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Average, Forward, FrozenModel
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch, Mean, Objective, view_of
from jaxtransfer.parts.learns import CLASSES, Learns
from jaxtransfer.parts.masking import check_weight, mask_of, weights_of
from jaxtransfer.parts.outputs import pick
from jaxtransfer.parts.rows import kept


def classification(
    model: Model | FrozenModel | Average,
    *,
    label_smoothing: float = 0.0,
    view: str = "image",
    output: str = "logits",
    label: str = "label",
    weight: Any = None,
) -> Objective:
    """Builds (1/n) Σᵢ L(yᵢ, f(xᵢ; w)) with cross-entropy as L; with weights Σᵢ mᵢ Lᵢ / Σᵢ mᵢ v(yᵢ).

    There Lᵢ = −Σ_c v_c q_ic log softmax(f(xᵢ))_c, q = (1−ε)·target + ε/C, and v(y) = Σ_c v_c target_c are the weights v
    of the classes (`weight=`), and mᵢ those of the examples: the batch's `mask` [B] times its `weight` [B], where it
    has them. It is the weighted mean of PyTorch's `cross_entropy(weight=, label_smoothing=)`, in which smoothing
    reaches the numerator alone; for probabilities as labels, which PyTorch divides by n, it divides by their weights,
    so that one-hot rows and integers agree. The sums are over the global batch, in evaluation over all examples; where
    all weights of a batch are 0 the loss is 0.

    Reads `image` (or another `view`), `label` (integers [B] or probabilities [B, C], as mixup makes them), `mask` and
    `weight`. Metrics: `classification`, `accuracy`, and `top5` where there are more than five classes; scores are of
    the examples that the mask keeps, whatever their weight. Several heads or columns of labels are several terms, each
    with a name of its own, or the metrics collide:

        color = jt.classification(net, output="color", label="color").named("color")
        shape = jt.classification(net, output="shape", label="shape").named("shape")
        objective = color + shape  # one run of the model; color, color/accuracy, shape, shape/accuracy

    Args:
      model: what gives `logits` [B, C].
      label_smoothing: ε in [0, 1).
      view: the entry of the batch that holds the inputs.
      output: the model's output that holds the logits.
      label: the entry of the batch that holds the labels.
      weight: v, one number for each class [C], finite, not negative, not all 0; n / (C · n_c) balances classes.

    Returns:
      An objective over the model's parameters.

    Raises:
      InputError: for ε out of range and for what can be no weights; at init, for an unknown output, labels that the
        model has no class for, weights of another number of classes, and a `weight` of the batch that isn't [B],
        finite and not negative.
    """
    if not 0 <= label_smoothing < 1:
        raise InputError(f"label_smoothing must be in [0, 1); got {label_smoothing}")
    by_class = None if weight is None else _class_weights(weight)
    forward = Forward.of(model, view)
    name = forward.model.name

    def loss(outputs, params, state, batch, ctx):
        mask, weights = mask_of(batch), weights_of(batch, besides=(view, label))
        labels = view_of(batch, (label,))
        given = pick(f"model {name!r}", outputs[forward], output)
        logits = kept(given, weights)  # of a row that does not count nothing reaches the gradient: 0 · NaN is NaN
        values = losses.cross_entropy(logits, labels, label_smoothing=label_smoothing, weight=by_class)
        value = ctx.mean(values, weights)
        if by_class is not None:
            value = Mean(value.total, ctx.mean(losses.class_weights(logits, labels, by_class), weights).total)
        shown = jax.lax.stop_gradient(kept(given, mask))
        metrics = {"classification": value, "accuracy": ctx.mean(losses.top_k(shown, labels), mask)}
        if logits.shape[-1] > 5:
            metrics["top5"] = ctx.mean(losses.top_k(shown, labels, k=5), mask)
        return value.value, state, metrics

    def check(outputs, batch):
        check_labels(name, pick(f"model {name!r}", outputs[forward], output).shape[-1], batch, label)
        check_weight(batch, besides=(view, label))

    learns = Learns(CLASSES, output, (label,))
    return Objective("classification", (forward,), loss, check=check, pooled=True, learns=learns)


def check_labels(model: str, classes: int, batch: Batch, label: str = "label") -> None:
    """Raises where a counted integer label of a batch is none of the model's classes."""
    labels = view_of(batch, (label,))
    if isinstance(labels, jax.Array) and not labels.is_fully_addressable:
        return  # no process has them all
    labels = np.asarray(labels)  # one on a device would be compared inside of the trace
    if not np.issubdtype(labels.dtype, np.integer):
        return
    counted = np.asarray(batch.get("mask", np.ones(labels.shape))) > 0
    wrong = labels[counted & ((labels < 0) | (labels >= classes))]
    if wrong.size:
        what = "labels" if label == "label" else f"labels of {label!r}"
        raise InputError(
            f"{what} must be in [0, {classes}), the classes of model {model!r}; got {wrong[0]}. Build the model with "
            f"as many classes as the data have"
        )


def _class_weights(weight: Any) -> np.ndarray:
    try:
        known = np.asarray(weight, float)
    except (TypeError, ValueError):
        raise InputError(f"weight must be one number for each class; got {weight!r}") from None
    with np.errstate(over="ignore", under="ignore"):
        single = known.astype(np.float32)  # what is 0 or infinite there is no weight of a program
    if known.ndim != 1 or not np.all(np.isfinite(single) & (known >= 0)) or not np.any(single > 0):
        raise InputError(
            f"weight must be one number for each class [C], finite, not negative, not all 0; got {weight!r}. Weights "
            f"of examples are a column 'weight' of the batch"
        )
    return known
