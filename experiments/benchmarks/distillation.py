"""What a distillation step costs against one written by hand: ResNet-18 teaches a small net, 64 images 32×32×3.

Ours is `0.1 * jt.classification(student) + 0.9 * jt.distillation(student, jt.frozen(teacher, w), temperature=4)` under
`jt.train_step`; the other is one jitted function of the same networks: teacher forward, cross-entropy and KL by
`log_softmax`, `jax.value_and_grad`, the same SGD with momentum, the state donated, the teacher's weights an argument.
Both start from the same weights, compile first, then run in pairs, in an order drawn for each pair. `ratio`, of the
pairs, should be at most 1.05 in the median. As many convolutions in both programs say that the student runs once;
`teacher_copies` tells how often its weights are among the arguments, and among all arrays on the device after the last
step, both programs' together.

    JAX_PLATFORMS=cpu python -m experiments.benchmarks.distillation

Two idle cores: the median ratio is 0.995 (quartiles 0.982 and 1.010; 446 against 447 ms), 28 convolutions
in both programs, the same arguments (45.7 MB, 44.7 of them the teacher's, once) and temporaries (105.9 MB).
"""

import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jaxtransfer as jt

ALPHA, TEMPERATURE, CLASSES, SEED = 0.9, 4.0, 10, 0


@dataclasses.dataclass(frozen=True)
class Cost:
    """Measure a distillation step against one written by hand; prints one JSON line."""

    pairs: int = 40
    """Pairs of steps that are timed."""
    batch_size: int = 64
    """Images per step."""
    student: str = "small-cnn"
    """A model of the zoo, for images 32×32."""
    teacher: str = "resnet18"
    """Likewise."""
    tiny: bool = False
    """Three pairs of small nets: shows that it runs, not what it costs."""


def main(cost: Cost) -> dict[str, Any]:
    """Times the steps, prints the figures and returns them."""
    if cost.tiny:
        cost = dataclasses.replace(cost, pairs=3, batch_size=8, teacher="small-cnn")
    if cost.pairs < 1 or cost.batch_size < 1:
        raise jt.InputError(f"--pairs and --batch-size must be at least 1; got {cost.pairs} and {cost.batch_size}")
    before, rng = on_device(), np.random.default_rng(0)
    images = rng.random((cost.batch_size, 32, 32, 3), np.float32)
    batch = jax.device_put({"image": images, "label": rng.integers(0, CLASSES, cost.batch_size).astype(np.int32)})
    student = jt.models.create(cost.student, CLASSES, name_in_params="student")
    teacher = jt.models.create(cost.teacher, CLASSES, name_in_params="teacher")
    variables = teacher.init(jax.random.key(1), batch["image"])
    programs = {name: make(student, teacher, variables, batch) for name, make in (("ours", ours), ("by_hand", by_hand))}
    first = {name: program.step()[1] for name, program in programs.items()}
    for program in programs.values():  # caches and the allocator settle
        program.step()
    times = in_turns([lambda one=one: one.step()[0] for one in programs.values()], cost.pairs)
    states = [program.state for program in programs.values()]
    weights, held = bytes_of(variables), on_device() - before - bytes_of((batch, states))

    def each(figure: Callable[[Program], float]) -> dict[str, float]:
        return {name: round(figure(program), 2) for name, program in programs.items()}

    result = {
        "ratio": ratio(*times.T),
        "ms": dict(zip(programs, np.round(1e3 * np.median(times, axis=0), 2).tolist(), strict=True)),
        "compile_s": each(lambda program: program.compile_seconds),
        "convolutions": each(lambda program: program.convolutions),
        "argument_mb": each(lambda program: program.memory.argument_size_in_bytes / 1e6),
        "temporary_mb": each(lambda program: program.memory.temp_size_in_bytes / 1e6),
        "teacher_mb": round(weights / 1e6, 2),
        "teacher_copies": {
            **each(lambda program: program.further_arguments(batch) / weights),
            "on_device": round(held / weights, 2),
        },
        "first_loss": {name: round(loss, 6) for name, loss in first.items()},
        "device": jax.devices()[0].device_kind,
        **dataclasses.asdict(cost),
    }
    print(json.dumps(result))
    return result


class Program:
    """A compiled step on a batch that stays on the device.

    Args:
      call: `call(state) -> (state, loss)`, which donates the state.
      lower: gives the lowered program.
      state: to start from.
    """

    def __init__(self, call: Callable, lower: Callable, state: Any):
        self.call, self.state = call, state
        begin = time.perf_counter()
        lowered = lower(state)
        self.memory = lowered.compile().memory_analysis()
        self.compile_seconds = time.perf_counter() - begin
        self.convolutions = lowered.as_text().count("stablehlo.convolution(")

    def step(self) -> tuple[float, float]:
        """Makes one update and returns how long it took, and the loss before it."""
        jax.block_until_ready(self.state)
        begin = time.perf_counter()
        self.state, loss = jax.block_until_ready(self.call(self.state))
        return time.perf_counter() - begin, float(loss)

    def further_arguments(self, batch: Any) -> int:
        """Returns the bytes of the arguments besides the state and the batch."""
        return self.memory.argument_size_in_bytes - bytes_of(self.state) - bytes_of(batch)


def optimizer() -> optax.GradientTransformation:
    """Returns what both train with."""
    return optax.sgd(0.01, momentum=0.9)


def ours(student: jt.Model, teacher: jt.Model, variables: Any, batch: Any) -> Program:
    """Returns the step of the library."""
    lesson = jt.distillation(student, jt.frozen(teacher, variables), temperature=TEMPERATURE)
    objective = (1 - ALPHA) * jt.classification(student) + ALPHA * lesson
    step = jt.train_step(objective, optimizer())

    def call(state):
        state, metrics = step.placed(state, batch)
        return state, metrics["loss"]

    return Program(
        call, lambda state: step.lower(state, batch), jt.init(objective, optimizer(), jax.random.key(SEED), batch)
    )


def by_hand(student: jt.Model, teacher: jt.Model, variables: Any, batch: Any) -> Program:
    """Returns the same step as a plain JAX program."""

    def update(state, batch, variables):
        params, statistics, opt_state = state
        targets = teacher.apply(variables, batch["image"], train=False, key=None)[0]["logits"] / TEMPERATURE

        def loss_fn(params):
            outputs, new = student.apply({"params": params, **statistics}, batch["image"], train=True, key=None)
            logits = outputs["logits"]
            labels = jax.nn.one_hot(batch["label"], CLASSES)
            cross_entropy = -jnp.sum(labels * jax.nn.log_softmax(logits), -1)
            logs = jax.nn.log_softmax(targets) - jax.nn.log_softmax(logits / TEMPERATURE)
            divergence = TEMPERATURE**2 * jnp.sum(jax.nn.softmax(targets) * logs, -1)
            return jnp.mean((1 - ALPHA) * cross_entropy + ALPHA * divergence), new

        (loss, statistics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer().update(grads, opt_state)
        return (optax.apply_updates(params, updates), statistics, opt_state), loss

    compiled = jax.jit(update, donate_argnums=0)
    start = jt.init(jt.classification(student), optimizer(), jax.random.key(SEED), batch)
    state = start.params["student"], start.state["student"], optimizer().init(start.params["student"])
    return Program(
        lambda state: compiled(state, batch, variables), lambda state: compiled.lower(state, batch, variables), state
    )


def in_turns(runs: Sequence[Callable[[], float]], rounds: int) -> np.ndarray:
    """Returns what each of the runs gave in each round [rounds, runs]; a round takes them in an order of its own."""
    rng, times = np.random.default_rng(0), np.zeros((rounds, len(runs)))
    for row in times:
        for which in rng.permutation(len(runs)):
            row[which] = runs[which]()
    return times


def ratio(times: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """Returns the median and the quartiles of the paired ratios."""
    quartiles = np.quantile(times / others, (0.5, 0.25, 0.75))
    return dict(zip(("median", "lower", "upper"), np.round(quartiles, 3).tolist(), strict=True))


def bytes_of(values: Any) -> int:
    """Returns the size of the arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(values))


def on_device() -> int:
    """Returns the size of all arrays that live on devices, each piece of memory once."""
    gc.collect()
    arrays = (array for array in jax.live_arrays() if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key))
    pieces = ((shard.data.unsafe_buffer_pointer(), shard.data.nbytes) for a in arrays for shard in a.addressable_shards)
    return sum(dict(pieces).values())


if __name__ == "__main__":
    try:
        main(tyro.cli(Cost))
    except jt.InputError as error:
        print(f"distillation: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
