"""Dynamic loss scaling: what keeps gradients in the range of float16."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtransfer.errors import InputError
from jaxtransfer.parts.extra_arguments import taking

LOSS_SCALE, SKIPPED = "loss_scale", "skipped"
_LARGEST = 2.0**24  # what a float32 loss is multiplied by at most; float16 ends at 65,504


class LossScaled(NamedTuple):
    """The state of `loss_scaled`.

    Attributes:
      scale: s of the next update, float32 scalar.
      good: updates since the scale has changed, int32 scalar.
      overflowed: whether the last gradient was not finite, so that the update was skipped.
      floored: whether that was so with the smallest scale, which nothing can halve.
      inner_state: of the optimiser that it is around.
    """

    scale: Any
    good: Any
    overflowed: Any
    floored: Any
    inner_state: Any


def loss_scaled(
    optimizer: optax.GradientTransformation, *, initial: float = 2.0**15, every: int = 2000, smallest: float = 1.0
) -> optax.GradientTransformation:
    """Multiplies the loss by s before its gradient is taken, and divides the gradient by s: dynamic loss scaling.

    (Micikevicius et al. 2018, arXiv:1710.03740, §3.2.) Small gradients of a computation in float16 would round to zero,
    and a large s brings them into its range. Where a gradient is not finite the step makes no update: parameters, the
    optimiser's state, averages, queues and batch statistics stay, the step counts, and s ← max(s / 2, smallest). After
    `every` updates in a row s ← min(2 s, 2²⁴). Powers of two change no bits of gradients in range. The scale is part of
    the optimiser's state, so of checkpoints; the decision is made on the gradient over all devices, so it's one.

    The training step looks for it outermost: put it around everything else, `optax.MultiSteps` and `jt.optim.freeze`
    too. Of turns each may have its own. Metrics tell `loss_scale`, and `loss_scale/skipped`, 1 for an update that was
    skipped; `jt.fit` stops where s is the smallest and gradients still aren't finite. Gradients that are taken inside
    of an objective (inner loops of meta-learning, the terms of `jt.balance`) are not scaled.

    Args:
      optimizer: makes the updates.
      initial: s at first, a power of two.
      every: updates without an overflow after which s doubles.
      smallest: the floor of s, a power of two.

    Returns:
      An optimiser for `jt.train_step` and `jt.fit`; its own `update` takes gradients that are divided by s.

    Raises:
      InputError: for no powers of two or `initial` out of [smallest, 2²⁴], and `every` below 1; from `jt.train_step`
        where it stands inside of another optimiser.
    """
    powers = all(value > 0 and jnp.frexp(value)[0] == 0.5 for value in (initial, smallest))
    if not powers or not smallest <= initial <= _LARGEST:
        raise InputError(
            f"loss_scaled takes powers of two, smallest <= initial <= 2**24; got initial={initial}, smallest={smallest}"
        )
    if every < 1 or int(every) != every:
        raise InputError(f"loss_scaled doubles the scale every positive whole number of updates; got {every}")
    inner = taking(optimizer)

    def init(params) -> Any:
        no = jnp.zeros((), bool)
        return LossScaled(jnp.float32(initial), jnp.zeros((), jnp.int32), no, no, inner.init(params))

    def update(updates, state, params=None, **extra):
        fine = finite(updates)
        changes, inner_state = inner.update(updates, state.inner_state, params, **extra)
        changes = jax.tree.map(lambda leaf: jnp.where(fine, leaf, -jnp.zeros_like(leaf)), changes)  # −0 + −0 is −0
        good = jnp.where(fine, state.good + 1, 0)
        grown = jnp.where(good == every, jnp.minimum(2 * state.scale, _LARGEST), state.scale)
        scale = jnp.where(fine, grown, jnp.maximum(state.scale / 2, smallest))
        floored = ~fine & (state.scale <= smallest)
        kept = chosen(fine, inner_state, state.inner_state)
        return changes, LossScaled(scale, jnp.where(good == every, 0, good), ~fine, floored, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_of(opt_state: Any) -> Any:
    """Returns what the loss is multiplied by, or None.

    Raises:
      InputError: where loss scaling stands inside of another optimiser, which would see gradients that aren't finite.
    """
    if isinstance(opt_state, LossScaled):
        opt_state, scale = opt_state.inner_state, opt_state.scale
    else:
        scale = None
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, LossScaled))
    if any(isinstance(node, LossScaled) for node in leaves):
        raise InputError("loss_scaled must be the outermost optimiser: jt.optim.loss_scaled(optax.chain(...))")
    return scale


def finite(values: Any) -> Any:
    """Returns whether all numbers of a tree are finite."""
    fine = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(values)]
    return jnp.all(jnp.stack(fine)) if fine else jnp.ones((), bool)


def chosen(fine: Any, after: Any, before: Any) -> Any:
    """Returns a state as it is after an update, or as it was where that is not `fine`."""
    return jax.tree.map(lambda new, old: jnp.where(fine, new, old), after, before)


def told_of_scale(scale: Any, after: LossScaled, turn: str) -> dict[str, Any]:
    """Returns the metrics of an update: its scale, and whether it was skipped and may be, 0 or 1."""
    name = f"{LOSS_SCALE}/{turn}" if turn else LOSS_SCALE
    skipped = after.overflowed & ~after.floored
    return {name: scale, f"{name}/{SKIPPED}": skipped.astype(jnp.float32)}


def is_skip(name: str) -> bool:
    """Whether a metric tells that an update was skipped."""
    return name.startswith(f"{LOSS_SCALE}/") and name.endswith(f"/{SKIPPED}")
