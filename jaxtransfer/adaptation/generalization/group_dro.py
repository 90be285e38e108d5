"""Distributionally robust optimisation over groups: the worst source domain counts most."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.adaptation.generalization.sources import check_objectives, told_of, values_of
from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_strength
from jaxtransfer.objective import Mean, Objective


def group_dro(terms: Sequence[Objective], *, rate: float = 0.01, name: str = "group_dro") -> Objective:
    """Builds Σ_s q_s L_s over the losses of S groups, with weights q that lean to the largest: max_q min_θ.

    (Sagawa et al. 2020, arXiv:1911.08731.) Each step makes q_s ∝ q_s · exp(η L_s) before it weighs the losses; q begins
    as 1/S and is part of the model state, so that it is saved and resumed with it. It is the whole loss: where the
    sum of the domains' cross-entropies would stand, this stands, of any objectives:

        erm = [jt.classification(model).on(name) for name in names]
        objective = jt.together(jt.adaptation.group_dro(erm))

    Under gradient accumulation q moves once per update. In evaluation it stays as training has left it.

    Args:
      terms: the objective of each group, a source domain, two or more.
      rate: η.
      name: of the metric, and of q in the state.

    Returns:
      An objective with the metrics of the terms, `group_dro`, and `group_dro/<term>`, the weights q.

    Raises:
      InputError: for fewer than two objectives, and a rate that is negative or not finite.
    """
    check_strength(rate, "rate")
    terms = check_objectives(terms, "group_dro")
    total = sum(terms[1:], start=terms[0])
    names = _names(terms)

    def setup(key, batch):
        params, state = total.setup(key, batch)
        if name in state:
            raise InputError(f"a term keeps {name!r} already; call this one otherwise: group_dro(..., name='other')")
        return params, {**state, name: {"weights": jnp.full(len(terms), 1 / len(terms))}}

    def loss(outputs, params, state, batch, ctx):
        values, new, metrics = values_of(terms, outputs, params, state, batch, ctx)
        weights = state[name]["weights"]
        if ctx.train:
            weights = losses.group_weights(weights, jax.lax.stop_gradient(values), rate=rate)
            new = {**new, name: {"weights": weights.astype(state[name]["weights"].dtype)}}
        value = jnp.sum(weights.astype(values.dtype) * values)
        one = jnp.ones_like(value)
        told = {f"{name}/{group}": Mean(weights[number], one) for number, group in enumerate(names)}
        return value, new, {**metrics, name: told_of(value, terms, metrics), **told}

    first = terms[0].terms[0][1]
    slow = (*total.per_update, name)
    return dataclasses.replace(total, name=name, loss=loss, setup=setup, per_update=slow, learns=first.learns)


def _names(terms: Sequence[Objective]) -> list[str]:
    """Returns what the groups are called: by their terms."""
    told = ["+".join(one.name or "objective" for _, one in term.terms) for term in terms]
    return [name if told.count(name) == 1 else f"{name} {number}" for number, name in enumerate(told)]
