"""The scores of a classifier as a measure of an evaluation."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxtransfer.forward import Average, Forward, FrozenModel
from jaxtransfer.measures.class_scores import BINS, check_arguments, scores_of, sums_of
from jaxtransfer.measures.measure import Measure
from jaxtransfer.model import Model
from jaxtransfer.objective import view_of
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.outputs import pick


def classification(
    model: Model | FrozenModel | Average,
    *,
    view: str = "image",
    output: str = "logits",
    label: str = "label",
    bins: int = BINS,
    top: Sequence[int] = (5,),
    name: str = "scores",
) -> Measure:
    """Builds the scores of each class, the confusion matrix and the calibration of a classifier, for `jt.evaluate`.

        found = jt.evaluate(jt.classification(model), state, batches, measures=jt.measures.classification(model))
        print(found["scores"], found["scores"].recall, found["scores"].reliability.ece)

    It reads what `jt.classification` reads, and shares its run of the model. Rows with `mask` 0 do not count; others
    count once, whatever their weight.

    Args:
      model: what gives the logits [B, C].
      view: the entry of the batch that holds the inputs.
      output: the model's output that holds the logits.
      label: the entry of the batch that holds the labels, integers [B] or probabilities [B, C].
      bins: of the calibration error, of equal width.
      top: each k of top-k accuracy; those of C classes or more are left out.
      name: the entry of what `evaluate` returns.

    Returns:
      A measure whose result is a `ClassScores`.

    Raises:
      InputError: for bins or k that are none; in evaluation, for labels that are no classes, logits that are not finite
        and where nothing counts.
    """
    check_arguments(bins, top)
    forward = Forward.of(model, view)

    def of_batch(outputs, batch, ctx):
        logits = ctx.gather(pick(f"model {forward.model.name!r}", outputs[forward], output))
        mask, labels = mask_of(batch), ctx.gather(view_of(batch, (label,)))
        keep = jnp.ones(logits.shape[:1], bool) if mask is None else ctx.gather(mask) > 0
        return sums_of(logits, labels, keep, bins, tuple(top)), {}

    return Measure(name, (forward,), of_batch, lambda sums, rows: scores_of(sums))
