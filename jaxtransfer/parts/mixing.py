"""The gradient of a sum whose terms don't simply add up: one pull-back for each task, mixed by a rule.

`jt.balance` marks terms with the `Task` that they are part of; an objective that has such terms is called through
`mixed`. Everything else, forwards, frozen trees, evaluation, the formula, is that of the sum.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import tree
from jaxtransfer.context import Context, Mean
from jaxtransfer.errors import InputError

Tree = Any
Rule = Callable[[jax.Array, jax.Array, Any, Tree], tuple[jax.Array, Tree]]


@dataclasses.dataclass(frozen=True, eq=False)
class Mixing:
    """How the gradients of several tasks become one.

    Attributes:
      rule: `rule(gram, values, key, state) -> (weights, state)`, see `jt.balance`.
      count: T, the tasks.
      shared: path patterns of the parameters that it is for.
      name: under which its weights are reported, it draws, and its state is kept.
      remembers: whether the rule has a state.
    """

    rule: Rule
    count: int
    shared: tree.Patterns
    name: str
    remembers: bool

    def __str__(self):
        function = getattr(self.rule, "func", self.rule)  # of a partial
        return getattr(function, "__name__", type(function).__name__)


class Task(NamedTuple):
    """The place of a term: one of the tasks that are mixed."""

    mixing: Mixing
    number: int


def mixed(objective: Any, params: Tree, state: Tree, batch: Mapping[str, Any], ctx: Context):
    """Runs an objective with marked terms: `(loss, state, metrics)`, the gradient of the loss the mixed one.

    The loss is the sum's. Its derivative in the parameters is defined to be the mixture, computed together with the
    value from one run of the forwards; a second derivative takes the weights of the mixture as constants. Nothing else
    is differentiated: neither the state nor the batch.
    """
    handles = tuple(ctx.frozen)
    given = (state, batch, ctx.step, ctx.key, tuple(ctx.frozen[handle] for handle in handles))

    def run(params, given, *, differentiated):
        state, batch, step, key, frozen = given
        own = dataclasses.replace(ctx, step=step, key=key, frozen=dict(zip(handles, frozen, strict=True)))
        return _run(objective, params, state, batch, own, differentiated=differentiated)

    @jax.custom_jvp
    def call(params, given) -> Any:
        return run(params, given, differentiated=ctx.train)[0]

    @call.defjvp
    def _(primals, tangents) -> Any:
        found, gradient = run(*primals, differentiated=True)
        loss, *others = found
        slopes = jax.tree.map(lambda g, moved: jnp.sum(g.astype(moved.dtype) * moved), gradient, tangents[0])
        slope = sum(jax.tree.leaves(slopes), start=jnp.zeros((), loss.dtype))
        return found, (slope.astype(loss.dtype), *jax.tree.map(_no_tangent, others))

    return call(params, given)


def _run(objective: Any, params: Tree, state: Tree, batch: Any, ctx: Context, *, differentiated: bool):
    """Returns `(loss, state, metrics)` and, where asked for, the gradient."""
    parts, metrics = objective.summed.parts, {}
    mixings = _mixings(parts)
    tasks = [(mixing, number) for mixing in mixings for number in range(mixing.count)]

    def values_of(params):
        outputs, new = objective.run(params, state, batch, ctx)
        values, new, metrics = objective.summed.values(outputs, params, new, batch, ctx)
        total = values[0]
        for value in values[1:]:
            total = total + value
        rows: dict[Any, Any] = {None: jnp.zeros_like(total), **{task: jnp.zeros_like(total) for task in tasks}}
        for value, (_, term) in zip(values, parts, strict=True):
            place = None if term.task is None else (term.task.mixing, term.task.number)
            rows[place] = rows[place] + value
        return tuple(rows.values()), (total, new, metrics)

    if not differentiated:
        return values_of(params)[1], None
    # Linearised once; transposed for each row, so that what a task doesn't read costs it no pass backwards.
    rows, linear, (total, new, metrics) = jax.linearize(values_of, params, has_aux=True)
    pulled = []
    for number, row in enumerate(rows):
        (gradient,) = jax.linear_transpose(lambda moved, n=number: linear(moved)[n], params)(jnp.ones_like(row))
        # The values are global on each device, so the mean over them is a task's gradient: what conflicts are between.
        pulled.append(gradient if ctx.axis is None else jax.lax.pmean(gradient, ctx.axis))
    gradient, *others = pulled
    values = list(rows[1:])
    for mixing in mixings:
        own, others = others[: mixing.count], others[mixing.count :]
        seen, values = values[: mixing.count], values[mixing.count :]
        weights, memory = _weights(mixing, own, jnp.stack(seen), new, ctx)
        gradient = _added(gradient, own, weights, mixing)
        if ctx.train:
            new = {**new, mixing.name: memory} if mixing.remembers else new
            told = {f"{mixing.name}/{name}": weights[n] for n, name in enumerate(_names(mixing, parts))}
            if both := sorted(told.keys() & metrics.keys()):
                raise InputError(
                    f"a balance and something else report the metric {both[0]!r}; call one of them otherwise: "
                    f"jt.balance(..., name='other')"
                )
            metrics = {**metrics, **{name: Mean(weight, jnp.ones_like(weight)) for name, weight in told.items()}}
    return (total, new, metrics), gradient


def _weights(mixing: Mixing, gradients: list[Tree], values: jax.Array, state: Tree, ctx: Context):
    """Returns what a rule says: weights [T] in the type of the Gram matrix, and its new state."""
    gram = gram_of(gradients, mixing.shared, ctx.still)
    memory = state[mixing.name] if mixing.remembers else {}
    seen = jax.lax.stop_gradient((gram, values.astype(gram.dtype), memory))
    weights, memory = mixing.rule(*seen[:2], ctx.shared_key(mixing.name), seen[2])
    if jnp.shape(weights) != (mixing.count,):
        raise InputError(
            f"the rule {str(mixing)!r} must return one weight for each of the {mixing.count} tasks and its state; got "
            f"weights of shape {jnp.shape(weights)}"
        )
    if mixing.remembers:
        memory = _as_before(seen[2], memory, mixing)
    return jax.lax.stop_gradient((jnp.asarray(weights, gram.dtype), memory))


def _as_before(old: Tree, new: Tree, mixing: Mixing) -> Tree:
    """Returns a rule's new state, raising where it isn't like the old one: the next step would be another program."""
    before, after = ({path: _told(leaf) for path, leaf in tree.leaves_by_path(one).items()} for one in (old, new))
    if jax.tree.structure(old) != jax.tree.structure(new) or before != after:
        raise InputError(
            f"the rule {str(mixing)!r} must return a state of the structure, shapes and types of the one that it was "
            f"given, {before}; got {after}"
        )
    return jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), old, new)  # of a strong type


def _told(leaf: Any) -> str:
    return f"{jnp.result_type(leaf)} {jnp.shape(leaf)}"


def gram_of(gradients: list[Tree], shared: tree.Patterns = ".*", still: Mapping[str, Tree] | None = None) -> jax.Array:
    """Returns the inner products [T, T] of T gradients over the parameters that the patterns select.

    Summed up leaf by leaf, in at least float32; without those that are `still`, as `Context.still` holds them.

    Raises:
      InputError: where a pattern selects nothing.
    """
    by_path = [tree.leaves_by_path(gradient) for gradient in gradients]
    tree.check_used(shared, by_path[0], "shared")
    held = tree.leaves_by_path(still or {})
    gram = jnp.zeros((len(gradients), len(gradients)))
    for path in by_path[0]:
        if tree.matches(path, shared) and (flag := held.get(path, False)) is not True:
            leaves = [jnp.ravel(leaves[path]) for leaves in by_path]
            rows = jnp.stack([leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves])
            products = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
            gram = gram + (products if flag is False else jnp.where(flag, 0, products))
    return gram


def _added(total: Tree, gradients: list[Tree], weights: jax.Array, mixing: Mixing) -> Tree:
    """Returns a gradient plus the mixture of those of the tasks; their sum where the parameters are not shared."""

    def leaf(path, total, *own):
        wide = jnp.promote_types(total.dtype, weights.dtype)
        mine = tree.matches(tree.path_of(path), mixing.shared)
        for number, gradient in enumerate(own):
            total = total + (weights[number] * gradient.astype(wide) if mine else gradient)
        return total.astype(own[0].dtype)

    return jax.tree_util.tree_map_with_path(leaf, total, *gradients)


def _mixings(parts: Any) -> list[Mixing]:
    """Returns the mixings of a sum in the order of its terms, each of them whole."""
    numbers: dict[Mixing, set[int]] = {}
    for _, term in parts:
        if term.task is not None:
            numbers.setdefault(term.task.mixing, set()).add(term.task.number)
    for mixing, found in numbers.items():
        if len(found) < mixing.count:
            raise InputError(
                f"{len(found)} of the {mixing.count} tasks that jt.balance weighs against each other stand alone here; "
                f"train the whole of it, or the terms that it was made of"
            )
    return list(numbers)


def _names(mixing: Mixing, parts: Any) -> list[str]:
    """Returns what the tasks are called: by their terms."""
    names: list[list[str]] = [[] for _ in range(mixing.count)]
    for _, term in parts:
        if term.task is not None and term.task.mixing is mixing:
            names[term.task.number].append(term.name or "objective")
    told = ["+".join(own) for own in names]
    return [name if told.count(name) == 1 else f"{name} {number}" for number, name in enumerate(told)]


def _no_tangent(leaf: Any) -> Any:
    """Returns the tangent of what is not differentiated."""
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return jnp.zeros_like(leaf)
    return np.zeros(jnp.shape(leaf), jax.dtypes.float0)
