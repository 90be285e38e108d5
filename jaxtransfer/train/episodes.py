"""Evaluation over episodes, each one weighing the same, with its 95 % interval."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtransfer.devices import processes
from jaxtransfer.devices.in_flight import InFlight
from jaxtransfer.devices.placement import Placement
from jaxtransfer.errors import InputError
from jaxtransfer.objective import Batch, Context, Objective
from jaxtransfer.parts.masking import check_masks
from jaxtransfer.train.arguments import check_batches, check_objective, check_state, lacking
from jaxtransfer.train.state import TrainState
from jaxtransfer.train.updates import updates_made


class Interval(NamedTuple):
    """A mean over episodes with its 95 % confidence interval, mean ± half.

    Attributes:
      mean: the mean.
      half: 1.96 · s / √n, s the standard deviation over the episodes (n - 1 in the denominator); 0 for one episode.
      episodes: n.
    """

    mean: float
    half: float
    episodes: int

    @classmethod
    def of(cls, values: np.ndarray) -> "Interval":
        """Returns the interval of the values [n], one per episode."""
        count = len(values)
        spread = float(np.std(values, ddof=1)) if count > 1 else 0.0
        return cls(float(np.mean(values)), 1.96 * spread / math.sqrt(count), count)

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.half:.4f}"


def evaluate_episodes(
    objective: Objective,
    state: TrainState,
    batches: Iterable[Batch],
    *,
    at_once: int | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Interval]:
    """Evaluates an objective over episodes, each by itself, as the few-shot literature reports it.

    Args:
      objective: an objective over episodes, such as `jt.maml` or `jt.meta.prototypical` gives.
      state: of which `params` and `state` are used; nothing changes.
      batches: batches of episodes [T, ...], such as `jt.data.Episodes.test_set` gives.
      at_once: episodes that run together by `vmap`, a divisor of T; by default one on a CPU, all of a batch elsewhere.
      mesh: the devices over which the episodes of a batch are split.

    Returns:
      For each metric the mean over the episodes and its 95 % interval.

    Raises:
      InputError: where there is no episode, or `at_once` does not divide T.
    """
    check_objective(objective)
    check_state(state)
    check_batches(batches, "evaluate_episodes")
    placement = Placement(mesh, "jit")
    frozen = placement.frozen(objective.frozen)
    step = updates_made(state.step, getattr(state, "opt_state", ()))
    weights = placement.whole(jax.device_put((state.params, state.state, step)), "state")
    alone = mesh is None and placement.devices is None

    def metrics_of(weights, episode, frozen):
        params, state, step = weights
        ctx = Context(step, None, dict(zip(objective.frozen, frozen, strict=True)), train=False)
        try:
            metrics = objective(params, state, jax.tree.map(lambda x: x[None], episode), ctx)[2]
        except KeyError as error:
            raise lacking(error, objective, params, state) or error from None
        return {name: metric.value for name, metric in metrics.items()}

    single = jax.jit(metrics_of)
    several = jax.jit(jax.vmap(metrics_of, in_axes=(None, 0, None)))
    parts: list[dict[str, jax.Array]] = []
    in_flight = InFlight()
    for batch in batches:
        check_masks(batch, on_host=True)
        count = jax.tree.leaves(batch)[0].shape[0]
        one_by_one = jax.default_backend() == "cpu" and alone
        size = at_once if at_once is not None else (1 if one_by_one else count)
        if size < 1 or count % size:
            raise InputError(f"at_once must divide the episodes of a batch: got {size} for {count} episodes")
        for first in range(0, count, size):
            in_flight.wait()
            if size == 1 and alone:
                one = jax.tree.map(lambda x, row=first: x[row], batch)
                parts.append(jax.tree.map(lambda x: x[None], single(weights, one, frozen)))
            else:
                chunk = jax.tree.map(lambda x, rows=slice(first, first + size): x[rows], batch)
                parts.append(several(weights, placement.batch(chunk), frozen))
            in_flight.add(parts[-1])
    if not parts:
        raise InputError("expected at least one episode to evaluate, got none")
    rows = processes.on_host(parts)
    return {name: Interval.of(np.concatenate([row[name] for row in rows]).astype(np.float64)) for name in rows[0]}
