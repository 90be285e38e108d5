"""What a delta is made of: a pair of pure functions over the parameters that a path pattern selects."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import tree
from jaxtransfer.context import named_key
from jaxtransfer.deltas.weight import KERNELS, Layout, Weight, Weights, input_axes
from jaxtransfer.errors import InputError

Tree = Any
Choose = Callable[[Weights, tree.Patterns | None, Layout | None], dict[str, Weight]]
_P = ParamSpec("_P")


def nothing(*_: Any) -> dict[str, Any]:
    """Returns what a part reads or begins as that has no such thing."""
    return {}


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A difference Δ of weights, as pure functions; `jt.deltas.lora(8)` makes one, `leafwise` one of your own.

    Attributes:
      init: `init(key, weights) -> params`, the fresh parameters of the delta, nested by the paths of the base, where Δ
        is zero.
      merge: `merge(weights, params, fixed) -> {path: array}`, the chosen parameters with the delta in them.
      choose: `choose(weights, only, as_matrix) -> weights`, what of the base it changes.
      fixed: `fixed(weights) -> tree`, what it reads besides and nobody trains: random matrices, those that it began as.
        It is computed once, from the base alone, and travels as the base does.
      begin: `begin(weights, fixed) -> {path: array}`, what it makes of the base before it has trained, where that is
        not the base itself: a part that goes on from given parameters.
      drop: `drop(key, weights, params) -> params`, what a step of training leaves of the parameters: dropout. It is off
        in evaluation, in merging, and of parameters that an optimiser freezes.
      only: path patterns of the parameters of the base that it is for; None for what the part is made for.
      as_matrix: input axes by path pattern, for layers that `input_axes` does not know.
      description: how it was made, as JSON holds it; None where an argument is no plain data.
      parts: those that it is made of, by the first key of their parameters.
    """

    init: Callable[[jax.Array, Weights], Tree]
    merge: Callable[[Weights, Tree, Tree], dict[str, Any]]
    choose: Choose
    fixed: Callable[[Weights], Tree] = nothing
    begin: Callable[[Weights, Tree], dict[str, Any]] = nothing
    drop: Callable[[jax.Array, Weights, Tree], Tree] | None = None
    only: tree.Patterns | None = None
    as_matrix: Layout | None = None
    description: Mapping[str, Any] | None = None
    parts: Mapping[str, "Part"] = dataclasses.field(default_factory=dict)

    def on(self, only: tree.Patterns | None = None, *, as_matrix: Layout | None = None) -> "Part":
        """Returns the same part for other parameters of the base.

        Args:
          only: path patterns; those that it has by default.
          as_matrix: from path patterns to the axes of a parameter that are inputs; see `jt.deltas.input_axes`.
        """
        where = {"only": self.only if only is None else tree.as_patterns(only)}
        where["as_matrix"] = self.as_matrix if as_matrix is None else dict(as_matrix)
        return dataclasses.replace(self, **where)

    def chosen(self, weights: Weights) -> dict[str, Weight]:
        """Returns what of the base it changes.

        Raises:
          InputError: for a pattern that selects nothing that it can change.
        """
        if self.only is not None:
            tree.check_used(self.only, weights, "only")
        tree.check_used(self.as_matrix or {}, weights, "as_matrix")
        return self.choose(weights, self.only, self.as_matrix)

    def fresh(self, key: jax.Array, weights: Weights) -> Tree:
        """Returns the first parameters of the delta, of all parameters of the base."""
        return self.init(key, self.chosen(weights))

    def constants(self, weights: Weights) -> Tree:
        """Returns what it reads besides, of all parameters of the base."""
        return self.fixed(self.chosen(weights))

    def merged(self, weights: Weights, params: Tree, fixed: Tree) -> dict[str, Weight]:
        """Returns all parameters of the base, the chosen ones with the delta in them."""
        return with_values(weights, self.merge(self.chosen(weights), params, fixed))

    def dropped(self, key: jax.Array, weights: Weights, params: Tree) -> Tree:
        """Returns what a step of training leaves of the parameters, given all parameters of the base."""
        return params if self.drop is None else self.drop(key, self.chosen(weights), params)

    def begun(self, weights: Weights, fixed: Tree) -> dict[str, Weight]:
        """Returns all parameters as a part that stands behind this one sees them when it begins."""
        return with_values(weights, self.begin(self.chosen(weights), fixed))


def with_values(weights: Weights, values: Mapping[str, Any]) -> dict[str, Weight]:
    """Returns the weights, those that have a new value with that."""
    return {path: weight.named(values[path]) if path in values else weight for path, weight in weights.items()}


def at(params: Tree, path: str) -> Any:
    """Returns what stands at a path of nested dicts; an empty dict where nothing does."""
    for key in path.split("/"):
        if key not in params:
            return {}
        params = params[key]
    return params


def leafwise(
    init: Callable[[jax.Array, Weight], Any],
    merge: Callable[..., jax.Array],
    *,
    choose: "Choose | None" = None,
    fixed: Callable[[Weight], Any] | None = None,
    drop: Callable[[jax.Array, Any], Any] | None = None,
) -> Part:
    """Returns the part that changes each chosen parameter by itself.

    Args:
      init: `init(key, weight) -> params` of one of them; the key depends on its path alone.
      merge: `merge(weight, params) -> array` in the parameter's shape; with `fixed`, `merge(weight, params, fixed)`.
      choose: what it changes; `matrices` by default.
      fixed: `fixed(weight) -> tree`, what it reads besides.
      drop: `drop(key, params) -> params`, what a step of training leaves of the parameters of one; all by default.
    """

    def fresh(key, weights):
        return tree.nested({path: init(named_key(key, path), weight) for path, weight in weights.items()})

    def merged(weights, params, read):
        besides = {path: () if fixed is None else (at(read, path),) for path in weights}
        return {path: merge(weight, at(params, path), *besides[path]) for path, weight in weights.items()}

    def constants(weights):
        return {} if fixed is None else tree.nested({path: fixed(weight) for path, weight in weights.items()})

    def dropping(one):
        def dropped(key, weights, params):
            return tree.nested({path: one(named_key(key, path), at(params, path)) for path in weights})

        return dropped

    chosen = matrices if choose is None else choose
    return Part(fresh, merged, chosen, constants, drop=None if drop is None else dropping(drop))


def matrices(weights: Weights, only: tree.Patterns | None, as_matrix: Layout | None) -> dict[str, Weight]:
    """Chooses what layers multiply by: kernels, and embeddings where a pattern names them.

    Raises:
      InputError: for a pattern that selects none, and for a parameter whose input axes can't be told.
    """
    found = {}
    for path, weight in weights.items():
        named = path.split("/")[-1] in KERNELS or tree.matches(path, tuple(as_matrix or ()))
        if (named if only is None else tree.matches(path, only)) and (
            axes := input_axes(path, weights, as_matrix)
        ) is not None:
            found[path] = dataclasses.replace(weight, inputs=axes)
    return some(found, weights, only, "no kernel")


def some(found: dict[str, Weight], weights: Weights, only: Any, what: str) -> dict[str, Weight]:
    """Returns what was chosen; raises where it is nothing."""
    if found:
        return found
    selected = [f"{p} {list(w.shape)}" for p, w in weights.items() if only is None or tree.matches(p, only)]
    raise InputError(f"only={only!r} selects {what} for this delta to change; it selects {tree.listed(selected)}")


def anything(weights: Weights, only: tree.Patterns | None, as_matrix: Layout | None) -> dict[str, Weight]:
    """Chooses every floating-point parameter that the patterns select."""
    found = {path: weight for path, weight in weights.items() if only is None or tree.matches(path, only)}
    return some({p: w for p, w in found.items() if jnp.issubdtype(w.held.dtype, jnp.inexact)}, weights, only, "nothing")


def check_whole(value: Any, what: str, least: int = 1) -> None:
    """Raises for what is no whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{what} must be a whole number, {least} or more; got {value!r}")


def check_share(value: float, what: str) -> None:
    """Raises for what is no probability below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 <= value < 1:
        raise InputError(f"{what} must be a number from 0 to below 1; got {value!r}")


def check_parts(parts: Mapping[str, Any], what: str) -> None:
    """Raises where what should be a part is something else."""
    for name, part in parts.items():
        if not isinstance(part, Part):
            raise InputError(f"{what} takes parts, such as jt.deltas.lora(8); {name!r} is a {type(part).__name__}")


def check_params(part: "Part", weights: Weights, params: Tree, what: str) -> None:
    """Raises where parameters are not those that a part has on the chosen weights, by path and shape."""
    expected = jax.eval_shape(lambda key: part.init(key, weights), jax.random.key(0))
    if any(wrong := tree.differences(tree.leaves_by_path(expected), tree.leaves_by_path(params))):
        raise InputError(f"{what}: the parameters are not those of this delta on this base {wrong}")


def check_rank(rank: int, weight: Weight, limit: int | None = None) -> None:
    """Raises for a rank that a matrix cannot have."""
    most = min(weight.rows, weight.columns) if limit is None else limit
    if rank > most:
        raise InputError(
            f"rank {rank} is above that of {weight.path!r}, a matrix {weight.rows} × {weight.columns} whose rank is "
            f"{most} at most: take a lower rank, or leave it out of only="
        )


_LATER = {"dropout": 0.0, "tucker": False}
"""Arguments that came later, as they are off: a part without them notes what it noted before."""


def described(build: Callable[_P, Part]) -> Callable[_P, Part]:
    """Returns the constructor `build`, which also notes in the part how to make it again: `jt.deltas.rebuild`."""
    signature = inspect.signature(build)

    @functools.wraps(build)
    def made(*args: _P.args, **kwargs: _P.kwargs) -> Part:
        part, call = build(*args, **kwargs), signature.bind(*args, **kwargs)
        call.apply_defaults()
        arguments = {name: _as_data(value) for name, value in call.arguments.items() if _LATER.get(name, ...) != value}
        known = all(value is not NotImplemented for value in arguments.values())
        return dataclasses.replace(
            part, description={"kind": build.__name__, "arguments": arguments} if known else None
        )

    return made


def _as_data(value: Any) -> Any:
    """Returns an argument as JSON holds it, a named function by its name; NotImplemented for what it can't hold."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        own = [_as_data(entry) for entry in value]
        return NotImplemented if any(entry is NotImplemented for entry in own) else own
    ours = callable(value) and getattr(value, "__module__", "").startswith("jaxtransfer.deltas")
    name = getattr(value, "__qualname__", "<")
    return name if ours and "<" not in name else NotImplemented  # one made within a function can't be found again
