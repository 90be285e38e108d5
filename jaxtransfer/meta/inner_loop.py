"""The inner loop: gradient descent that can be differentiated through."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtransfer.errors import InputError
from jaxtransfer.meta.guard import guarded_update

Tree = Any
LossFn = Callable[[Tree, Any], jax.Array]


def adapt(
    loss_fn: LossFn,
    params: Tree,
    batch: Any,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    first_order: bool = False,
    remat: bool = False,
) -> Tree:
    """Adapts parameters by `steps` updates on one batch: θ ← θ + u(∇L(θ, batch)), differentiable in `params`.

    The gradient of a loss at the result, taken with respect to `params`, is the meta-gradient of MAML (Finn et al.
    2017, arXiv:1703.03400).

    A gradient of zero keeps its derivative wherever that is finite, in plain SGD as under clipping. Adam and its
    relatives take √(g²), whose derivative there (a dead unit, or g so small that g² underflows) is infinite, and 0 · ∞
    would make every entry of the meta-gradient NaN: such an entry passes none. The adapted values are the plain
    optimiser's to the bit.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`, pure.
      params: any tree of floating arrays, θ.
      batch: what `loss_fn` takes.
      optimizer: any optax optimiser; its state starts afresh.
      steps: number of updates, at least 0.
      first_order: leave out the derivative of the gradients (FOMAML): half the memory and less time.
      remat: recompute inner steps in the backward pass: memory O(√steps) instead of O(steps), the same gradient.

    Returns:
      The adapted parameters, a tree like `params`; those of fewer bits than float32 come, and move, as float32, in
      which no update is too small to be added.

    Raises:
      InputError: where `steps` is negative.
    """
    return inner_loop(
        lambda p, _: loss_fn(p, batch), params, optimizer=optimizer, steps=steps, first_order=first_order, remat=remat
    )[0]


def inner_loop(
    loss_fn: Callable[[Tree, jax.Array], Any],
    params: Tree,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    first_order: bool | jax.Array = False,
    remat: bool = False,
    scale: Tree = None,
    observe: Callable[[Tree, jax.Array], Any] | None = None,
    has_aux: bool = False,
) -> tuple[Tree, Any]:
    """Runs the inner loop with what MAML's relatives add to it.

    Args:
      loss_fn: `loss_fn(params, step) -> scalar`, `step` the int32 number of the inner update.
      params: θ.
      optimizer: any optax optimiser.
      steps: number of updates.
      first_order: a bool, or a boolean scalar where it changes during training.
      remat: recompute inner steps in the backward pass.
      scale: factors of the updates, a tree like `params` whose leaves are [steps or 1, ...] (learned rates).
      observe: `observe(params, step)` after each update.
      has_aux: `loss_fn` gives `(scalar, aux)`.

    Returns:
      The adapted parameters, and what was observed, stacked over the steps; with `has_aux` the pair of it and the aux.
    """
    if steps < 0:
        raise InputError(f"steps of the inner loop must be at least 0; got {steps}")
    always = isinstance(first_order, bool) and first_order
    never = isinstance(first_order, bool) and not first_order

    def with_aux(params, number):
        return loss_fn(params, number) if has_aux else (loss_fn(params, number), None)

    def update(carry, x):
        params, opt_state = carry
        number, factor = x
        grads, aux = jax.grad(with_aux, has_aux=True)(params, number)
        if always:
            grads = jax.lax.stop_gradient(grads)
        elif not never:
            grads = jax.tree.map(lambda g: jnp.where(first_order, jax.lax.stop_gradient(g), g), grads)
        updates, opt_state = guarded_update(optimizer, grads, opt_state, params)
        if factor is not None:
            updates = jax.tree.map(lambda u, f: u * f.reshape(f.shape + (1,) * (u.ndim - f.ndim)), updates, factor)
        params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)
        seen = None if observe is None else observe(params, number)
        return (params, opt_state), (seen, aux) if has_aux else seen

    params = jax.tree.map(widened, params)
    scale = jax.tree.map(lambda f: jnp.broadcast_to(f, (steps, *f.shape[1:])), scale)
    carry = params, optimizer.init(params)
    carry, seen = _scan(update, carry, (jnp.arange(steps), scale), steps, remat)
    return carry[0], seen


def widened(leaf: Any) -> Any:
    """Returns an array of fewer bits than float32 in float32, and any other one as it is."""
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 32
    return leaf.astype(jnp.float32) if narrow else leaf


def _scan(body, carry, xs, length: int, remat: bool):
    """Scans `body`; with `remat` in blocks of about √length steps, each recomputed from its start."""
    if length == 1:  # no loop: under vmap the tasks' one update starts at weights that they still share
        carry, seen = body(carry, jax.tree.map(lambda x: x[0], xs))
        return carry, jax.tree.map(lambda x: jnp.asarray(x)[None], seen)
    if not remat or length < 2:
        return jax.lax.scan(body, carry, xs, length=length)
    size = math.isqrt(length)
    blocks = length // size
    body = jax.checkpoint(body)

    @jax.checkpoint
    def block(carry, part):
        return jax.lax.scan(body, carry, part)

    whole = jax.tree.map(lambda x: x[: blocks * size].reshape(blocks, size, *x.shape[1:]), xs)
    carry, seen = jax.lax.scan(block, carry, whole)
    seen = jax.tree.map(lambda x: x.reshape(blocks * size, *x.shape[2:]), seen)
    if blocks * size < length:
        carry, last = block(carry, jax.tree.map(lambda x: x[blocks * size :], xs))
        seen = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), seen, last)
    return carry, seen
