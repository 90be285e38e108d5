"""Gradient surgery and loss balancing as an objective: the step that trains it is the one that trains everything."""

import dataclasses
from collections.abc import Sequence

import jax

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.objective import Objective
from jaxtransfer.parts.gradient_averages import begun
from jaxtransfer.parts.mixing import Mixing, Rule, Task


def balance(
    terms: Objective | Sequence[Objective],
    rule: Rule,
    *,
    shared: tree.Patterns = ".*",
    name: str = "balance",
    cosines: bool = False,
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
    same on all devices; where nothing may be drawn it is None. What a rule can be set to are keyword arguments:
    `functools.partial(jt.multitask.cagrad, c=0.4)`.

    One that looks at moving averages of the gradients says so too (`jt.multitask.averages`).

    A rule that looks at the values alone says so (`jt.multitask.of_values`), and then one pass backwards is all; with
    `jt.multitask.equal` the program is the plain sum's. A rule that is no mixture of whole gradients returns a function
    in the place of weights: of the gradients of one parameter, stacked [T, ...], and a key of its own, the mixed one.

    The result is a sum of the terms as before: add terms that aren't to be balanced, scale it, `.on`, `.named`,
    `together`; the evaluation is that of the sum. One balance on two domains, `b.on("x") + b.on("y")`, has as many
    tasks as before, each the sum over both. In a meta-objective (`maml`) the inner loop follows the mixture, in which
    second derivatives take the weights as constants.

    Args:
      terms: a sum, each of whose terms is a task, with its weight; or a list of objectives, each of them a task: a sum
        in it is one task.
      rule: one of `jt.multitask`, `pcgrad` say, or a function of your own.
      shared: path patterns of the parameters that the tasks share, `net/encoder` say; all by default.
      name: of the metrics `<name>/<term>`, each task's weight in training, beside the terms' own.
      cosines: whether to report those of each pair of task gradients on the shared parameters, as
        `<name>/cosine/<term>/<term>`: below 0 two tasks fight. Free with rules that read the Gram matrix; with those of
        the values it takes them a pass backwards for each task.

    Returns:
      An objective.

    Raises:
      InputError: where there is no task, or one is balanced already; when run, for a pattern that selects nothing, and
        for a rule that doesn't return one weight per task and a state like the one that it was given.
    """
    tasks = tasks_of(terms)
    if any(term.task is not None for task in tasks for _, term in task.terms):
        raise InputError("a term is balanced already: the tasks of jt.balance are plain terms and sums of them")
    if not callable(rule):
        raise InputError(f"a rule is a function of (gram, values, key, state); got a {type(rule).__name__}")
    mixing = Mixing(rule, len(tasks), tree.as_patterns(shared), name, cosines)
    marked = []
    for number, task in enumerate(tasks):
        for factors, term in task.summed.parts:
            own = dataclasses.replace(term, task=Task(mixing, number))
            if not marked:  # what the rule remembers begins with the first of them
                own = _with_memory(own, mixing) if mixing.remembers else own
                own = own if mixing.average is None else _with_averages(own, mixing, tasks)
            marked.append(scaled(own, factors))
    return sum(marked[1:], start=marked[0])


def tasks_of(terms: Objective | Sequence[Objective]) -> list[Objective]:
    """Returns the tasks of a sum, each term one, or of a list, each objective one.

    Raises:
      InputError: where there are none.
    """
    if isinstance(terms, Objective):
        return [scaled(term, factors) for factors, term in terms.summed.parts]
    tasks = list(terms)
    if not tasks or not all(isinstance(task, Objective) for task in tasks):
        raise InputError("jt.balance takes a sum of objectives, or a list of one or more")
    return tasks


def scaled(term: Objective, factors: tuple) -> Objective:
    """Returns a term times its weights in a sum."""
    for factor in factors:
        term = factor * term
    return term


def _with_memory(term: Objective, mixing: Mixing) -> Objective:
    """Returns a term that begins the state of a rule, besides its own."""

    def setup(key, batch):
        params, state = term.setup(key, batch)
        if mixing.name in state:
            raise InputError(f"a term keeps {mixing.name!r} already; call the balance otherwise: name='other'")
        return params, {**state, mixing.name: mixing.said("init")(mixing.count)}

    return dataclasses.replace(term, setup=setup, per_update=(*term.per_update, mixing.name))


def _with_averages(term: Objective, mixing: Mixing, tasks: list[Objective]) -> Objective:
    """Returns a term that begins the averages of the gradients of all tasks, which are as large as what they share."""
    whole = dataclasses.replace(sum(tasks[1:], start=tasks[0]), peers=())  # which others train

    def setup(key, batch):
        params, state = term.setup(key, batch)
        shapes = jax.eval_shape(lambda: whole.init(key, batch)[0])
        return params, {**state, mixing.kept: begun(shapes, mixing.shared, mixing.count)}

    return dataclasses.replace(term, setup=setup, per_update=(*term.per_update, mixing.kept))
