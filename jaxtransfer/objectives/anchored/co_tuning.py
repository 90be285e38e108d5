"""Co-Tuning: the source's head is trained along, on what the target's classes are in the source's."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward
from jaxtransfer.losses._numerics import check_strength
from jaxtransfer.model import Model
from jaxtransfer.objective import Mean, Objective, view_of
from jaxtransfer.objectives.supervised.classification import check_labels
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.outputs import pick
from jaxtransfer.parts.rows import kept


def co_tuning(
    model: Model,
    relationship: Any,
    *,
    strength: float = 2.3,
    output: str = "source",
    view: str = "image",
    label: str = "label",
) -> Objective:
    """Builds strength · (1/n) Σᵢ KL(p(s | yᵢ) ‖ softmax(g(xᵢ))), g the pretrained head on the features that train.

    (You et al. 2020, NeurIPS; 2.3 is the authors' strength.) The model has two heads: a new one for the target and,
    in `output`, the pretrained one. `jt.models.with_heads(net, source=jt.models.head(10, batch_norm=False))` adds it;
    its weights are `{"dense1": <the pretrained head>}`.

        both = jt.models.with_heads(net, source=jt.models.head(10, batch_norm=False))
        objective = jt.classification(both) + jt.co_tuning(both, jt.methods.direct_relationship(logits, labels, 100))

    Args:
      model: what trains, with both heads.
      relationship: p(s | y) [C, S]: `jt.methods.direct_relationship`, `jt.methods.reverse_relationship`.
      strength: λ of the paper.
      output: the model's output that is g [B, S].
      view: the entry of the batch that the model sees.
      label: the entry that holds the target's labels, integers [B] or probabilities [B, C].

    Returns:
      An objective with the metric `co_tuning`.

    Raises:
      InputError: for a strength that is negative or not finite and a relationship whose rows are no probabilities; at
        init, for an output of another size and labels out of range.
    """
    check_strength(strength)
    known = np.asarray(relationship, np.float32)
    if known.ndim != 2 or not np.all(known >= 0) or not np.allclose(known.sum(1), 1, atol=1e-3):
        raise InputError(
            f"the relationship is p(s | y) [C, S], rows of probabilities that sum to 1; got shape {known.shape}"
            + (f", sums from {known.sum(1).min():.4g} to {known.sum(1).max():.4g}" if known.ndim == 2 else "")
        )
    forward = Forward.of(model, view)

    def term(outputs, params, state, batch, ctx):
        mask, labels = mask_of(batch), view_of(batch, (label,))
        logits = kept(pick(f"model {model.name!r}", outputs[forward], output), mask)
        mean = ctx.mean(strength * losses.co_tuning(logits, labels, jnp.asarray(known)), mask)
        return mean.value, state, {"co_tuning": Mean(mean.total, mean.count)}

    def check(outputs, batch):
        shape = pick(f"model {model.name!r}", outputs[forward], output).shape
        if len(shape) != 2 or shape[1] != known.shape[1]:
            raise InputError(
                f"output {output!r} of model {model.name!r} has shape {shape}; the relationship {known.shape} is to "
                f"{known.shape[1]} classes of the source"
            )
        check_labels(model.name, known.shape[0], batch, label)

    return Objective("co_tuning", (forward,), term, check=check)
