"""Supervised classification where each example has any number of labels."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Average, Forward, FrozenModel
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch, Objective, view_of
from jaxtransfer.parts.label_matrix import label_columns, label_matrix
from jaxtransfer.parts.learns import LABELS, Learns
from jaxtransfer.parts.masking import check_weight, mask_of, weights_of
from jaxtransfer.parts.outputs import pick
from jaxtransfer.parts.rows import kept


def multilabel_classification(
    model: Model | FrozenModel | Average,
    *,
    label_smoothing: float = 0.0,
    pos_weight: Any = None,
    view: str = "image",
    output: str = "logits",
    label: str | Sequence[str] = "label",
) -> Objective:
    """Builds (1/n) Σᵢ L(yᵢ, f(xᵢ; w)), L the mean binary cross-entropy of a sigmoid for each label; weighted as below.

    With weights mᵢ, the batch's `mask` [B] times its `weight` [B], it is Σᵢ mᵢ Lᵢ / Σᵢ mᵢ. The sums are over the global
    batch, in evaluation over all examples. See `jt.losses.binary_cross_entropy`.

    Reads `image` (or another `view`), `label` [B, L] of 0 and 1 or probabilities, `mask` and `weight`. Metrics:
    `multilabel_classification`; `binary_accuracy`, the share of right answers; `exact_match`, the share of examples all
    of whose answers are right, a label being there where its logit is above 0. Average precision needs all examples:
    `jt.evaluate(..., measures=jt.measures.multilabel_classification(model))`.

    Args:
      model: what gives `logits` [B, L].
      label_smoothing: ε in [0, 1): targets become (1−ε)·target + ε/2.
      pos_weight: of the positives of each label [L], finite and not negative; negatives / positives balances a label.
      view: the entry of the batch that holds the inputs.
      output: the model's output that holds the logits.
      label: the entry of the batch that holds the labels [B, L]; or several, each with one label [B], in their order.

    Returns:
      An objective over the model's parameters.

    Raises:
      InputError: for ε out of range, no label, and for what can be no weights; at init, for an unknown output, targets
        of another shape than the logits or outside of [0, 1], weights of another number of labels, and a `weight` of
        the batch that isn't [B], finite and not negative.
    """
    if not 0 <= label_smoothing < 1:
        raise InputError(f"label_smoothing must be in [0, 1); got {label_smoothing}")
    by_label = None if pos_weight is None else _label_weights(pos_weight)
    columns = label_columns(label)
    forward = Forward.of(model, view)
    name = forward.model.name

    def loss(outputs, params, state, batch, ctx):
        mask, weights = mask_of(batch), weights_of(batch, besides=(view, *columns))
        targets = jnp.asarray(label_matrix(batch, columns))
        given = pick(f"model {name!r}", outputs[forward], output)
        logits = kept(given, weights)  # of a row that does not count nothing reaches the gradient: 0 · NaN is NaN
        values = losses.binary_cross_entropy(logits, targets, label_smoothing=label_smoothing, pos_weight=by_label)
        value = ctx.mean(values, weights)
        right = losses.answers_right(jax.lax.stop_gradient(kept(given, mask)), targets)
        metrics = {
            "multilabel_classification": value,
            "binary_accuracy": ctx.mean(jnp.mean(right, axis=-1), mask),
            "exact_match": ctx.mean(jnp.min(right, axis=-1), mask),
        }
        return value.value, state, metrics

    def check(outputs, batch):
        _check_targets(name, pick(f"model {name!r}", outputs[forward], output).shape, batch, columns)
        check_weight(batch, besides=(view, *columns))

    learns = Learns(LABELS, output, columns)
    return Objective("multilabel_classification", (forward,), loss, check=check, pooled=True, learns=learns)


def _check_targets(model: str, shape: tuple[int, ...], batch: Batch, columns: tuple[str, ...]) -> None:
    given = [view_of(batch, (column,)) for column in columns]
    targets = label_matrix(batch, columns)
    label = columns[0] if len(columns) == 1 else columns
    if len(shape) != 2 or jnp.shape(targets) != shape:
        raise InputError(
            f"{label!r} must hold 0 or 1 for each label of model {model!r}, [batch, labels] {shape}; got "
            f"{jnp.shape(targets)}. One class per example is for jt.classification"
        )
    if any(isinstance(one, jax.Array) and not one.is_fully_addressable for one in given):
        return  # no process has them all
    known = [np.asarray(one, np.float64) for one in given]  # on the host: stacked by JAX they would be traced
    values = known[0] if len(known) == 1 else np.stack(known, axis=-1)
    values = values[np.asarray(batch.get("mask", np.ones(len(values)))) > 0]
    if not np.all(good := (values >= 0) & (values <= 1)):
        raise InputError(f"{label!r} must hold 0 or 1 for each label, or probabilities; got {values[~good][0]}")


def _label_weights(weight: Any) -> np.ndarray:
    try:
        known = np.asarray(weight, np.float64)
    except (TypeError, ValueError):
        raise InputError(f"pos_weight must be one number for each label; got {weight!r}") from None
    if known.ndim != 1 or not len(known) or not np.all(np.isfinite(known) & (known >= 0)):
        raise InputError(f"pos_weight must be one number for each label, finite and not negative; got {weight!r:.80}")
    return known
