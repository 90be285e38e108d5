"""Losses over many tasks: one by one or at once, with memory for as many as run at once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.objective import Context, Mean, Tree

TaskFn = Callable[[Tree, Any, jax.Array], tuple[jax.Array, dict[str, Mean]]]


def mean_over_tasks(task: TaskFn, params: Tree, tasks: Any, ctx: Context, *, at_once: int | None = None):
    """Averages a task's loss over the global batch of tasks.

    Args:
      task: `task(params, data, index) -> (loss, metrics)` of one task; `index` is its number in the global batch.
      params: what the loss is differentiated in.
      tasks: a tree whose leaves are [T, ...].
      ctx: the context of the step.
      at_once: how many tasks run together, by `vmap`; the others follow in a `scan`, in which each chunk's gradient is
        taken as soon as its loss is known, so that memory is that of one chunk. All at once by default. On a mesh a
        multiple of the devices splits each chunk over them.

    Returns:
      The loss as a `Mean` over the tasks of all devices, and the metrics, summed over them.

    Raises:
      InputError: where the tasks don't divide by `at_once`.
    """
    count = jax.tree.leaves(tasks)[0].shape[0]
    first = 0 if ctx.axis is None else jax.lax.axis_index(ctx.axis) * count
    numbered = (tasks, first + jnp.arange(count))
    if at_once is None or at_once >= count:
        total, metrics = _together(task, params, numbered)
    elif at_once < 1 or count % at_once:
        raise InputError(f"at_once must divide the tasks of a batch: got {at_once} for {count} tasks")
    else:
        total, metrics = _in_chunks(task, params, numbered, at_once)
    metrics = {name: Mean(ctx.sum(m.total), ctx.sum(m.count)) for name, m in metrics.items()}
    return Mean(ctx.sum(total), ctx.sum(jnp.full((), count, total.dtype))), metrics


def _together(task: TaskFn, params, numbered):
    losses, metrics = jax.vmap(lambda data: task(params, *data))(numbered)
    return jnp.sum(losses), jax.tree.map(lambda values: jnp.sum(values, axis=0), metrics)


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
    """Returns the context inside a task: no device axis, and a key of the task's own."""
    key = ctx.key if ctx.key is None else jax.random.fold_in(ctx.key, index)
    return dataclasses.replace(ctx, axis=None, key=key, train=train)


def inner_context(ctx: Context, number: jax.Array) -> Context:
    """Returns the context of one inner update, with a key of its own."""
    return dataclasses.replace(ctx, key=None if ctx.key is None else jax.random.fold_in(ctx.key, number))
