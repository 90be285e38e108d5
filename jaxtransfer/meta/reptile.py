"""Reptile: meta-learning from where the inner loop arrives, without any derivative of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.meta.inner_loop import inner_loop
from jaxtransfer.meta.statistics import Statistics, refuse_per_step, transductive
from jaxtransfer.meta.tasks import (
    episodes,
    init_on_support,
    inner_context,
    mean_over_tasks,
    merge,
    select,
    task_context,
)
from jaxtransfer.objective import Context, Objective


def reptile(
    objective: Objective,
    *,
    inner: optax.GradientTransformation,
    steps: int,
    inner_batch: int | None = None,
    adapt: tree.Patterns = ".*",
    statistics: Statistics = transductive,
    at_once: int | None = None,
) -> Objective:
    """Builds the objective whose gradient is (1/T) Σ_t (θ - φ_t), φ_t = θ after `steps` inner updates on support_t.

    Reptile (Nichol et al. 2018, arXiv:1803.02999): the outer `optax.sgd(ε)` makes θ ← θ + ε · mean_t(φ_t - θ), and any
    other optimiser takes the same direction. The value is (1/T) Σ_t L(φ_t, query_t), as in `maml`; the direction is
    not its gradient. Neither the inner loop nor the query loss is differentiated in θ: the memory is that of one inner
    update, whatever their number, and the query set only measures. Parameters that are not adapted get a zero gradient.

    A batch is one of episodes, as for `maml`. Metrics are those of the objective on the query sets after adaptation,
    and `reptile`, the loss.

    Args:
      objective: the loss of one task; its frozen trees, penalties and weights work as anywhere.
      inner: any optax optimiser, whose state starts afresh in each task.
      steps: inner updates.
      inner_batch: support examples of each inner update, by default all of them. They follow each other in an order
        drawn for each task, from its start again after the last one; in evaluation in the order of the support set.
      adapt: path patterns of the parameters that the inner loop changes.
      statistics: `transductive` or `running`; see `jaxtransfer.meta.statistics`. The state is never changed.
      at_once: tasks that run together, by vmap, the rest following in a scan; all at once by default.

    Returns:
      An objective over episodes, with the parameters of `objective`.

    Raises:
      InputError: for `per_step` statistics; at init, where a pattern selects no parameter, the batch is no episode, or
        `inner_batch` is not between 1 and the size of the support set.
    """
    refuse_per_step(statistics, "reptile")

    def loss(outputs, params, state, batch, ctx):
        fixed = jax.lax.stop_gradient(state)  # what a term to the left has moved depends on the parameters

        def task(params, data, index):
            at_support = task_context(ctx, index, train=statistics.support_train)
            at_query = task_context(ctx, index, train=statistics.query_train)
            own = jax.lax.stop_gradient(params)
            examples = _minibatches(data["support"], inner_batch, at_support)

            def support_loss(fast, number):
                return objective(merge(own, fast), fixed, examples(number), inner_context(at_support, number))[0]

            fast, _ = inner_loop(support_loss, select(own, adapt), optimizer=inner, steps=steps, first_order=True)
            value, _, metrics = objective(merge(own, fast), fixed, data["query"], at_query)
            return value + _zero_with_gradient(select(params, adapt), fast).astype(value.dtype), metrics

        value, metrics = mean_over_tasks(task, params, episodes(batch), ctx, at_once=at_once)
        return value.value, state, {"reptile": value, **metrics}

    def setup(key, batch):
        return init_on_support(objective, key, batch)

    return Objective("reptile", (), loss, setup=setup, frozen=objective.frozen, models=objective.models)


def _zero_with_gradient(start: dict[str, jax.Array], end: dict[str, jax.Array]) -> jax.Array:
    """Returns 0, whose gradient in `start` is `start - end`."""

    def product(a, b):
        away = jax.lax.stop_gradient(a - b)
        return jnp.sum((a - jax.lax.stop_gradient(a)) * away, dtype=jnp.promote_types(a.dtype, jnp.float32))

    return sum((product(start[path], end[path]) for path in start), start=jnp.zeros(()))


def _minibatches(support: Any, size: int | None, ctx: Context) -> Callable[[jax.Array], Any]:
    """Returns the function from the number of an inner update to its `size` examples of the support set."""
    if size is None:
        return lambda number: support
    counts = sorted({leaf.shape[0] for leaf in jax.tree.leaves(support)})
    if len(counts) > 1 or not 1 <= size <= counts[0]:
        raise InputError(
            f"inner_batch must be between 1 and the examples of a support set, the same for each of its entries; got "
            f"inner_batch={size} for {', '.join(map(str, counts))} examples"
        )
    key = ctx.draw_key("inner_batch")
    order = jnp.arange(counts[0]) if key is None else jax.random.permutation(key, counts[0])

    def examples(number):
        rows = order[(number * size + jnp.arange(size)) % counts[0]]
        return jax.tree.map(lambda x: x[rows], support)

    return examples
