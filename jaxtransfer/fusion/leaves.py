"""Trees of one architecture, leaf by leaf: what of them is fused, what is averaged, and what stays.

All functions of this room run on the host, in NumPy: a leaf is computed in at least single precision, sums in double,
and comes back in its own type.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import tree
from jaxtransfer.errors import InputError

Combine = Callable[[str, list[np.ndarray], Any], np.ndarray]


def check_alike(models: Sequence[Any], *, names: Sequence[str] = ()) -> None:
    """Raises unless the models are of one architecture: the same paths, shapes and types, whatever order they are in.

    Args:
      models: trees, one or more.
      names: what the message calls the first of them; the others are "model 0", "model 1", ...

    Raises:
      InputError: names the first path that differs, and what both models have there.
    """
    called = _called(models, names)
    for number, model in enumerate(models):
        tree.check_arrays(model, called[number])
    flat = [tree.leaves_by_path(model) for model in models]
    for number, other in enumerate(flat[1:], 1):
        if found := next(_different(flat[0], other), None):
            path, one, two = found
            raise InputError(
                f"models of one architecture can be fused, but {called[0]} and {called[number]} differ at {path!r}: "
                f"{one} against {two}. Heads of other classes stay out of it, or are matched by "
                f"jt.fusion.match_heads; from another architecture knowledge moves by distillation"
            )


def check_finite(models: Sequence[Any], *, names: Sequence[str] = ()) -> None:
    """Raises where a parameter is NaN or infinite: in what is made of several models nobody could say whose it was.

    Args:
      models: trees of arrays, whose running state may be anything.
      names: as for `check_alike`.

    Raises:
      InputError: names the model and the first such path.
    """
    for called, model in zip(_called(models, names), models, strict=True):
        for path, leaf in tree.leaves_by_path(model).items():
            if is_mixed(leaf) and not is_state(model, path) and not np.all(np.isfinite(wide(leaf))):
                raise InputError(
                    f"models are fused by finite weights, but {called} has NaN or inf at {path!r}: has it diverged? "
                    f"Leave it out, or take an earlier checkpoint"
                )


def _called(models: Sequence[Any], names: Sequence[str]) -> list[str]:
    return [*names, *(f"model {number}" for number in range(len(models) - len(names)))]


def _different(first: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for path in (*first, *(path for path in other if path not in first)):
        one, two = (_described(flat[path]) if path in flat else "nothing" for flat in (first, other))
        if one != two:
            yield path, one, two


def _described(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def fused(models: Sequence[Any], combine: Combine, *, base: Any = None, state: Combine | None = None) -> Any:
    """Returns the tree that `combine` makes of the models, leaf by leaf.

    Of variables `{"params": ..., "batch_stats": ...}` it is the parameters that are combined. The running state beside
    them becomes its plain mean over the models, in which variances stay positive, unless `state` makes something else
    of it: a placeholder, which `jt.fusion.renewed` replaces. Leaves that are no floating-point numbers (counters,
    masks, keys) are those of the base, or of the first model. A tree without an entry `params` is parameters
    throughout.

    Args:
      models: trees of one architecture, one or more.
      combine: `combine(path, values, base) -> value`, arrays in at least float32; `base` is None without one.
      base: what all the models began as, where the method has one.
      state: makes one of the running state, as `combine` does of the parameters; its plain mean by default.

    Raises:
      InputError: where there is no model, they differ in paths, shapes or types, or parameters are not finite.
    """
    models = as_list(models)
    everyone = models if base is None else [base, *models]
    names = () if base is None else ("the base",)
    check_alike(everyone, names=names)
    check_finite(everyone, names=names)
    flat = [tree.leaves_by_path(model) for model in models]
    start = everyone[0]
    begun = tree.leaves_by_path(start)

    def leaf_of(key_path, leaf):
        path = tree.path_of(key_path)
        if not is_mixed(leaf):
            return leaf
        values, at = [wide(own[path]) for own in flat], None if base is None else wide(begun[path])
        if not is_state(start, path):
            return like(combine(path, values, at), leaf)
        if state is None:
            return like(sum(double(value) for value in values) / len(values), leaf)
        return like(state(path, values, at), leaf)

    return jax.tree_util.tree_map_with_path(leaf_of, start)


def as_list(models: Sequence[Any]) -> list[Any]:
    """Returns the models as a list; raises for what is none, or empty."""
    if isinstance(models, Mapping) or not isinstance(models, Sequence):
        raise InputError(f"expected the models as a list of trees; got a {type(models).__name__}")
    if not models:
        raise InputError("expected one model or more, got none")
    return list(models)


def is_state(variables: Any, path: str) -> bool:
    """Returns whether a leaf is running state: it stands in another collection beside `params`."""
    return isinstance(variables, Mapping) and "params" in variables and path.split("/")[0] != "params"


def is_mixed(leaf: Any) -> bool:
    """Returns whether a leaf holds numbers that can be mixed: floating-point ones."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def wide(leaf: Any) -> np.ndarray:
    """Returns a leaf on the host, in at least single precision."""
    value = np.asarray(jax.device_get(leaf))
    return value if value.dtype.itemsize >= 4 else value.astype(np.float32)


def double(value: np.ndarray) -> np.ndarray:
    """Returns an array in double precision, in which sums over models depend on no order."""
    return value.astype(np.result_type(value.dtype, np.float64))


def like(value: Any, leaf: Any) -> Any:
    """Returns a value in the type of a leaf: a NumPy array for one, otherwise an array placed as the leaf is."""
    narrow = np.asarray(value).astype(leaf.dtype)
    if not isinstance(leaf, jax.Array):
        return narrow
    return jax.device_put(narrow, leaf.sharding) if len(leaf.sharding.device_set) > 1 else jnp.asarray(narrow)


def weights_of(weights: Sequence[float] | None, count: int, *, default: float = 1.0) -> np.ndarray:
    """Returns the weights of the models [N], each of them `default` where none are given.

    Raises:
      InputError: where they are not one finite number a model.
    """
    if weights is None:
        return np.full(count, default)
    try:
        found = np.asarray(weights, np.float64)
    except (TypeError, ValueError):
        raise InputError(f"weights must be {count} numbers, one a model; got {weights!r}") from None
    if found.shape != (count,) or not np.all(np.isfinite(found)):
        raise InputError(f"weights must be {count} finite numbers, one a model; got {weights!r}")
    return found


def check_share(value: float, what: str, *, above: bool = False) -> None:
    """Raises unless a number is in [0, 1]; with `above` in (0, 1]."""
    if not (value > 0 if above else value >= 0) or not value <= 1:  # nor NaN
        raise InputError(f"{what} must be in {'(0' if above else '[0'}, 1]; got {value}")


def check_number(value: float, what: str) -> None:
    """Raises unless something is a finite number."""
    if not np.isscalar(value) or isinstance(value, str | bytes) or not np.isfinite(value):
        raise InputError(f"{what} must be a finite number; got {value!r}")
