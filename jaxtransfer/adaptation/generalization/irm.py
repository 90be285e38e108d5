"""Invariant risk minimisation: one classifier on top of the features is to be optimal in every source domain."""

from collections.abc import Sequence

from jaxtransfer import losses
from jaxtransfer.adaptation.generalization.sources import Sources, told
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective


def irm(
    model: Model,
    *,
    domains: Sequence[str],
    output: str = "logits",
    view: str = "image",
    label: str = "label",
) -> Objective:
    """Builds (1/S) Σ_s ∂L_s/∂w · ∂L_s/∂w, IRMv1's penalty over S source domains: see `jt.losses.irm`.

    (Arjovsky et al. 2019, arXiv:1907.02893, in the released form: each domain's gradient in a dummy scale w = 1 of the
    logits, on two halves of its batch.) A penalty, to be added to the mean of the domains' cross-entropies:

        erm = sum(jt.classification(model).on(name) for name in names) / len(names)
        weight = jt.schedules.switch(1.0, 100.0, at=500)
        objective = jt.together(erm + weight * jt.adaptation.irm(model, domains=names))

    Those are the weights released in DomainBed, which also starts Adam afresh at the switch. The penalty is an estimate
    and may be negative.

    Args:
      model: what gives `logits` [B, C].
      domains: the entries of the batch that hold the domains' batches, two or more.
      output: the model's output that holds the logits.
      view: the entry of a domain's batch that holds the inputs.
      label: the one that holds the labels.

    Returns:
      An objective with the metric `irm`.

    Raises:
      InputError: for fewer than two domains; at init, for an output, a domain or labels that aren't there.
    """
    sources = Sources.of(model, domains, output=output, view=view, label=label)

    def loss(outputs, params, state, batch, ctx):
        rows = sources.rows(outputs, batch)
        penalties = [losses.irm(one.logits, one.labels, mask=one.weights, axis_name=ctx.axis) for one in rows]
        value = sum(penalties[1:], start=penalties[0]) / len(penalties)
        return value, state, {"irm": told(value, rows, ctx)}

    return Objective("irm", sources.forwards, loss, check=sources.check)
