"""Losses over many tasks: their data, contexts and parameters; one by one or at once, in memory for those at once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.objective import Batch, Context, Mean, Objective, Tree, view_of

TaskFn = Callable[[Tree, Any, jax.Array], tuple[jax.Array, Any]]


def episodes(batch: Batch) -> dict[str, Any]:
    """Returns the support and the query sets of a batch of tasks, whose leaves are [T, ...], as JAX arrays."""
    check_tasks(batch)
    return {part: jax.tree.map(jnp.asarray, view_of(batch, (part,))) for part in ("support", "query")}


def check_tasks(batch: Batch) -> None:
    """Raises for an episode without the axis of tasks, by its shapes alone."""
    for part in ("support", "query"):
        for path, leaf in tree.leaves_by_path(view_of(batch, (part,))).items():
            if jnp.ndim(leaf) < 2:
                raise InputError(
                    f"a batch of episodes has entries [tasks, examples, ...]; {part}/{path} has shape "
                    f"{jnp.shape(leaf)}: give a single episode an axis of one task, x[None]"
                )


def init_on_support(objective: Objective, key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
    """Returns fresh `(params, state)` of a task's objective, from the first task's support set.

    Raises:
      InputError: for what moves once per update, which no task would ever move.
    """
    check_tasks(batch)
    if objective.per_update:
        raise InputError(
            f"a task's objective keeps {objective.per_update[0]!r}, which moves once per update, but within tasks the "
            f"state stays as it is: an average goes beside them, maml(...) + jt.averaged(model); a queue, or a rule "
            f"that remembers, has no place there"
        )
    return objective.init(key, jax.tree.map(lambda x: x[0], view_of(batch, ("support",))))


def select(params: Tree, patterns: tree.Patterns) -> dict[str, jax.Array]:
    """Returns the leaves that the inner loop changes, by path; each pattern must select something."""
    leaves = tree.leaves_by_path(params)
    tree.check_used(patterns, leaves, "adapt")
    return {path: leaf for path, leaf in leaves.items() if tree.matches(path, patterns)}


def merge(params: Tree, fast: dict[str, jax.Array]) -> Tree:
    """Returns `params` with the leaves in `fast`, by path, in the place of its own."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fast.get(tree.path_of(path), leaf), params)


def mean_over_tasks(
    task: TaskFn, params: Tree, tasks: Any, ctx: Context, *, at_once: int | None = None, has_aux: bool = False
) -> tuple[Any, ...]:
    """Averages a task's loss over the global batch of tasks.

    Args:
      task: `task(params, data, index) -> (loss, metrics)` of one task; `index` is its number in the global batch.
      params: what the loss is differentiated in.
      tasks: a tree whose leaves are [T, ...].
      ctx: the context of the step.
      at_once: how many tasks run together, by `vmap`; the others follow in a `scan`, in which each chunk's gradient is
        taken as soon as its loss is known, so that memory is that of one chunk. All at once by default. On a mesh a
        multiple of the devices splits each chunk over them.
      has_aux: `task` gives `(loss, (metrics, aux))`, `aux` a tree of arrays (new running statistics).

    Returns:
      The loss as a `Mean` over the tasks of all devices, and the metrics, summed over them; with `has_aux` also the
      mean of each leaf of `aux` over the tasks of all devices.

    Raises:
      InputError: where the tasks don't divide by `at_once`.
    """
    count = jax.tree.leaves(tasks)[0].shape[0]
    first = 0 if ctx.axis is None else jax.lax.axis_index(ctx.axis) * count
    numbered = (tasks, first + jnp.arange(count))
    if at_once is None or at_once >= count:
        total, extra = _together(task, params, numbered)
    elif at_once < 1 or count % at_once:
        raise InputError(f"at_once must divide the tasks of a batch: got {at_once} for {count} tasks")
    else:
        total, extra = _in_chunks(task, params, numbered, at_once)
    metrics, aux = extra if has_aux else (extra, None)
    metrics = {name: Mean(ctx.sum(m.total), ctx.sum(m.count)) for name, m in metrics.items()}
    loss = Mean(ctx.sum(total), ctx.sum(jnp.full((), count, total.dtype)))
    if not has_aux:
        return loss, metrics
    return loss, metrics, jax.tree.map(lambda leaf: _mean_of_sums(leaf, count, ctx), aux)


def _mean_of_sums(total: jax.Array, count: int, ctx: Context) -> jax.Array:
    """Returns the mean over all tasks from each device's sum over its own `count`, in the same type."""
    return jnp.mean(ctx.gather(total[None]) / count, axis=0).astype(total.dtype)


def _together(task: TaskFn, params, numbered):
    if jax.tree.leaves(numbered)[0].shape[0] == 1:  # plain products are faster than batched ones of one task
        return task(params, *jax.tree.map(lambda x: x[0], numbered))
    losses, extra = jax.vmap(lambda data: task(params, *data))(numbered)
    return jnp.sum(losses), jax.tree.map(lambda values: jnp.sum(values, axis=0), extra)


def _in_chunks(task: TaskFn, params, numbered, at_once: int):
    # [T] -> [T / at_once, at_once]: the tasks of a chunk come from different devices where T is split over a mesh.
    chunks = jax.tree.map(lambda x: x.reshape(at_once, -1, *x.shape[1:]).swapaxes(0, 1), numbered)

    def chunk_loss(params, chunk):
        return _together(task, params, chunk)

    def summed(first, rest, step):
        """Adds up over the chunks, from the first one's value on, which also gives the types."""
        return jax.lax.scan(lambda total, chunk: (jax.tree.map(jnp.add, total, step(chunk)), None), first, rest)[0]

    def split(chunks):
        return jax.tree.map(lambda x: x[0], chunks), jax.tree.map(lambda x: x[1:], chunks)

    @jax.custom_vjp
    def run(params, chunks):
        first, rest = split(chunks)
        return summed(chunk_loss(params, first), rest, lambda chunk: chunk_loss(params, chunk))

    def forward(params, chunks):
        first, rest = split(chunks)
        both = jax.value_and_grad(chunk_loss, has_aux=True)
        return summed(both(params, first), rest, lambda chunk: both(params, chunk))

    def backward(gradient, cotangents):
        return jax.tree.map(lambda g: (cotangents[0] * g).astype(g.dtype), gradient), None

    run.defvjp(forward, backward)
    return run(params, chunks)


def task_context(ctx: Context, index: jax.Array, *, train: bool) -> Context:
    """Returns the context inside a task: no device axis, a key of the task's own, and no layers in inference mode.

    What batch norm does inside of tasks is said by `statistics`, and is the same in training and in evaluation.
    """
    key = ctx.key if ctx.key is None else jax.random.fold_in(ctx.key, index)
    return dataclasses.replace(ctx, axis=None, key=key, train=train, still={})


def inner_context(ctx: Context, number: jax.Array) -> Context:
    """Returns the context of one inner update, with a key of its own."""
    return dataclasses.replace(ctx, key=None if ctx.key is None else jax.random.fold_in(ctx.key, number))
