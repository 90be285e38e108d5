"""The scores of a multi-label classifier as a measure of an evaluation."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.forward import Average, Forward, FrozenModel
from jaxtransfer.measures.label_scores import label_scores
from jaxtransfer.measures.measure import Measure
from jaxtransfer.model import Model
from jaxtransfer.parts.label_matrix import label_columns, label_matrix
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.outputs import pick


def multilabel_classification(
    model: Model | FrozenModel | Average,
    *,
    view: str = "image",
    output: str = "logits",
    label: str | Sequence[str] = "label",
    name: str = "scores",
) -> Measure:
    """Builds average precision and AUROC of each label, and their means, for `jt.evaluate`.

        measure = jt.measures.multilabel_classification(model)
        found = jt.evaluate(jt.multilabel_classification(model), state, batches, measures=measure)
        print(found["scores"].mean_average_precision, found["scores"].average_precision)

    Ranks are those among all examples, so all logits are held on the host, n · L numbers; nothing is binned.

    Args:
      model: what gives the logits [B, L].
      view: the entry of the batch that holds the inputs.
      output: the model's output that holds the logits.
      label: the entry of the batch that holds 0 or 1 for each label [B, L]; or several, each with one label [B].
      name: the entry of what `evaluate` returns.

    Returns:
      A measure whose result is a `LabelScores`.

    Raises:
      InputError: in evaluation, for targets besides 0 and 1, logits that are NaN, and where nothing counts.
    """
    columns = label_columns(label)
    forward = Forward.of(model, view)

    def of_batch(outputs, batch, ctx):
        logits, targets = pick(f"model {forward.model.name!r}", outputs[forward], output), label_matrix(batch, columns)
        if logits.ndim != 2 or logits.shape != jnp.shape(targets):
            raise InputError(
                f"expected logits and targets, 0 or 1 for each label, [batch, labels]; got {logits.shape} and "
                f"{jnp.shape(targets)}"
            )
        mask = mask_of(batch)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        rows = {"logits": logits, "targets": targets, "mask": jnp.ones(len(logits)) if mask is None else mask}
        return {}, {entry: ctx.gather(values) for entry, values in rows.items()}

    def result(sums, rows):
        return label_scores(rows["logits"], rows["targets"], mask=rows["mask"])

    return Measure(name, (forward,), of_batch, result)
