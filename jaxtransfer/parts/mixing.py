"""The gradient of a sum whose terms don't simply add up: one pull-back for each task, mixed by a rule.

`jt.balance` marks terms with the `Task` that they are part of; an objective that has such terms is called through
`mixed`. Everything else, forwards, frozen trees, evaluation, the formula, is that of the sum.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import tree
from jaxtransfer.context import Context, Mean, named_key
from jaxtransfer.errors import InputError
from jaxtransfer.parts.gradient_averages import followed

Tree = Any
Rule = Callable[..., tuple[Any, Tree]]
FEW = 3  # tasks whose pairs are hardly more than they are
PIECE, MOST = 2**14, 64  # entries of a gradient that a cache holds of some tasks; pieces of one parameter at the most


@dataclasses.dataclass(frozen=True, eq=False)
class Mixing:
    """How the gradients of several tasks become one.

    Attributes:
      rule: `rule(gram, values, key, state) -> (weights, state)`, see `jt.balance`.
      count: T, the tasks.
      shared: path patterns of the parameters that it is for.
      name: under which its weights are reported, it draws, and its state is kept.
      cosines: whether those of all pairs of gradients are reported.
    """

    rule: Rule
    count: int
    shared: tree.Patterns
    name: str
    cosines: bool = False

    def said(self, what: str) -> Any:
        """Returns what the rule says of itself, None for nothing; a partial says what its function does."""
        return getattr(self.rule, what, None) or getattr(getattr(self.rule, "func", None), what, None)

    @property
    def remembers(self) -> bool:
        """Whether the rule has a state."""
        return self.said("init") is not None

    @property
    def average(self) -> Any:
        """How the rule averages the gradients over the updates, see `jt.multitask.averages`; None where it doesn't."""
        said = self.said("averages")
        return None if said is None else said(**getattr(self.rule, "keywords", {}))

    @property
    def kept(self) -> str:
        """The entry of the state that holds the averages of the gradients."""
        return f"{self.name}_gradients"

    @property
    def apart(self) -> bool:
        """Whether the gradient of each task is needed by itself."""
        return self.cosines or not self.said("of_values")

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
    numbers = {None: 0, **{task: number for number, task in enumerate(tasks, 1)}}

    def pulled(cotangents: Mapping[Any, Any]) -> Tree:
        """Returns the derivative of Σ cotangent · row."""
        chosen = [numbers[place] for place in cotangents]
        along = [jnp.asarray(c, rows[n].dtype) for n, c in zip(chosen, cotangents.values(), strict=True)]

        def changes(moved):
            changed = linear(moved)  # once: each call would be another pass backwards
            return [changed[number] for number in chosen]

        (gradient,) = jax.linear_transpose(changes, params)(along)
        return gradient

    found: dict[Mixing, Any] = {}
    gradients: dict[Mixing, list[Tree]] = {}
    for mixing in mixings:
        places = [(mixing, number) for number in range(mixing.count)]
        if mixing.apart:
            # The values are global on each device, so the mean over them is a task's gradient: what conflicts are
            # between.
            own = [pulled({place: 1.0}) for place in places]
            gradients[mixing] = own if ctx.axis is None else jax.lax.pmean(own, ctx.axis)
        seen = jnp.stack([rows[numbers[place]] for place in places])
        if mixing.average is not None:
            seen = seen.astype(jnp.promote_types(seen.dtype, jnp.float32))
            averaged = followed(state[mixing.kept], gradients[mixing], seen, mixing.average)
            gradients[mixing], moved = jax.lax.stop_gradient(averaged)
            new = {**new, mixing.kept: moved} if ctx.train else new
        found[mixing], memory, more = _weights(mixing, gradients.get(mixing), seen, new, ctx, _names(mixing, parts))
        if ctx.train:
            new = {**new, mixing.name: memory} if mixing.remembers else new
            if both := sorted(more.keys() & metrics.keys()):
                raise InputError(
                    f"a balance and something else report the metric {both[0]!r}; call one of them otherwise: "
                    f"jt.balance(..., name='other')"
                )
            metrics = {**metrics, **{name: Mean(value, jnp.ones_like(value)) for name, value in more.items()}}
    gradient = _joint(pulled, params, {mixing: found[mixing] for mixing in mixings if not mixing.apart})
    for mixing, own in gradients.items():
        gradient = _added(gradient, own, found[mixing], mixing, ctx)
    return (total, new, metrics), gradient


def _joint(pulled: Callable[[Mapping[Any, Any]], Tree], params: Tree, weights: Mapping[Mixing, Any]) -> Tree:
    """Returns the gradient of what needs none of a single task: one pass backwards of the weighted sum.

    Parameters that a mixing doesn't share get the unweighted sum of its tasks, by a pass as far back as they are.
    """
    differ = {m: a for m, a in weights.items() if not isinstance(a, np.ndarray)}  # those are 1 for all parameters
    for mixing in weights:
        tree.check_used(mixing.shared, tree.leaves_by_path(params), "shared")
    ones = {(mixing, number): 1.0 for mixing in weights for number in range(mixing.count)}

    def cotangents(kind: tuple[bool, ...]) -> dict[Any, Any]:
        shared = itertools.compress(differ.items(), kind)
        return {None: 1.0, **ones, **{(mixing, n): a[n] for mixing, a in shared for n in range(mixing.count)}}

    def kind_of(path) -> tuple[bool, ...]:
        return tuple(tree.matches(tree.path_of(path), mixing.shared) for mixing in differ)

    kinds = jax.tree_util.tree_map_with_path(lambda path, _: kind_of(path), params)
    structure = jax.tree.structure(params)
    by_leaf = structure.flatten_up_to(kinds)
    found = {kind: jax.tree.leaves(pulled(cotangents(kind))) for kind in dict.fromkeys(by_leaf)}
    return jax.tree.unflatten(structure, [found[kind][number] for number, kind in enumerate(by_leaf)])


def _weights(mixing: Mixing, gradients: Any, values: jax.Array, state: Tree, ctx: Context, names: list[str]):
    """Returns what a rule says: weights [T], or a function that mixes; its new state; and what is reported."""
    gram = None if gradients is None else gram_of(gradients, mixing.shared, ctx.still)
    memory = state[mixing.name] if mixing.remembers else {}
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32) if gram is None else gram.dtype)
    seen = jax.lax.stop_gradient((gram, values, memory))
    weights, memory = mixing.rule(*seen[:2], ctx.shared_key(mixing.name), seen[2])
    told = {}
    if not callable(weights):
        if jnp.shape(weights) != (mixing.count,):
            raise InputError(
                f"the rule {str(mixing)!r} must return one weight for each of the {mixing.count} tasks and its state; "
                f"got weights of shape {jnp.shape(weights)}"
            )
        if isinstance(weights, np.ndarray) and np.all(weights == 1):
            weights = np.ones(mixing.count, values.dtype)  # known to be the plain sum
        else:
            weights = jax.lax.stop_gradient(jnp.asarray(weights, values.dtype))
        told = {f"{mixing.name}/{name}": jnp.asarray(weights[n], values.dtype) for n, name in enumerate(names)}
    if mixing.remembers:
        memory = jax.lax.stop_gradient(_as_before(seen[2], memory, mixing))
    if mixing.cosines and gram is not None:
        lengths = jnp.sqrt(jnp.diagonal(gram))
        for one, other in itertools.combinations(range(mixing.count), 2):
            # Divided one after the other: a product of lengths may be too small for a number.
            cosine = _over(_over(gram[one, other], lengths[one]), lengths[other])
            told[f"{mixing.name}/cosine/{names[one]}/{names[other]}"] = jax.lax.stop_gradient(cosine)
    return weights, memory, told


def _over(value: jax.Array, by: jax.Array) -> jax.Array:
    """Returns the quotient, 0 where it would be by 0."""
    return jnp.where(by > 0, value / jnp.where(by > 0, by, 1), 0)


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
            products = _products([jnp.ravel(leaves[path]) for leaves in by_path])
            gram = gram + (products if flag is False else jnp.where(flag, 0, products))
    return gram


def _products(vectors: list[jax.Array]) -> jax.Array:
    """Returns the inner products [T, T] of T vectors.

    Of a few vectors pair by pair, which needs no memory; of more piece by piece, where each vector is read once: all
    side by side would be a copy of them.
    """
    if len(vectors) <= FEW:
        wide = [one.astype(jnp.promote_types(one.dtype, jnp.float32)) for one in vectors]
        pairs = itertools.combinations_with_replacement(range(len(wide)), 2)
        found = {pair: jnp.dot(*(wide[n] for n in pair), precision=jax.lax.Precision.HIGHEST) for pair in pairs}
        numbers = range(len(wide))
        return jnp.stack([jnp.stack([found[min(a, b), max(a, b)] for b in numbers]) for a in numbers])

    entries = len(vectors[0])
    piece = max(PIECE, -(-entries // MOST))
    whole, rest = divmod(entries, piece)

    def of_piece(number, size=piece):
        rows = jnp.stack([jax.lax.dynamic_slice_in_dim(one, number * piece, size) for one in vectors])
        rows = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
        return jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)

    found = of_piece(whole, rest)
    if whole:
        found = jax.lax.fori_loop(0, whole, lambda number, total: total + of_piece(number), found)
    return found


def _added(total: Tree, gradients: list[Tree], weights: Any, mixing: Mixing, ctx: Context) -> Tree:
    """Returns a gradient plus the mixture of those of the tasks; their sum where the parameters are not shared."""
    key = ctx.shared_key(mixing.name) if callable(weights) else None

    def leaf(path, total, *own):
        if not tree.matches(tree.path_of(path), mixing.shared):
            for gradient in own:
                total = total + gradient
        elif callable(weights):
            drawn = None if key is None else named_key(key, tree.path_of(path))
            total = total + weights(jnp.stack(own), drawn)
        else:
            wide = jnp.promote_types(total.dtype, weights.dtype)
            for number, gradient in enumerate(own):
                total = total + weights[number] * gradient.astype(wide)
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
