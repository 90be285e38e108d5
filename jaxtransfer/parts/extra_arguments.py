"""What a step tells an optimiser beside the gradient, its loss say: each is given what its update has a name for."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax

GRAD_FN = "grad_fn"


def as_told(params: Any, value: Any) -> dict[str, Any]:
    """Returns extra arguments such as a step has, of a simple loss in place of its own: to trace an update by.

    Args:
      params: that the update moves.
      value: of the loss, a scalar.
    """

    def value_fn(params):
        return value + sum(jnp.sum(leaf).astype(value.dtype) for leaf in jax.tree.leaves(params))

    def grad_fn(params, *_):
        return jax.grad(value_fn)(params)

    return {"value": value, "grad": params, "value_fn": value_fn, GRAD_FN: grad_fn}


def update_by(optimizer: optax.GradientTransformation, grads: Any, state: Any, params: Any, known: dict[str, Any]):
    """Returns the update of an optimiser, told of `grad_fn` only where it names that, or can't make one without.

    What is in an `optax.chain` is told everything that the chain is, and the line searches of optax refuse a `grad_fn`,
    which `optax.contrib.sam` needs.
    """
    if GRAD_FN in inspect.signature(optimizer.update).parameters:
        return optimizer.update(grads, state, params, **known)
    few = {name: value for name, value in known.items() if name != GRAD_FN}
    try:
        return optimizer.update(grads, state, params, **few)
    except (TypeError, ValueError) as error:
        if GRAD_FN not in known:
            raise
        try:
            return optimizer.update(grads, state, params, **known)
        except (TypeError, ValueError):
            raise error from None


def taken(optimizer: optax.GradientTransformationExtraArgs, known: dict[str, Any]) -> dict[str, Any]:
    """Returns what of the known extra arguments the update of an optimiser takes."""
    parameters = inspect.signature(optimizer.update).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return known
    return {name: value for name, value in known.items() if name in parameters}


def taking(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns an optimiser that may be told anything, and passes on what the given one takes.

    `optax.with_extra_args_support` passes on all or nothing: `optax.contrib.sam`, which takes `grad_fn` alone, fails
    where it is told of more.
    """
    inner = optax.with_extra_args_support(optimizer)

    @functools.wraps(inner.update)  # so that the signature tells what it has a name for
    def update(updates, state, params=None, **extra):
        return inner.update(updates, state, params, **taken(inner, extra))

    return optax.GradientTransformationExtraArgs(inner.init, update)


def of_part(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns an optimiser of those parameters that no `optax.MaskedNode` stands for, told the gradient of those alone.

    What it is told of the loss as a function is to be one of such a part, as `in_parts` makes it. Of an empty part it
    knows nothing: there is nothing to do.
    """
    inner = taking(optimizer)

    def init(params):
        return inner.init(params) if jax.tree.leaves(params) else optax.EmptyState()

    @functools.wraps(inner.update)
    def update(updates, state, params=None, **extra):
        if not jax.tree.leaves(updates):
            return updates, state
        if "grad" in extra:
            extra |= {"grad": _where_masked(updates, updates, extra["grad"])}
        return update_by(inner, updates, state, params, extra)

    return optax.GradientTransformationExtraArgs(init, update)


def in_parts(optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Returns an optimiser whose inner ones, `of_part`, are told the loss as a function of their own parameters.

    The other parameters are where the update begins: an `optax.lbfgs` of the head searches along the head's direction.
    """

    def update(updates, state, params=None, **extra):
        def whole(part):
            return _where_masked(part, params, part)

        if value_fn := extra.get("value_fn"):
            extra |= {"value_fn": lambda part, *rest: value_fn(whole(part), *rest)}
        if grad_fn := extra.get(GRAD_FN):
            extra |= {GRAD_FN: lambda part, *rest: _where_masked(part, part, grad_fn(whole(part), *rest))}
        return optimizer.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _where_masked(part: Any, masked: Any, shown: Any) -> Any:
    """Returns the leaves of `masked` where those of `part` are `optax.MaskedNode`, else those of `shown`."""

    def chosen(leaf, there, here):
        return there if isinstance(leaf, optax.MaskedNode) else here

    return jax.tree.map(chosen, part, masked, shown, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))
