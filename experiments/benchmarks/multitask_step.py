"""What balancing costs: a step of T tasks on a shared encoder, against the same written by hand.

By hand is one forward run, T passes backwards through it by `jax.vjp`, their sum weighted by one over their lengths,
and the update; for rules of the losses alone it is the step of the plain sum. In each round every step runs once, in an
order that turns. One JSON line: for each rule `times` (what it takes over what the other took in the same round: the
median, and the quartiles), and likewise `flops` (what the compiled program does) and `memory` (what it allocates
besides its arguments). `sum` beside `sum` says how far the times can be trusted.

    JAX_PLATFORMS=cpu python -m experiments.benchmarks.multitask_step --tasks 8

Two cores that did nothing else, LeNet, 256 images: with two tasks 0.99 to 1.01 of the time by hand and the same memory,
with eight 0.96 to 1.01 of the time and 1.02 of the memory; `equal` and `famo` do what the plain sum does (flops and
memory 1.00, time 0.98 to 1.06, where `sum again` is at 1.00 to 1.07). A perceptron (`--model mlp --size 28`), eight
tasks: 256 images 0.92 to 0.95 of the time and 1.07 of the memory by hand, 64 images 1.21 to 1.25 and 1.10: there the
Gram matrix of eight gradients, which by hand isn't made, weighs most.
"""

import dataclasses
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jaxtransfer as jt


@dataclasses.dataclass(frozen=True)
class Cost:
    """Time steps that take turns; prints one JSON line."""

    tasks: int = 2
    """T, each with a head and a column of labels."""
    rules: tuple[str, ...] = ("equal", "famo", "pcgrad", "mgda", "cagrad", "nash_mtl", "up_grad")
    """Of `jt.multitask`."""
    model: str = "lenet"
    """The encoder, of the zoo."""
    size: int = 36
    """Pixels of a side."""
    batch_size: int = 256
    """Images per update."""
    repeats: int = 60
    """Rounds, with a step of each kind."""
    tiny: bool = False
    """Few and small steps: shows that it runs, not what it costs."""


def main(cost: Cost) -> dict[str, Any]:
    """Times the steps, prints the figures and returns them."""
    if cost.tiny:
        cost = dataclasses.replace(cost, batch_size=4, repeats=2, rules=("equal", "mgda"), model="small-cnn", size=16)
    rng = np.random.default_rng(0)
    names = [f"task{number}" for number in range(cost.tasks)]
    encoder = jt.models.create(cost.model, 10)
    net = jt.models.with_heads(encoder, **{name: jt.models.head(10, batch_norm=False) for name in names})
    labels = {name: jnp.asarray(rng.integers(0, 10, cost.batch_size)) for name in names}
    image = jnp.asarray(rng.normal(size=(cost.batch_size, cost.size, cost.size, 1)), jnp.float32)
    batch = {"image": image, **labels}
    tasks = [jt.classification(net, output=name, label=name).named(name) for name in names]
    optimizer = optax.sgd(0.01)

    together = sum(tasks[1:], start=tasks[0])
    programs = {"sum": _step(together, optimizer, batch), "hand": _by_hand(tasks, optimizer, batch)}
    for rule in cost.rules:
        balanced = jt.balance(together, getattr(jt.multitask, rule), shared=f"{net.name}/encoder")
        programs[rule] = _step(balanced, optimizer, batch)
    programs["sum again"] = programs["sum"]
    order, seconds = list(programs), {name: [] for name in programs}
    for number in range(cost.repeats + 1):
        turn = number % len(order)
        for name in (*order[turn:], *order[:turn]):
            program, state = programs[name]
            start = time.perf_counter()
            jax.block_until_ready(program(state, batch))
            seconds[name].append(time.perf_counter() - start)
    taken = {name: np.array(values[1:]) for name, values in seconds.items()}
    medians = {name: round(float(np.median(values)), 5) for name, values in taken.items()}
    result: dict[str, Any] = {"seconds": medians, "sum again": _ratio(taken["sum again"], taken["sum"])}
    for rule in cost.rules:
        other = "sum" if getattr(getattr(jt.multitask, rule), "of_values", False) else "hand"
        result[rule] = {
            "against": other,
            "times": _ratio(taken[rule], taken[other]),
            "flops": round(_flops(programs[rule][0]) / _flops(programs[other][0]), 3),
            "memory": round(_memory(programs[rule][0]) / _memory(programs[other][0]), 3),
        }
    result |= {"device": jax.devices()[0].device_kind, **dataclasses.asdict(cost)}
    print(json.dumps(result))
    return result


def _step(objective: jt.Objective, optimizer: Any, batch: Any) -> tuple[Any, Any]:
    """Returns the compiled step and the state before it."""
    state = jt.init(objective, optimizer, jax.random.key(0), batch)

    def step(state, batch):
        def loss(params):
            value, new, _ = objective(params, state.state, batch, jt.Context(state.step, jax.random.key(1)))
            return value, new

        (_, new), gradient = jax.value_and_grad(loss, has_aux=True)(state.params)
        return _updated(optimizer, state, gradient), new

    return jax.jit(step).lower(state, batch).compile(), state


def _by_hand(tasks: list[jt.Objective], optimizer: Any, batch: Any) -> tuple[Any, Any]:
    """Returns the compiled step of one forward run and a pass backwards for each task, mixed by fixed weights."""
    together = sum(tasks[1:], start=tasks[0])
    encoder = together.forwards[0].model.name
    state = jt.init(together, optimizer, jax.random.key(0), batch)

    def step(state, batch):
        ctx = jt.Context(state.step, jax.random.key(1))

        def losses(params):
            outputs, new = together.run(params, state.state, batch, ctx)
            values, new, _ = together.summed.values(outputs, params, new, batch, ctx)
            return tuple(values), new

        values, pull, new = jax.vjp(losses, state.params, has_aux=True)
        gradients = []
        for task in range(len(values)):
            (gradient,) = pull(tuple(jnp.ones_like(v) * (n == task) for n, v in enumerate(values)))
            gradients.append(gradient)
        shared = [jax.tree.leaves(gradient[encoder]["encoder"]) for gradient in gradients]
        lengths = [jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in leaves)) for leaves in shared]
        mean = sum(lengths) / len(lengths)
        weights = [mean / length for length in lengths]
        total = jax.tree.map(lambda *own: sum(a * leaf for a, leaf in zip(weights, own, strict=True)), *gradients)
        return _updated(optimizer, state, total), new

    return jax.jit(step).lower(state, batch).compile(), state


def _ratio(times: np.ndarray, others: np.ndarray) -> list[float]:
    """Returns the median ratio of times of one round, and its quartiles."""
    return [round(float(value), 3) for value in np.quantile(times / others, (0.5, 0.25, 0.75))]


def _updated(optimizer: Any, state: Any, gradient: Any) -> Any:
    updates, _ = optimizer.update(gradient, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates)


def _flops(program: Any) -> float:
    return program.cost_analysis()["flops"]


def _memory(program: Any) -> float:
    found = program.memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes


if __name__ == "__main__":
    try:
        main(tyro.cli(Cost))
    except jt.InputError as error:
        print(f"multitask_step: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
