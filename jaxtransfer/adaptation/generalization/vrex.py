"""Risk extrapolation: no source domain's loss is to differ from the others'."""

import dataclasses
from collections.abc import Sequence

from jaxtransfer import losses
from jaxtransfer.adaptation.generalization.sources import check_objectives, told_of, values_of
from jaxtransfer.objective import Objective


def vrex(terms: Sequence[Objective], *, name: str = "vrex") -> Objective:
    """Builds (1/S) Σ_s (L_s − L̄)², the variance of the losses of S source domains, of any objectives.

    (V-REx: Krueger et al. 2021, arXiv:2003.00688.) A penalty, to be added to the mean of the losses, which it doesn't
    hold; the forwards are shared:

        erm = [jt.classification(model).on(name) for name in names]
        weight = jt.schedules.switch(1.0, 10.0, at=500)
        objective = jt.together(sum(erm) / len(erm) + weight * jt.adaptation.vrex(erm))

    Those are the weights released in DomainBed, which also starts Adam afresh at the switch.

    Args:
      terms: the objective of each domain, two or more: sums and other losses, too. They train what the terms beside the
        penalty train, and report nothing here.
      name: of the metric.

    Returns:
      An objective with the metric `vrex`.

    Raises:
      InputError: for fewer than two objectives.
    """
    terms = check_objectives(terms, "vrex")
    total = sum(terms[1:], start=terms[0])

    def loss(outputs, params, state, batch, ctx):
        values, _, metrics = values_of(
            terms, outputs, params, state, batch, ctx
        )  # queues move where the losses are added
        value = losses.vrex(values)
        return value, state, {name: told_of(value, terms, metrics)}

    return dataclasses.replace(total, name=name, loss=loss)
