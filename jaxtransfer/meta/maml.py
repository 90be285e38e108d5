"""Model-agnostic meta-learning of any objective, by the gradient of a gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.meta import statistics as slots
from jaxtransfer.meta.inner_loop import inner_loop
from jaxtransfer.meta.statistics import Statistics, transductive
from jaxtransfer.meta.tasks import (
    episodes,
    init_on_support,
    inner_context,
    mean_over_tasks,
    merge,
    select,
    task_context,
)
from jaxtransfer.objective import Objective

Rates = Callable[[Any, int], Any]


def maml(
    objective: Objective,
    *,
    inner: optax.GradientTransformation,
    steps: int,
    first_order: bool | Callable[[jax.Array], jax.Array] = False,
    adapt: tree.Patterns = ".*",
    rates: Rates | None = None,
    multi_step: Callable[[jax.Array], jax.Array] | None = None,
    statistics: Statistics = transductive,
    remat: bool = False,
    at_once: int | None = None,
) -> Objective:
    """Builds (1/T) Σ_t L(θ_t, query_t) with θ_t = θ adapted to support_t by `steps` inner updates, over any objective.

    MAML (Finn et al. 2017, arXiv:1703.03400); FOMAML (`first_order=True`); ANIL (`adapt="head"`, Raghu et al. 2020,
    arXiv:1909.09157); BOIL (all but the head, Oh et al. 2021, arXiv:2008.08882); Meta-SGD (`rates=per_parameter(0.1)`,
    Li et al. 2017, arXiv:1707.09835); MAML++ (`rates=per_layer_and_step(0.1)`, `multi_step`, a schedule as
    `first_order`, `statistics=per_step`; Antoniou et al. 2019, arXiv:1810.09502).

    A batch holds `support` and `query`, each a batch of the objective with a leading axis of tasks: `image`
    [T, ways · shots, ...]. Metrics are those of the objective on the query sets after adaptation, and `maml`, the loss.

    Args:
      objective: the loss of one task; its frozen trees, penalties and weights work as anywhere.
      inner: any optax optimiser, whose state starts afresh in each task; `optax.sgd(1.0)` under learned `rates`.
      steps: inner updates. An objective of other steps evaluates what this one has trained: further steps take the
        last of the learned rates and of the `per_step` statistics.
      first_order: leave out second derivatives; or a function of the step that says when (annealing).
      adapt: path patterns of the parameters that the inner loop changes.
      rates: learned factors of the updates: `rates(params, steps)` gives their first values, leaves [steps or 1, ...].
      multi_step: `multi_step(step) -> [steps]`, weights of the query losses after each inner update, for a loss that
        looks at all of them; by default only the last one counts.
      statistics: what batch norm normalises by; see `jaxtransfer.meta.statistics`. Only `per_step` changes the state.
      remat: recompute inner steps in the backward pass: memory O(√steps).
      at_once: tasks that run together, by vmap, the rest following in a scan; all at once by default.

    Returns:
      An objective over episodes, with the parameters of `objective` and, with `rates`, `params["rates"]`; with
      `statistics=per_step` also `state["per_step"]`.

    Raises:
      InputError: at init, where a pattern selects no parameter, the batch is no episode, `multi_step` gives another
        number of weights, or in training `state["per_step"]` or `params["rates"]` are of another number of steps.
    """
    if steps < 1 and rates is not None:
        raise InputError(f"learned rates need at least one inner step; got steps={steps}")

    def setup(key, batch):
        params, state = init_on_support(objective, key, batch)
        if rates is not None:
            params = {**params, "rates": tree.nested(rates(select(params, adapt), steps))}
        if statistics.per_step:
            state = {**state, slots.STATE: slots.first_slots(state, objective.models, steps)}
        return params, state

    def loss(outputs, params, state, batch, ctx):
        anneal = first_order(ctx.step) if callable(first_order) else first_order
        weights = None if multi_step is None else multi_step(ctx.step)
        support_train, query_train = statistics.modes(ctx.train)
        moves = statistics.per_step and ctx.train
        if weights is not None and weights.shape != (steps,):
            raise InputError(
                f"multi_step must give the weights [{steps}] of {steps} steps; got {weights.shape}. Leave it out where "
                f"the steps differ from those of the training"
            )
        if moves:
            slots.check_slots(state, steps)

        def state_after(number):
            return slots.at_slot(state, number) if statistics.per_step else state

        def moved(new):
            return jax.lax.stop_gradient({name: new[name] for name in state[slots.STATE]}) if moves else None

        def task(params, data, index):
            at_support = task_context(ctx, index, train=support_train)
            at_query = task_context(ctx, index, train=query_train)
            scale = None if rates is None else _rates_for(steps, tree.leaves_by_path(params["rates"]), train=ctx.train)
            own = {name: value for name, value in params.items() if rates is None or name != "rates"}

            def support_loss(fast, number):
                at_update = inner_context(at_support, number)
                value, new, _ = objective(merge(own, fast), state_after(number), data["support"], at_update)
                return value, moved(new)

            def query_loss(fast, number):
                value, new, metrics = objective(merge(own, fast), state_after(number), data["query"], at_query)
                return value, (metrics, moved(new))

            fast, (seen, at_steps) = inner_loop(
                support_loss,
                select(own, adapt),
                optimizer=inner,
                steps=steps,
                first_order=anneal,
                remat=remat,
                scale=scale,
                observe=None if weights is None else lambda fast, number: query_loss(fast, number + 1)[0],
                has_aux=True,
            )
            value, (metrics, at_last) = query_loss(fast, steps)
            if weights is not None:
                value = jnp.sum(weights.astype(seen.dtype) * seen)
            return value, (metrics, jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), at_steps, at_last))

        value, metrics, new = mean_over_tasks(task, params, episodes(batch), ctx, at_once=at_once, has_aux=True)
        state = {**state, slots.STATE: new} if moves else state
        return value.value, state, {"maml": value, **metrics}

    return Objective("maml", (), loss, setup=setup, frozen=objective.frozen, models=objective.models)


def _rates_for(steps: int, rates: dict[str, jax.Array], *, train: bool) -> dict[str, jax.Array]:
    """Returns the learned rates of as many steps, in evaluation of any number: the last one again for further steps."""

    def of_steps(path, rate):
        if rate.shape[0] in (1, steps):
            return rate
        if train:
            raise InputError(f"rates/{path}: expected the rates of {steps} inner steps, got those of {rate.shape[0]}")
        return rate[np.minimum(np.arange(steps), rate.shape[0] - 1)]

    return {path: of_steps(path, rate) for path, rate in rates.items()}


def per_parameter(rate: float) -> Rates:
    """Gives each adapted parameter a learned rate of its own, the same in each step (Meta-SGD, arXiv:1707.09835)."""

    def first(params, steps):
        return jax.tree.map(lambda p: jnp.full((1, *p.shape), rate, p.dtype), params)

    return first


def per_layer_and_step(rate: float) -> Rates:
    """Gives each adapted leaf a learned rate per inner step (MAML++, arXiv:1810.09502)."""

    def first(params, steps):
        return jax.tree.map(lambda p: jnp.full((steps,), rate, p.dtype), params)

    return first
