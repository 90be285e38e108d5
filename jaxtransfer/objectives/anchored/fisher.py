"""The diagonal of the Fisher information, from per-example gradients."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.devices.in_flight import InFlight
from jaxtransfer.errors import InputError
from jaxtransfer.objective import Context, Objective
from jaxtransfer.parts.masking import check_masks, mask_of


def fisher_diagonal(objective: Objective, params: Any, state: Any, batches: Iterable[Any]) -> Any:
    """Estimates F_j = (1/n) Σᵢ (∂L(yᵢ, f(xᵢ; w))/∂w_j)², the diagonal of the empirical Fisher information.

    With cross-entropy this is the estimate that EWC (Kirkpatrick et al. 2017, arXiv:1612.00796) and L2-SP-Fisher
    (Li et al. 2018) take on the source data. Gradients are per example, in inference mode (running statistics).

    Args:
      objective: an objective whose loss is a mean over examples: `classification(model)`.
      params: a dict by model name, w.
      state: a dict by model name (batch statistics).
      batches: flat batches of one shape; where they hold `mask` [B], its zeros do not count.

    Returns:
      A tree like `params`, in at least float32.

    Raises:
      InputError: where no example counts.
    """

    if isinstance(batches, Mapping) or hasattr(batches, "class_names"):
        raise InputError(
            f"fisher_diagonal takes batches one after the other, got a {type(batches).__name__}: pass [batch], or what "
            f"jt.data.eval_batches(dataset, batch_size) makes"
        )

    def of_example(params, state, example, frozen):
        single = jax.tree.map(lambda x: x[None], example)
        ctx = Context(frozen=dict(zip(objective.frozen, frozen, strict=True)), train=False)
        return objective(params, state, single, ctx)[0]

    @jax.jit
    def accumulate(total, count, params, state, batch, frozen):
        mask, batch = mask_of(batch), dict(batch)
        size = jax.tree.leaves(batch)[0].shape[0]
        batch.pop("mask", None)
        mask = jnp.ones(size, jnp.float32) if mask is None else mask.astype(jnp.float32)
        grads = jax.vmap(jax.grad(of_example), in_axes=(None, None, 0, None))(params, state, batch, frozen)

        def add(old, grad):
            keep = mask.reshape(-1, *([1] * (grad.ndim - 1))).astype(old.dtype)
            return old + jnp.sum(jnp.where(keep > 0, jnp.square(grad.astype(old.dtype)), 0) * keep, axis=0)

        return jax.tree.map(add, total, grads), count + jnp.sum(mask)

    total = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32)), params)
    count, frozen, in_flight = jnp.zeros(()), [handle.tree for handle in objective.frozen], InFlight()
    for batch in batches:
        check_masks(batch, on_host=True)
        in_flight.wait()
        total, count = accumulate(total, count, params, state, batch, frozen)
        in_flight.add(count)
    if not count:
        raise InputError("fisher_diagonal: expected at least one example, got none; is the split empty?")
    return jax.tree.map(lambda t: t / count.astype(t.dtype), total)
