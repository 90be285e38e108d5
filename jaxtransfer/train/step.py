"""One compiled update that serves every objective."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxtransfer.objective import Batch, Context, Objective
from jaxtransfer.train.placement import AXIS, Placement
from jaxtransfer.train.state import TrainState


class TrainStep:
    """A compiled `step(state, batch) -> (state, metrics)`; made by `train_step`.

    The state is donated: use the one that comes back. Metrics stay on the device until they are read.
    """

    def __init__(self, update: Callable, frozen: tuple, placement: Placement):
        self.placement = placement
        self._frozen = tuple(handle.tree for handle in frozen)
        self._placed = None
        if placement.mode == "pmap":
            self._compiled = jax.pmap(
                update,
                axis_name=AXIS,
                in_axes=(None, 0, None),
                out_axes=(None, None),
                devices=placement.devices,
                donate_argnums=0,
            )
        elif placement.devices is not None:
            rep, split = placement.replicated, placement.split
            self._compiled = jax.jit(update, donate_argnums=0, in_shardings=(rep, split, rep), out_shardings=(rep, rep))
        else:
            self._compiled = jax.jit(update, donate_argnums=0)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """Makes one update from a global batch, of NumPy or JAX arrays."""
        return self.placed(state, self.place(batch))

    def place(self, batch: Batch) -> Batch:
        """Returns the batch as the devices hold it, for `placed`: a transfer that can run ahead of the step."""
        return self.placement.batch(batch)

    def placed(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """Makes one update from a batch that `place` gave."""
        return self._compiled(self.placement.state(state), batch, self._frozen_on_devices())

    def lower(self, state: TrainState, batch: Batch) -> Any:
        """Returns the lowered program, to look at: `step.lower(state, batch).compile().as_text()`."""
        return self._compiled.lower(self.placement.state(state), self.place(batch), self._frozen_on_devices())

    def _frozen_on_devices(self) -> tuple:
        if self._placed is None:  # written to the devices once per run
            self._placed = self.placement.state(jax.device_put(self._frozen))
        return self._placed


def train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    mode: str = "jit",
) -> TrainStep:
    """Compiles one gradient update of any objective.

    Args:
      objective: the loss; its frozen trees reach the program as an argument that is not donated.
      optimizer: any optax transformation; it may use the loss as the extra argument `value`.
      mesh: the devices, any mesh: the batch is split over all its axes, the state is whole on each. None is the
        default device under `jit` and all local devices under `pmap`.
      mode: `"jit"`: one program over the mesh, in which the batch is global by itself. `"pmap"`: one program per
        device, in which losses and normalisation gather over the axis. Same signature, same state, same global
        batch, and the same numbers to rounding where nothing is drawn.

    Returns:
      `step(state, batch) -> (state, metrics)`, compiled once per batch shape, the state donated; metrics are scalars
      on the device: `loss` and each term under its own name.

    Raises:
      InputError: from the step, before compilation, for a batch that doesn't divide by the devices.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    axis = AXIS if mode == "pmap" else None

    def update(state: TrainState, batch: Batch, frozen: tuple):
        ctx = Context(state.step, state.key, dict(zip(objective.frozen, frozen, strict=True)), axis)

        def loss_fn(params):
            loss, new_state, metrics = objective(params, state.state, batch, ctx)
            return loss, (new_state, metrics)

        (loss, (new_state, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        if axis is not None:  # the loss is global on each device, so the mean of its gradients is the gradient
            grads = jax.lax.pmean(grads, axis)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        values = {"loss": loss, **{name: metric.value for name, metric in metrics.items()}}
        return TrainState(state.step + 1, state.key, params, new_state, opt_state), values

    return TrainStep(update, objective.frozen, Placement(mesh, mode))
