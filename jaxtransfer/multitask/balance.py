"""Gradient surgery and loss balancing as an objective: the step that trains it is the one that trains everything."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.objective import Objective
from jaxtransfer.parts.mixing import Mixing, Rule, Task


def balance(
    terms: Objective | Sequence[Objective], rule: Rule, *, shared: tree.Patterns = ".*", name: str = "balance"
) -> Objective:
    """Builds the objective whose gradient is Σ_t a_t ∇L_t, the weights a by a rule from how the gradients lie.

        tasks = jt.classification(net, output="left", label="left").named("left") + ...
        objective = jt.balance(tasks, jt.multitask.pcgrad, shared="net/encoder")

    The loss is Σ_t L_t, the direction is not its gradient. On the parameters that `shared` selects it is
    Σ_t a_t ∇L_t; the others, heads of single tasks, get the plain Σ_t ∇L_t. Forwards run once, then one pass backwards
    for each task. The gradients are those of the global batch, averaged over the devices, and so is their Gram matrix
    G_st = ⟨∇L_s, ∇L_t⟩ over the shared parameters, but for those that `jt.optim` holds still. All that the rules of the
    field look at are G and the values: `rule(gram [T, T], values [T], key, state) -> (weights [T], state)`.

    A rule with a memory has an attribute `init`: `rule.init(T)` is its first state, a tree of arrays. It is kept in the
    model state under `name`, saved and resumed with it, and moves once per update; other rules get {}. The key is the
    same on all devices; where nothing may be drawn it is None.

    The result is a sum of the terms as before: add terms that aren't to be balanced, scale it, `.on`, `.named`,
    `together`; the evaluation is that of the sum. One balance on two domains, `b.on("x") + b.on("y")`, has as many
    tasks as before, each the sum over both. In a meta-objective (`maml`) the inner loop follows the mixture, in which
    second derivatives take the weights as constants.

    Args:
      terms: a sum, each of whose terms is a task, with its weight; or a list of objectives, each of them a task: a sum
        in it is one task.
      rule: `jt.multitask.pcgrad`, `jt.multitask.mgda`, or a function of your own.
      shared: path patterns of the parameters that the tasks share, `net/encoder` say; all by default.
      name: of the metrics `<name>/<term>`, each task's weight in training, beside the terms' own.

    Returns:
      An objective.

    Raises:
      InputError: where there is no task, or one is balanced already; when run, for a pattern that selects nothing, and
        for a rule that doesn't return one weight per task and a state like the one that it was given.
    """
    tasks = _tasks(terms)
    if any(term.task is not None for task in tasks for _, term in task.terms):
        raise InputError("a term is balanced already: the tasks of jt.balance are plain terms and sums of them")
    if not callable(rule):
        raise InputError(f"a rule is a function of (gram, values, key, state); got a {type(rule).__name__}")
    mixing = Mixing(rule, len(tasks), tree.as_patterns(shared), name, remembers=hasattr(rule, "init"))
    marked = []
    for number, task in enumerate(tasks):
        for factors, term in task.summed.parts:
            own = dataclasses.replace(term, task=Task(mixing, number))
            if mixing.remembers and not marked:  # what the rule remembers begins with the first of them
                own = _with_memory(own, mixing)
            marked.append(_scaled(own, factors))
    return sum(marked[1:], start=marked[0])


def _tasks(terms: Objective | Sequence[Objective]) -> list[Objective]:
    if isinstance(terms, Objective):
        return [_scaled(term, factors) for factors, term in terms.summed.parts]
    tasks = list(terms)
    if not tasks or not all(isinstance(task, Objective) for task in tasks):
        raise InputError("jt.balance takes a sum of objectives, or a list of one or more")
    return tasks


def _scaled(term: Objective, factors: tuple) -> Objective:
    for factor in factors:
        term = factor * term
    return term


def _with_memory(term: Objective, mixing: Mixing) -> Objective:
    """Returns a term that begins the state of a rule, besides its own."""

    def setup(key, batch):
        params, state = term.setup(key, batch)
        if mixing.name in state:
            raise InputError(f"a term keeps {mixing.name!r} already; call the balance otherwise: name='other'")
        first: Any = mixing.rule
        return params, {**state, mixing.name: first.init(mixing.count)}

    return dataclasses.replace(term, setup=setup, per_update=(*term.per_update, mixing.name))
