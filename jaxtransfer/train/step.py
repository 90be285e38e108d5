"""One compiled update that serves every objective."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxtransfer.devices.ahead import Cost, compile_ahead, cost_of
from jaxtransfer.devices.in_flight import InFlight
from jaxtransfer.devices.placement import AXIS, Placement
from jaxtransfer.devices.sharding import Rule, shape_of
from jaxtransfer.errors import InputError
from jaxtransfer.objective import Batch, Objective, named_key
from jaxtransfer.train.arguments import check_kind, check_objective, check_optimizer, check_rows, check_takes
from jaxtransfer.train.state import TrainState
from jaxtransfer.train.turns import turns_of
from jaxtransfer.train.update import update_of
from jaxtransfer.train.watch import means

Transform = Callable[[jax.Array, Any, jax.Array], Batch]


class TrainStep:
    """A compiled `step(state, batch) -> (state, metrics)`; made by `train_step`.

    The state is donated: use the one that comes back. Metrics stay on the device until they are read. Where there
    are several CPU devices, which queued calls can lock for ever, a call waits until fewer than two are under way: see
    `InFlight`. On other devices a loop may run ahead as far as JAX lets it.
    """

    def __init__(self, update: Callable, frozen: tuple, placement: Placement, *, whole_data: bool):
        self.placement, self._whole_data = placement, whole_data
        self.place = placement.whole if whole_data else placement.batch
        self._frozen = frozen
        self._in_flight = InFlight()
        self._extra = ()
        self._update, self._by_shape = update, {}
        if placement.mode == "pmap":
            assert placement.devices is not None
            self._extra = (np.arange(len(placement.devices)),)  # pmap needs a split argument, also where data are whole
            self._compiled = jax.pmap(
                lambda state, data, frozen, device: update(state, data, frozen),
                axis_name=AXIS,
                in_axes=(None, None if whole_data else 0, None, 0),
                out_axes=(None, None),
                devices=placement.devices,
                donate_argnums=0,
            )
        elif placement.devices is not None and placement.shards is None:
            rep, split = placement.replicated, placement.split
            data = rep if whole_data else split
            self._compiled = jax.jit(update, donate_argnums=0, in_shardings=(rep, data, rep), out_shardings=(rep, rep))
        else:
            self._compiled = jax.jit(update, donate_argnums=0)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """Makes one update from a global batch, of NumPy or JAX arrays."""
        if not self._whole_data:
            check_kind(batch)
            check_rows(batch)
        return self.placed(state, self.place(batch))

    def placed(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """Makes one update from what `place(batch)` gave: the batch on the devices, transferred ahead of the step."""
        if not self.placement.where_cpus_are_several:
            return self._program(state)(*self._arguments(state, batch))
        self._in_flight.wait()
        state, metrics = self._program(state)(*self._arguments(state, batch))
        self._in_flight.add(jnp.copy(metrics["loss"]))  # its own: a caller may donate or delete the metrics
        return state, metrics

    def lower(self, state: TrainState, batch: Batch) -> Any:
        """Returns the lowered program, to look at: `step.lower(state, batch).compile().as_text()`."""
        return self._program(state).lower(*self._arguments(state, self.place(batch)))

    def compile(self, state: TrainState, data: Any, **options: Any) -> Cost | None:
        """Compiles the step ahead of its first call with what `place(batch)` gave; None under `pmap`, which can't.

        Args:
          state: of the call.
          data: the batch on the devices.
          **options: those of `compile_ahead`.
        """
        if self.placement.mode == "pmap":
            return None
        return cost_of(compile_ahead(self._program(state).lower(*self._arguments(state, data)), **options))

    def has_convolutions(self, state: TrainState, batch: Batch) -> bool:
        """Returns whether the program holds a convolution; it is traced, not compiled."""
        jaxpr = self._program(state).trace(*self._arguments(state, self.place(batch))).jaxpr
        return any(equation.primitive.name == "conv_general_dilated" for equation in _equations(jaxpr.jaxpr))

    def _program(self, state: TrainState) -> Any:
        """Returns the jitted function; where the state is split, that for states of this structure."""
        if (shards := self.placement.shards) is None:
            return self._compiled
        if (shape := shape_of(state)) not in self._by_shape:
            out = (shards.state(state), self.placement.replicated)
            self._by_shape[shape] = jax.jit(self._update, donate_argnums=0, out_shardings=out)
        return self._by_shape[shape]

    def _arguments(self, state: TrainState, batch: Batch) -> tuple:
        return self.placement.state(state), batch, self.placement.frozen(self._frozen, state.params), *self._extra


def _equations(jaxpr: jax.extend.core.Jaxpr) -> Iterator[Any]:
    """Yields the equations of a program and of those inside it (loops, branches, calls)."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from _equations(getattr(inner, "jaxpr", inner))


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)


def transformed(transform: Transform | None, key: jax.Array, step: Any, batch: Batch, axis: str | None = None) -> Batch:
    """Returns the batch of a step after its transform; under `pmap`, of the device's part."""
    if transform is None:
        return batch
    size = jax.tree.leaves(batch)[0].shape[0]
    first = 0 if axis is None else size * jax.lax.axis_index(axis)
    return transform(named_key(jax.random.fold_in(key, step), "transform"), batch, first + jnp.arange(size))


def train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    shard: Mapping[str, Rule] | None = None,
    mode: str = "jit",
    sample: Callable[[jax.Array, Any], Batch] | None = None,
    steps_per_call: int | None = None,
    transform: Transform | None = None,
    watch: bool = False,
) -> TrainStep:
    """Compiles one gradient update of any objective, or several in one call.

    Under gradient accumulation, `optax.MultiSteps(optimizer, k).gradient_transformation()` anywhere in the optimiser,
    k batches make one update. What counts steps then counts updates: schedules, moving averages, the queues of
    contrast and DINO's centre, which stay as they are until the last of the k batches (a queue takes in the keys of
    that one), so that all k see the same. Random draws differ in each batch, and the running statistics of batch norm
    move with each. The update is by the mean of the gradients of k losses: that of one large batch where the loss is a
    mean over examples and all k count alike. Not so where masks or weights count more in one than in another, and not
    for losses in which examples meet, contrast say: each batch has its own negatives (`jt.micro_batched` gives those
    of the whole in the memory of a part).

    Products of matrices and convolutions are made in the precision that JAX is told where the step is called:
    `with jax.default_matmul_precision("highest")` around the calls, or around `fit`, matters where a device multiplies
    float32 numbers in fewer bits by default, as TPUs (bfloat16) and GPUs (TF32) do.

    Args:
      objective: the loss; its frozen trees reach the program as an argument that is not donated.
      optimizer: any optax transformation; it may use the loss as the extra argument `value`, its gradient as `grad`
        and the loss and its gradient as functions of the parameters, `value_fn` for line searches (`optax.lbfgs()`),
        `grad_fn(params, number)` for `optax.contrib.sam(..., opaque_mode=True)` (not under `loss_scaled`). The
        optimiser that `jt.alternate` gives with an objective makes a step of several updates.
      mesh: the devices, any mesh: the batch is split over all its axes, the state is whole on each. None is the
        default device under `jit` and all local devices under `pmap`.
      shard: rules by which parameters are split over the axes of `mesh`, `{".*": jt.devices.fsdp("data")}` say: by
        pattern of their paths, the first one that selects a parameter, an axis, over which its largest dimension that
        divides is split; `jt.devices.fsdp(axis)`, likewise as far as that pays; an entry per dimension, as of a
        `PartitionSpec`; or None, whole. Each parameter needs one. What the optimiser, averages and frozen trees hold of
        the shape of a parameter lies as it does. The batch is split over the axes that `fsdp` or a bare axis names,
        and those that no rule does, and weights are gathered over them where they are read; axes of partition specs
        alone hold parts of layers. For `"jit"`; axes may span processes. `jt.devices.placement_table(state)` shows the
        outcome.
      mode: `"jit"`: one program over the mesh, in which the batch is global by itself. `"pmap"`: one program per
        device, in which losses and normalisation gather over the axis. Same signature, same state, same global
        batch, and the same numbers to rounding where nothing is drawn.
      sample: `sample(key, data) -> batch` draws the global batch inside the program; the step then takes `data`, which
        lives whole on each device, in place of a batch.
      steps_per_call: with `sample`, steps that run in one call, as a loop; the metrics are the means over them. None
        runs one step without a loop, inside of which a CPU runs convolutions slowly (a loop of one, too).
      transform: `transform(key, batch, rows) -> batch` changes each batch inside the program, on the devices that hold
        it: random views of images (`jt.data.views`). `rows` [B] are the numbers of the examples in the global batch.
      watch: whether metrics also tell of the update, as the records of `fit` do: `gradient_norm`, the global norm
        before the optimiser changes it; `learning_rate`, where an `optax.inject_hyperparams` in the optimiser tells it;
        `weight/<term>` for each term whose weight is a schedule.

    Returns:
      `step(state, batch) -> (state, metrics)`, compiled once per batch shape, the state donated; metrics are scalars
      on the device: `loss` and each term under its own name.

    Raises:
      InputError: for rules of `shard` that are none; from the step, before compilation, for a batch that doesn't
        divide by the devices, for a rule that selects nothing or can't split what it selects, a parameter without one.
    """
    check_objective(objective)
    check_optimizer(optimizer)
    check_takes(sample, "sample", "key", "data")
    check_takes(transform, "transform", "key", "batch", "rows")
    axis = AXIS if mode == "pmap" else None
    placement = Placement(mesh, mode, shard)
    updates = [(turn, update_of(turn, axis, placement, watch=watch)) for turn in turns_of(objective, optimizer)]

    def update(state: TrainState, batch: Batch, frozen: tuple):
        read = dict(zip(objective.frozen, placement.read(frozen, state.params, frozen=True), strict=True))
        batch = transformed(transform, state.key, state.step, batch, axis)
        now, values = state, {}
        for turn, one in updates:
            for number in range(turn.repeat):
                now, told = one(now, batch, read, number, now is not state)
                values = {**values, **told}  # of a turn's last repetition
        if "loss" not in values:
            values["loss"] = sum(values[f"{turn.name}/loss"] for turn, _ in updates)
        kept = placement.stored({"params": now.params, "state": now.state, "opt_state": now.opt_state}, state.params)
        return now._replace(step=state.step + 1, **kept), values

    if sample is None:
        if steps_per_call not in (None, 1):
            raise InputError("steps_per_call needs sample=..., which draws the batches inside the program")
        return TrainStep(update, objective.frozen, placement, whole_data=False)
    if steps_per_call is not None and steps_per_call < 1:
        raise InputError(f"steps_per_call must be at least 1; got {steps_per_call}")

    def draw_and_update(state: TrainState, data: Any, frozen: tuple):
        def key_of(step):
            return named_key(jax.random.fold_in(state.key, step), "sample")

        def one(state, key):
            return update(state, placement.share(sample(key, data)), frozen)

        if steps_per_call is None:
            return one(state, key_of(state.step))
        keys = jax.vmap(key_of)(state.step + jnp.arange(steps_per_call))  # at once: in the loop each costs two hashes
        state, metrics = jax.lax.scan(one, state, keys)
        return state, means(metrics)

    return TrainStep(draw_and_update, objective.frozen, placement, whole_data=True)
