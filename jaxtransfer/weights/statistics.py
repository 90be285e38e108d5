"""Batch statistics computed anew: those of other data, or those that belong to weights which no training made."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model, Variables, state_of
from jaxtransfer.parts.masking import check_masks

_PAIRS = {"mean": "var", "running_mean": "running_var", "0": "1"}  # siblings: a mean, and the variance around it
_LARGE = 2.0**20  # beside statistics; of it and its double single precision keeps the digits
_OF_EQUINOX = {"ema_first_time_index": (True, False), "batch_counter": (0, 2**30)}  # as the first update, as the last


def recompute_statistics(
    model: Model,
    variables: Variables,
    batches: Iterable[Mapping[str, Any]],
    *,
    view: str = "image",
    key: jax.Array | int = 0,
) -> dict[str, Any]:
    """Returns a model's variables with batch statistics that are those of `batches`, each example counting once.

    With μ_b, v_b the statistics that a layer normalises batch b of n_b examples by in training,

        μ = Σ_b n_b μ_b / Σ_b n_b,    v = Σ_b n_b (v_b + μ_b²) / Σ_b n_b − μ²,

    in place of the running averages, in which the last batches weigh most. On the data of another domain it is AdaBN
    (Li et al. 2016, arXiv:1603.04779: of one batch of all of them); on the training data it is what averaged or merged
    weights need (`jt.averaged`; Izmailov et al. 2018, arXiv:1803.05407). Of the first layer these are the mean and the
    variance of all examples at once, to rounding. Layers behind it see what it made of each batch by that batch's own
    statistics, as in training, so that theirs depend on the batches; large shuffled ones come close to all at once.

    It knows no layer, but runs the model in training mode and asks how its state follows: leaves that move to
    m·old + (1 − m)·new are averages, of our models, Linen, NNX and Equinox. The others, counters and the vectors of
    spectral norm say, and layers that run in inference mode (`model.inference(stages)`) keep theirs. Variances are told
    by their names, `var` beside `mean`; other averages become Σ n_b new_b / Σ n_b.

    Args:
      model: the model.
      variables: `{"params": ..., **state}`; they stay as they are.
      batches: such as `jt.data.eval_batches` gives; rows with `mask` 0 are left out. Those of training may be better,
        whose order is drawn: statistics of layers behind the first are then of mixed batches.
      view: the entry that the model sees.
      key: of what the model draws in training (dropout), which the statistics then hold as in training; or a seed.

    Returns:
      The variables, with the new statistics in the types of the old ones.

    Raises:
      InputError: for a model without statistics, or without any that move; for statistics that depend on the running
        ones (batch renormalisation), by path; and where there is no example.
    """
    state = state_of(variables)
    if not jax.tree.leaves(state):
        raise InputError(f"model {model.name!r} has no running state, so there are no statistics to compute anew")
    if isinstance(batches, Mapping) or hasattr(batches, "class_names"):
        raise InputError(
            f"recompute_statistics takes batches one after the other, got a {type(batches).__name__}: pass [batch], or "
            f"what jt.data.eval_batches(dataset, batch_size) makes"
        )
    old = {path: np.asarray(jax.device_get(leaf)) for path, leaf in tree.leaves_by_path(state).items()}
    rest = jax.device_put(model.complete({kind: own for kind, own in variables.items() if kind not in state}))

    @jax.jit
    def moved(rest, leaves, inputs, key):
        """Returns the state's leaves after a batch."""
        found = jax.tree_util.tree_map_with_path(lambda path, _: leaves[tree.path_of(path)], state)
        _, new = model.apply({**rest, **found}, inputs, train=True, key=key)
        return tree.leaves_by_path(new)

    drawn = jax.random.key(key) if isinstance(key, int) else key
    start, sums = {**{path: _wide(leaf) for path, leaf in old.items()}, **_flags(old, 0)}, _Sums()
    shares: dict[str, float] = {}
    quiet: list[str] = []
    for number, (inputs, count) in enumerate(_counted(batches, view)):

        def after(leaves, x=inputs, at=number):
            return jax.device_get(moved(rest, leaves, x, jax.random.fold_in(drawn, at)))

        new = after(start)
        if number and (late := [path for path in quiet if not np.array_equal(new[path], start[path])]):
            raise InputError(
                f"model {model.name!r}: {late[0]!r} didn't move in the first batch, as if all its inputs were 0, but "
                f"in a later one; begin with a batch of other examples"
            )
        if not number:
            quiet = [path for path in start if np.array_equal(new[path], start[path])]
            shares, first = _shares(model.name, start, new, after), new
            begun = {path: np.zeros_like(start[path]) if share else start[path] for path, share in shares.items()}
            new = after({**start, **begun})
            _check_alike(model.name, shares, (start, first), (begun, new))
            start |= begun  # from zero less is lost to rounding
        sums.add({path: _statistic(new[path], start[path], share) for path, share in shares.items()}, count)
    if not sums.count:
        raise InputError("recompute_statistics: expected at least one example, got none; is the split empty?")
    leaves = {**old, **_flags(old, 1), **sums.statistics()}
    return {
        **variables,
        **jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.asarray(leaves[tree.path_of(path)], leaf.dtype), state
        ),
    }


class _Sums:
    """Sums of statistics over batches, each weighted by its examples, in double precision."""

    def __init__(self):
        self.count = 0
        self._sums: dict[str, Any] = {}

    def add(self, found: Mapping[str, np.ndarray], count: int) -> None:
        """Adds the statistics of a batch."""
        self.count += count
        for path, value in found.items():
            mean = found.get(_mean_of(path))
            total = value if mean is None else value + mean**2
            self._sums[path] = self._sums.get(path, 0) + count * total

    def statistics(self) -> dict[str, np.ndarray]:
        """Returns the statistics of all batches."""
        means = {path: total / self.count for path, total in self._sums.items()}
        return {
            path: value if _mean_of(path) not in means else np.maximum(value - means[_mean_of(path)] ** 2, 0)
            for path, value in means.items()
        }


def _mean_of(path: str) -> str:
    """Returns the path of the mean around which the leaf at `path` is a variance; an empty one where it is none."""
    *above, name = path.split("/")
    found = [mean for mean, variance in _PAIRS.items() if variance == name]
    if not found or (name == "1" and not (above and above[-1].endswith("_state_index"))):
        return ""
    return "/".join((*above, found[0]))


def _flags(old: Mapping[str, Any], which: int) -> dict[str, np.ndarray]:
    """Returns what Equinox notes beside its statistics, as before the first update (0), or after many (1)."""
    named = {path: path.rsplit("/", 1)[-1] for path in old}
    return {p: np.asarray(_OF_EQUINOX[n][which], old[p].dtype) for p, n in named.items() if n in _OF_EQUINOX}


def _counted(batches: Iterable[Mapping[str, Any]], view: str) -> Iterable[tuple[Any, int]]:
    """Yields the inputs that count of each batch, and how many they are."""
    for batch in batches:
        if view not in batch:
            raise InputError(f"recompute_statistics reads batch[{view!r}], but the batch has {sorted(batch)}")
        check_masks(batch)
        inputs, mask = batch[view], batch.get("mask")
        if mask is not None and not np.all(keep := np.asarray(mask) > 0):
            inputs = jax.tree.map(lambda x, keep=keep: np.asarray(x)[keep], inputs)
        if count := len(jax.tree.leaves(inputs)[0]):
            yield inputs, count


def _shares(name: str, old: Mapping[str, Any], new: Mapping[str, Any], after: Any) -> dict[str, float]:
    """Returns, of the leaves that are moving averages, which share of the old value an update keeps.

    From the update of two large values: what a batch adds is then rounded away, and what the layers give in training
    depends on no running average. (Derivatives tell nothing: Flax's NNX stops them.)
    """
    moving = [p for p, leaf in old.items() if np.issubdtype(leaf.dtype, np.inexact) and np.any(new[p] != leaf)]
    large = [after({**old, **{p: np.full_like(old[p], n * _LARGE) for p in moving}}) for n in (1, 2)]
    shares = {}
    for path in moving:
        share = np.float64(large[1][path] - large[0][path]) / _LARGE
        if not np.all((share > -1e-6) & (share < 1 + 1e-6)) or np.ptp(share) > 1e-6:
            raise InputError(
                f"model {name!r}: its running state {path!r} is no moving average, so nothing tells what of it comes "
                f"from a batch"
            )
        if (kept := round(abs(float(np.median(share))), 6)) < 1:  # else it counts something
            shares[path] = kept  # the number that was rounded to single precision
    if not shares:
        raise InputError(f"no statistic of model {name!r} moves in training: does it run in inference mode?")
    return shares


def _wide(leaf: np.ndarray) -> np.ndarray:
    """Returns a floating leaf in at least single precision."""
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf


def _statistic(new: Any, old: Any, share: float) -> np.ndarray:
    """Returns what of an update is new."""
    return np.asarray((np.float64(new) - share * np.float64(old)) / (1 - share))


def _check_alike(name: str, shares: Mapping[str, float], one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    """Raises for a statistic of a batch that depends on the running ones: given two updates, (old, new) each."""
    for path, share in shares.items():
        first, again = (_statistic(new[path], old[path], share) for old, new in (one, other))
        rounding = 1e-5 * np.abs(one[0][path]).max() * share / (1 - share)
        if not np.all(np.abs(first - again) <= 1e-3 * (np.abs(first).max() + np.abs(again).max()) + rounding):
            raise InputError(
                f"model {name!r}: what the running statistic {path!r} takes from a batch depends on the running "
                f"ones, so there are no statistics of the data alone to compute; train on with the weights held still"
            )
