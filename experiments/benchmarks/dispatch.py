"""What one-by-one dispatch costs a small network: steps drawn on the device, one and fifty in a call.

A perceptron of 16 → 32 → 4 on 512 rows that live on the device, batches of 16, plain SGD: the computation takes
microseconds, so that nearly all of a step that is dispatched alone is the host's. Both make the same draws by the step,
so the parameters must be the same, which is checked. Measured twice: in `fit`, by the clock of the run; and the
compiled step alone, called in a loop that does nothing else, by the medians of rounds that alternate.

Command:  python -m experiments.benchmarks.dispatch            (--rounds 1 --calls 2 for a trial)
Result:   in `fit` 19 to 23 times, 5,000 steps/s against 105,000, beside other work. The step alone 7.1 to 12.9 times,
          9.3 in the median of thirteen runs, on two idle cores, by how fast they run Python (12,000 to 25,000 against
          170,000). The parameters are bit-equal.
Prints one JSON line. `fit_times` and `step_times` say how much faster `steps_per_call=50` is, `largest_difference`
compares the parameters of both.
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
    in_fit = {size: _fitted(objective, optimizer, data, 10 * options.calls * options.rounds, size) for size in steps}
    pairs = [[states[size].params for size in steps], [fitted.state.params for _, fitted in in_fit.values()]]
    told = {
        "benchmark": "dispatch",
        "device": jax.devices()[0].device_kind,
        "fit_one_by_one_steps_per_second": round(in_fit[None][0], 1),
        f"fit_steps_per_call_{TOGETHER}_steps_per_second": round(in_fit[TOGETHER][0], 1),
        "fit_times": round(in_fit[TOGETHER][0] / in_fit[None][0], 2),
        "one_by_one_steps_per_second": round(rates[None], 1),
        f"steps_per_call_{TOGETHER}_steps_per_second": round(rates[TOGETHER], 1),
        "step_times": round(rates[TOGETHER] / rates[None], 2),
        "largest_difference": max(_difference(*pair) for pair in pairs),
    }
    print(json.dumps(told))


def _fitted(objective, optimizer, data, calls: int, size: int | None) -> tuple[float, jt.Fitted]:
    """Returns the steps per second of a run by its own clock, which begins after the first call, and the run."""
    steps = TOGETHER * calls
    fitted = jt.fit(
        objective, optimizer, data, sample=sample, steps=steps, steps_per_call=size or 1, key=0, progress=False
    )
    return fitted.timing["steps_per_second"], fitted


def _difference(one, other) -> float:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)


if __name__ == "__main__":
    main()
