"""Annealing of the training signal: labelled examples that are learned well enough for now are left out."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward
from jaxtransfer.model import Model
from jaxtransfer.objective import Mean, Objective, view_of
from jaxtransfer.objectives.supervised.classification import check_labels
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.outputs import pick
from jaxtransfer.parts.rows import kept
from jaxtransfer.terms import Weight


def signal_annealing(
    model: Model, threshold: Weight, *, output: str = "logits", view: str = "image", label: str = "label"
) -> Objective:
    """Builds Σ 1[p_y(x) ≤ η_t] · CE(y, f(x)) / max(1, Σ 1[p_y(x) ≤ η_t]): cross-entropy that doesn't overfit.

    The annealing of the training signal in UDA (Xie et al. 2020, arXiv:1904.12848), for few labels beside many
    unlabelled examples: η rises from 1/C to 1 over the run, and a labelled example whose class has a larger
    probability already is left out. With a mask of weights the count is theirs. It stands in place of
    `jt.classification(model).on("source")`:

        rises = jt.schedules.exp_ramp(1 / classes, 1.0, steps)
        objective = jt.adaptation.signal_annealing(model, rises).on("source") + jt.adaptation.uda(model)

    Args:
      model: what trains.
      threshold: η, a number or a schedule of the step.
      output: the model's output that holds the logits [B, C].
      view: the entry of the batch that the model sees.
      label: the entry of the batch with the labels, integers [B].

    Returns:
      An objective with the metrics `signal_annealing`, `signal_annealing/kept` and `accuracy`.

    Raises:
      InputError: for what is no number nor a schedule; at init, for labels that the model has no class for.
    """
    if not callable(threshold) and not 0 <= threshold <= 1:
        raise InputError(f"threshold is a probability or a schedule of the step; got {threshold}")
    forward = Forward.of(model, view)

    def loss(outputs, params, state, batch, ctx):
        mask, labels = mask_of(batch), view_of(batch, (label,))
        logits = kept(pick(f"model {model.name!r}", outputs[forward], output), mask)
        values = losses.cross_entropy(logits, labels)
        limit: Any = threshold(ctx.step) if callable(threshold) else threshold
        keep = jax.lax.stop_gradient(jnp.exp(-values) <= limit).astype(values.dtype)
        share = ctx.mean(keep, mask)
        total = ctx.mean(values * keep, mask).total
        value = Mean(total, jnp.maximum(share.total, 1))
        metrics = {"signal_annealing": value, "signal_annealing/kept": share}
        return value.value, state, metrics | {"accuracy": ctx.mean(losses.top_k(logits, labels), mask)}

    def check(outputs, batch):
        check_labels(model.name, pick(f"model {model.name!r}", outputs[forward], output).shape[-1], batch, label)

    return Objective("signal_annealing", (forward,), loss, check=check)
