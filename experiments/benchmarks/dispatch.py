"""What one-by-one dispatch costs a small network: steps drawn on the device, one and fifty in a call.

A perceptron of 16 → 32 → 4 on 512 rows that live on the device, batches of 16, plain SGD: the computation takes
microseconds, so that nearly all of a step that is dispatched alone is the host's. Both make the same draws by the step,
so the parameters must be the same, which is checked. The two alternate, and the medians of their rounds are told.

Command:  python -m experiments.benchmarks.dispatch            (--rounds 1 --calls 2 for a trial)
Result:   on two CPU cores that did nothing else, 113,000 steps/s against 11,000: 9.3 to 10.4 times in four runs, the
          parameters bit-equal; on slower ones that other work shared 14.7 times.
Prints one JSON line. `times` says how much faster `steps_per_call=50` is, `largest_difference` compares the parameters.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxtransfer as jt

TOGETHER = 50


def sample(key, data):
    """Draws a batch of 16 rows."""
    rows = jax.random.bits(key, (16,)) % 512
    return {name: column[rows] for name, column in data.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=20, help="calls of 50 steps in a round")
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    data = {
        "image": jnp.asarray(rng.normal(size=(512, 16)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 4, 512), jnp.int32),
    }
    objective, optimizer = jt.classification(jt.models.mlp(4, hidden=(32,))), optax.sgd(0.05)
    steps = {size: jt.train_step(objective, optimizer, sample=sample, steps_per_call=size) for size in (None, TOGETHER)}
    batch = sample(jax.random.key(1), data)
    states = {size: jt.init(objective, optimizer, 0, batch) for size in steps}
    placed = {size: step.place(data) for size, step in steps.items()}
    seconds: dict[int | None, list[float]] = {size: [] for size in steps}
    for number in range(options.rounds + 1):
        for size, step in steps.items():
            begin = time.perf_counter()
            for _ in range(options.calls * (TOGETHER if size is None else 1)):
                states[size], _ = step.placed(states[size], placed[size])
            jax.block_until_ready(states[size].params)
            if number:  # the first round compiles
                seconds[size].append(time.perf_counter() - begin)
    rates = {size: options.calls * TOGETHER / statistics.median(taken) for size, taken in seconds.items()}
    pairs = zip(*(jax.tree.leaves(state.params) for state in states.values()), strict=True)
    told = {
        "benchmark": "dispatch",
        "device": jax.devices()[0].device_kind,
        "one_by_one_steps_per_second": round(rates[None], 1),
        f"steps_per_call_{TOGETHER}_steps_per_second": round(rates[TOGETHER], 1),
        "times": round(rates[TOGETHER] / rates[None], 2),
        "largest_difference": max(float(jnp.max(jnp.abs(one - other))) for one, other in pairs),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
