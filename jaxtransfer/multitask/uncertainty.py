"""Uncertainty: the weights of tasks are learned with them."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from jaxtransfer.context import Mean
from jaxtransfer.errors import InputError
from jaxtransfer.multitask.balance import scaled, tasks_of
from jaxtransfer.objective import Objective
from jaxtransfer.parts.learned_weights import LearnedWeights
from jaxtransfer.terms import result_of


def uncertainty(terms: Objective | Sequence[Objective], *, name: str = "uncertainty", start: float = 0.0) -> Objective:
    """Builds Σ_t (e^(−s_t) L_t + s_t) with an s_t for each task, the logarithm of a variance, learned along.

        tasks = jt.classification(net, output="left", label="left").named("left") + ...
        objective = jt.multitask.uncertainty(tasks)

    (Kendall et al. 2018, "Multi-task learning using uncertainty to weigh losses", arXiv:1705.07115.) The paper has
    ½ e^(−s) L + ½ s for a regression and e^(−s) L + ½ s for a classification; released code (LibMTL) takes ½ e^(−s) L +
    ½ s for all, of which this is twice, so that it begins as the plain sum; its s begin at −0.5, `start`. It is an
    objective of its own and no rule: the gradient is that of the loss, in one pass backwards, and the s train by the
    optimiser, as parameters under `name`. IMTL-L (Liu et al. 2021, "Towards impartial multi-task learning", ICLR) is
    the same with −s for s.

    Args:
      terms: a sum, each of whose terms is a task, with its weight; or a list of objectives, each of them a task: a sum
        in it is one task.
      name: of the parameters, and of the metrics `<name>/<task>`, the weights e^(−s_t).
      start: the first s_t.

    Returns:
      An objective: the weighted tasks, and a term `name` whose value is Σ_t s_t.

    Raises:
      InputError: where there is no task, or one is balanced already.
    """
    tasks = tasks_of(terms)
    if any(term.task is not None for task in tasks for _, term in task.terms):
        raise InputError("a term is balanced already: the tasks of jt.multitask.uncertainty are plain terms and sums")
    weights = LearnedWeights(name, len(tasks))
    names = ["+".join(term.name or "objective" for _, term in task.terms) for task in tasks]
    names = [own if names.count(own) == 1 else f"{own} {number}" for number, own in enumerate(names)]

    def bills(outputs, params, state, batch, ctx):
        found = [weights.of(params, number) for number in range(len(tasks))]
        total = sum((bill for _, bill in found[1:]), start=found[0][1])
        metrics = {f"{name}/{own}": Mean(weight, jnp.ones(())) for own, (weight, _) in zip(names, found, strict=True)}
        return total, state, {name: Mean(total, jnp.ones(())), **metrics}

    made = [Objective(name, (), bills, setup=lambda key, batch: (weights.fresh(start), {}))]
    for number, task in enumerate(tasks):
        made += [scaled(_weighed(term, weights, number), factors) for factors, term in task.summed.parts]
    return sum(made[2:], start=made[1]) + made[0]


def _weighed(term: Objective, weights: LearnedWeights, number: int) -> Objective:
    """Returns a term whose loss is e^(−s) times as large."""

    def loss(outputs, params, state, batch, ctx):
        value, state, metrics = result_of(term, outputs, params, state, batch, ctx)
        weight, _ = weights.of(params, number)
        return weight.astype(value.dtype) * value, state, metrics

    return dataclasses.replace(term, loss=loss, pooled=False)  # it isn't the mean that it reports
