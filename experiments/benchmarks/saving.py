"""What asynchronous saving costs the loop: windows of 30 s with one checkpoint and without.

A perceptron of 784 → 1024 ×4 → 10 with Adam, 3.96 million parameters and 48 MB of state, batches of 64: steps short and
a state large, so that a save weighs more than in most runs. Windows of both kinds alternate, and steps are counted,
the copy to the host and the writing beside the steps included; medians of the rounds.

Command:  python -m experiments.benchmarks.saving            (--rounds 1 --seconds 1 for a trial)
Result:   on two CPU cores that other work shared, two rounds: 3.51 steps/s without and 3.52 with a save, a loss within
          the noise of the machine; the copy stops the loop for 0.39 s, 1.3 % of 30 s.
Prints one JSON line. `loss` is the share of the steps that a window with one save lacks, `blocked_seconds` what the
loop stands still for the copy, `written_seconds_at_most` until the window with its
checkpoint on disk has ended.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np
import optax

import jaxtransfer as jt
from jaxtransfer.runs.checkpoints import Checkpoints


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30.0, help="of a window")
    parser.add_argument("--width", type=int, default=1024)
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    batch = {"image": rng.normal(size=(64, 784)).astype(np.float32), "label": rng.integers(0, 10, 64).astype(np.int32)}
    objective, optimizer = jt.classification(jt.models.mlp(10, hidden=(options.width,) * 4)), optax.adam(1e-4)
    state, step = jt.init(objective, optimizer, 0, batch), jt.train_step(objective, optimizer)
    placed = step.place(batch)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    for _ in range(3):  # the first compiles
        state, _ = step.placed(state, placed)
    jax.block_until_ready(state)
    rates: dict[bool, list[float]] = {False: [], True: []}
    blocked, written = [], []
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(directory)
        for number in range(options.rounds):
            for saves in (False, True) if number % 2 == 0 else (True, False):
                begin, made = time.perf_counter(), 0
                if saves:
                    checkpoints.save(int(state.step), state, {})
                    blocked.append(time.perf_counter() - begin)
                while time.perf_counter() - begin < options.seconds:
                    state, metrics = step.placed(state, placed)
                    jax.block_until_ready(metrics)
                    made += 1
                rates[saves].append(made / (time.perf_counter() - begin))
                if saves:
                    checkpoints.wait()
                    written.append(time.perf_counter() - begin)
        checkpoints.close()
    plain, saving = (statistics.median(rates[saves]) for saves in (False, True))
    told = {
        "benchmark": "saving",
        "device": jax.devices()[0].device_kind,
        "seconds_per_save": options.seconds,
        "state_mb": round(size / 1e6, 1),
        "steps_per_second": round(plain, 2),
        "steps_per_second_with_a_save": round(saving, 2),
        "loss": round(1 - saving / plain, 4),
        "blocked_seconds": round(statistics.median(blocked), 3),
        "written_seconds_at_most": round(statistics.median(written), 3),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
