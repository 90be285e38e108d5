"""What is given to `fit`, `init` and `evaluate`, checked by its kind: what was expected, what came, and the remedy."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.measures.measure import Measure

_REMEDY = "jt.data.pipeline(dataset, batch_size) makes them"


def check_batches(batches: Any, what: str) -> None:
    """Raises for what is a single batch, a data set or no collection at all, where batches are expected."""
    made = "jt.data.eval_batches" if what == "evaluate" else "jt.data.pipeline"
    remedy = f"{made}(dataset, batch_size) makes them of a jt.data.Dataset"
    if what == "evaluate_episodes":
        remedy = "jt.data.Episodes(dataset, ways, shots).test_set(count) makes them of a jt.data.Dataset"
    if isinstance(batches, Mapping):
        raise InputError(
            f"{what} takes batches one after the other, got a dict, which is one: give [batch], or {remedy}"
        )
    iterates = hasattr(batches, "__iter__") or hasattr(batches, "iterate")
    if hasattr(batches, "class_names") and hasattr(batches, "read") and not iterates:
        raise InputError(f"{what} takes batches, got a {type(batches).__name__}, which gives examples: {remedy}")
    arrays = isinstance(batches, tuple | list) and any(hasattr(one, "dtype") for one in batches)
    if arrays or hasattr(batches, "dtype"):
        raise InputError(
            f"{what} takes batches, dicts of arrays such as {{'image': ..., 'label': ...}}, got {_kind(batches)}: "
            f"{made}(jt.data.Dataset.from_arrays(images, labels), batch_size) makes them"
        )
    if isinstance(batches, str | bytes) or not iterates:
        raise InputError(f"{what} takes an iterable of batches, got {_kind(batches)}: {remedy}")


def check_kind(batch: Any) -> None:
    """Raises for examples or arrays in the place of a batch."""
    if batch is None or isinstance(batch, tuple | list | str) or hasattr(batch, "class_names"):
        raise InputError(
            f"a batch is a dict of arrays, such as {{'image': ..., 'label': ...}}; got {_kind(batch)}; {_REMEDY}"
        )


def check_batch(batch: Any) -> None:
    """Raises for a batch that is no dict of arrays of numbers, each with a leading dimension of 1 or more."""
    check_kind(batch)
    entries = batch if isinstance(batch, Mapping) else {}
    several = {name: entry for name, entry in entries.items() if isinstance(entry, tuple | list)}
    rows = {np.shape(leaf)[:1] for leaf in jax.tree.leaves({k: v for k, v in entries.items() if k not in several})}
    for name, entry in several.items():
        if not hasattr(entry, "_fields") and not _are_batches(entry, rows):
            raise InputError(f"batch[{name!r}] must be one array, got {_kind(entry)}; np.asarray or np.stack makes one")
    for path, leaf in tree.leaves_by_path(batch).items():
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
            continue  # a key for each example
        if getattr(dtype, "kind", "O" if not isinstance(leaf, int | float) else "f") in "OSUMm":
            kind = str(dtype) if dtype is not None else _kind(leaf)
            raise InputError(f"batches are of numbers; {path!r} is of {kind}: number the classes, with names beside")
    sizes = {path: np.shape(leaf)[:1] for path, leaf in tree.leaves_by_path(batch).items()}
    if not sizes:
        raise InputError("expected a batch of arrays; got an empty one")
    if scalars := [path for path, size in sizes.items() if not size]:
        raise InputError(f"every entry of a batch has a leading batch dimension; {scalars[0]!r} is a scalar")
    check_rows(batch)


def _are_batches(entry: tuple | list, rows: set[tuple[int, ...]]) -> bool:
    """Returns whether a sequence holds whole batches, views of the same examples say, and not one thing per example."""
    own = {np.shape(leaf)[:1] if hasattr(leaf, "dtype") else () for leaf in jax.tree.leaves(entry)}
    return len(own) == 1 and () not in own and (own <= rows if rows else isinstance(entry, tuple))


def check_rows(batch: Any) -> None:
    """Raises for a batch without rows, from the shapes alone."""
    if all(np.shape(leaf)[:1] != (0,) for leaf in jax.tree.leaves(batch)):  # of each step: paths would cost more
        return
    for path, leaf in tree.leaves_by_path(batch).items():
        if np.shape(leaf)[:1] == (0,):
            raise InputError(f"a batch needs a row or more; {path!r} has shape {np.shape(leaf)}")


def key_of(key: Any) -> jax.Array:
    """Returns the key of a run: one that `jax.random.key` gave, or that of a whole number, its seed."""
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if not -(2**63) <= key < 2**64:
            raise InputError(f"a seed is a whole number of at most 64 bits; got {str(key)[:40]}")
        return jax.random.key(key)
    shape, dtype = getattr(key, "shape", None), getattr(key, "dtype", None)
    old = dtype is not None and shape in ((2,), (4,)) and dtype == np.uint32  # of jax.random.PRNGKey
    if not (old or (dtype is not None and shape == () and jnp.issubdtype(dtype, jax.dtypes.prng_key))):
        raise InputError(f"key is a seed, such as 0, or one key, such as jax.random.key(0); got {_kind(key)}")
    return cast(jax.Array, key)


def check_objective(objective: Any) -> None:
    """Raises for what is no objective: a model, say."""
    if not (callable(objective) and hasattr(objective, "frozen")):
        raise InputError(
            f"expected an objective, such as jt.classification(model) gives; got a {type(objective).__name__}"
        )


def check_optimizer(optimizer: Any) -> None:
    """Raises for what is no optax optimiser."""
    if not (callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))):
        raise InputError(f"expected an optax optimiser, such as optax.adam(1e-3); got {_kind(optimizer)}")


def check_state(state: Any) -> None:
    """Raises for what is no state to evaluate: bare parameters, say."""
    if not (hasattr(state, "params") and hasattr(state, "step")):
        raise InputError(
            f"expected a state, such as fitted.state, or jt.TrainState.of(params) of parameters by model name; got a "
            f"{type(state).__name__}"
        )
    check_start(state.params, "params")


def check_start(values: Any, what: str) -> None:
    """Raises for weights or state to start from that are no dict of arrays by model name."""
    if values is None:
        return
    if not isinstance(values, Mapping):
        raise InputError(f"{what} is a dict by model name, such as fitted.state.{what}; got {_kind(values)}")
    for name, own in values.items():
        tree.check_arrays(own, f"{what}[{name!r}]")


def check_takes(function: Callable | None, name: str, *arguments: str) -> None:
    """Raises for a function that can't be called with so many arguments."""
    if function is None:
        return
    told = f"{name} is a function of ({', '.join(arguments)})"
    if isinstance(function, Measure):
        raise InputError(
            f"{told} that gives numbers by name; got the measure {function.name!r} of jt.measures, which is for "
            f"jt.evaluate(measures=)"
        )
    if not callable(function):
        raise InputError(f"{told}; got {_kind(function)}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of C, which doesn't tell
        return
    if name == "transform" and list(signature.parameters)[:2] == ["batch", "rng"]:
        raise InputError(
            f"{told}, inside of the compiled step; the one given takes {signature}, as augmentations do: they go to "
            f"jt.data.pipeline(dataset, batch_size, augment=)"
        )
    try:
        signature.bind(*arguments)
    except TypeError:
        raise InputError(f"{told}; the one given takes {signature}") from None


def lacking(error: KeyError, objective: Any, params: Any, state: Any) -> InputError | None:
    """Returns the error for a model, an average or a queue that an objective has and a state has nothing of."""
    name = error.args[0] if error.args else None
    if (
        name in params
        or name in state
        or name not in {*(model.name for model in objective.models), *objective.per_update}
    ):
        return None  # it is some other key: of the batch, say
    known = ", ".join(map(repr, sorted({*params, *state}))) or "nothing"
    return InputError(
        f"the objective runs {name!r}, of which the state has nothing; it has {known}. Evaluate the state of a run "
        f"that trained it, or an objective of what is there"
    )


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(one).__name__ for one in value[:3])}"
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{getattr(value, 'dtype', 'an array')} {tuple(shape)}"
    return f"{type(value).__name__} {str(value)[:40]!r}" if value is not None else "None"
