"""What a loss may know besides its inputs, how it averages over all devices, and how it draws."""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model, given
from jaxtransfer.weights import Frozen

Tree = Any


class Mean(NamedTuple):
    """A metric as (total, count), so that means over batches and devices are exact: added up, divided once."""

    total: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]

    @property
    def value(self) -> jax.Array:
        """The mean; zero where nothing was counted (every example masked)."""
        none = self.count == 0  # a count that is not a number stays one
        return jnp.where(none, 0, self.total / jnp.where(none, 1, self.count))


@dataclasses.dataclass(frozen=True)
class Context:
    """What a loss may know besides its inputs.

    Attributes:
      step: the number of updates made so far, int32 scalar; under gradient accumulation fewer than batches.
      key: the run's key, under gradient accumulation the batch's; `draw_key` derives from it. None where nothing may
        be drawn (evaluation).
      frozen: the traced value of each frozen tree; `read` looks one up.
      axis: the device axis under `pmap`; None under `jit`, where the batch is global by itself.
      train: false in evaluation.
      still: which parameters this update leaves as they are: for each model of which something is frozen a tree like
        its parameters, of bools or traced scalars. Frozen layers run in inference mode; `how` hands it on.
      later: whether another update of the same step came before, of turns: moving averages then follow in step 0, too.
      steps: in evaluation, by the name of a turn: the updates that it has made, where they alternate.

    Only `sum`, `mean` and `gather` communicate between devices; a loss built on them, and on draws by `shared_key`
    where they are not of single rows, is the global, replicated one.
    """

    step: Any = 0
    key: Any = None
    frozen: Mapping[Frozen, Tree] = dataclasses.field(default_factory=dict)
    axis: str | None = None
    train: bool = True
    still: Mapping[str, Tree] = dataclasses.field(default_factory=dict)
    later: bool = False
    steps: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def how(self, model: Model | str, params: Tree = None) -> dict[str, Any]:
        """Returns how a model that trains is applied: its arguments besides variables, inputs and key.

        A model that is frozen as a whole runs in inference mode.

        Args:
          model: the model, or the name under which it trains.
          params: those that it runs on; needed for twins alone.
        """
        still = None
        if self.train:
            still = self.still.get(model) if isinstance(model, str) else model.held_still(self.still, params)
        if still is not None and all(flag is True for flag in jax.tree.leaves(still)):
            return {"train": False}
        return {"train": self.train, **given(axis=self.axis if self.train else None, still=still)}

    def read(self, handle: Frozen) -> Tree:
        """Returns the frozen tree behind `handle`, cut off from differentiation."""
        return jax.lax.stop_gradient(self.frozen.get(handle, handle.tree))

    def sum(self, values: jax.Array) -> jax.Array:
        """Returns the sum of all entries over all devices, in at least float32."""
        total = jnp.sum(values, dtype=jnp.promote_types(values.dtype, jnp.float32))
        return total if self.axis is None else jax.lax.psum(total, self.axis)

    def mean(self, values: jax.Array, mask: jax.Array | None = None) -> Mean:
        """Returns the mean of per-example `values` [B] over the global batch, weighted by `mask` [B] (0 leaves out)."""
        if mask is not None and mask.shape != values.shape:
            raise InputError(f"mask must have one entry for each of the values {values.shape}; got {mask.shape}")
        dtype = jnp.promote_types(values.dtype, jnp.float32)
        weights = jnp.ones(values.shape, dtype) if mask is None else mask.astype(dtype)
        kept = jnp.where(weights > 0, values.astype(dtype), 0) * weights
        return Mean(self.sum(kept), self.sum(weights))

    def gather(self, values: jax.Array) -> jax.Array:
        """Returns the rows [B, ...] of all devices, in order: what a loss needs in which examples meet."""
        return values if self.axis is None else jax.lax.all_gather(values, self.axis, tiled=True)

    def draw_key(self, name: str, *view: str) -> jax.Array | None:
        """Returns the key of this step for `name` and `view`: by name, so another term changes no draw of this one.

        Under `pmap` devices draw differently, each for its rows. None in evaluation, where nothing is drawn.
        """
        key = self.shared_key("/".join((name, *view)))
        return key if key is None or self.axis is None else jax.random.fold_in(key, jax.lax.axis_index(self.axis))

    def shared_key(self, name: str) -> jax.Array | None:
        """Returns the key of this step for `name`, the same on all devices: for what is drawn once for the whole batch.

        The order of tasks, a random projection, an interpolation of global statistics. None in evaluation.
        """
        return None if self.key is None else named_key(jax.random.fold_in(self.key, self.step), name)

    def key_of(self, model: Model, name: str, *view: str) -> jax.Array | None:
        """Returns the key that a model is applied with: a device's own, or the shared one where it asks for that."""
        return self.shared_key("/".join((name, *view))) if model.shares_key else self.draw_key(name, *view)

    def run(self, model: Model, params: Tree, state: Tree, inputs: Any, *, view: str = "") -> tuple[Any, Tree]:
        """Runs a small model of a term's own: an adapter, a critic, a head; its weights train with the rest.

        The term's `setup` returns its fresh weights, `fresh(model, key, inputs)` of the shapes that `jt.shapes_of`
        tells, and the objective names it among its `models`.

        Args:
          model: the model, under whose name its weights and statistics are kept.
          params: by model name.
          state: by model name.
          inputs: what it sees: outputs of forwards, say.
          view: what the inputs are called: runs of one model on several draw differently.

        Returns:
          Its outputs, and the state with its new statistics.

        Raises:
          InputError: where it has no weights.
        """
        if any(one.name not in params for one in model.family):
            raise InputError(
                f"a term runs model {model.name!r}, but there are weights of {sorted(params)} alone; the term's setup "
                f"makes them"
            )
        variables = model.complete({"params": model.whole(params), **state.get(model.name, {})}, self.read)
        key = self.key_of(model, model.name, *filter(None, (view,)))
        outputs, new = model.apply(variables, inputs, key=key, **self.how(model, variables["params"]))
        return outputs, {**state, model.name: dict(new)}


def named_key(key: jax.Array, name: str) -> jax.Array:
    """Returns `key` folded with a stable hash of `name`."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))
