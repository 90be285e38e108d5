"""What asynchronous saving costs the loop: windows of 30 s with one checkpoint and without.

A perceptron of 784 → 1024 ×4 → 10 with Adam, 3.96 million parameters and 48 MB of state, batches of 64: steps short and
a state large, so that a save weighs more than in most runs. Windows of both kinds alternate, and steps are counted,
the copy to the host and the writing beside the steps included; medians of the rounds.

Command:  python -m experiments.benchmarks.saving            (--rounds 1 --seconds 1 for a trial)
          jaxtransfer launch --processes 2 --devices 1 -- experiments/benchmarks/saving.py --split    (by all, in parts)
Result:   on two CPU cores that did nothing else, three rounds: 89.8 steps/s without and 88.1 with a save, 1.8 % less;
          the copy stops the loop for 0.03 s.
Prints one JSON line. `loss` is the share of the steps that a window with one save lacks, `blocked_seconds` what the
loop stands still for the copy, `written_seconds_at_most` until the window with its
checkpoint on disk has ended.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

import jaxtransfer as jt
from jaxtransfer.devices import processes
from jaxtransfer.runs.checkpoints import Checkpoints


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30.0, help="of a window")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--split", action="store_true", help="over the processes that launch started")
    options = parser.parse_args(arguments)
    where: dict[str, Any] = {}
    if options.split:
        jt.devices.start()
        where = {"mesh": jt.devices.device_mesh(), "shard": {".*": jt.devices.fsdp("data")}}
    rng = np.random.default_rng(0)
    rows = 64 // processes.count()
    batch = {
        "image": rng.normal(size=(rows, 784)).astype(np.float32),
        "label": rng.integers(0, 10, rows).astype(np.int32),
    }
    objective, optimizer = jt.classification(jt.models.mlp(10, hidden=(options.width,) * 4)), optax.adam(1e-4)
    state = jt.init(objective, optimizer, 0, batch, **where)
    step = jt.train_step(objective, optimizer, **where)
    placed = step.place(batch)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    begin = time.perf_counter()
    for _ in range(3):  # the first compiles
        begin = time.perf_counter()
        state, metrics = step.placed(state, placed)
        jax.block_until_ready(metrics)
    taken = time.perf_counter() - begin
    count = processes.first_tells(lambda: max(1, round(options.seconds / taken)))  # the same in all processes
    rates: dict[bool, list[float]] = {False: [], True: []}
    blocked, written = [], []
    with contextlib.ExitStack() as stack:
        directory = processes.first_tells(lambda: stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoints = Checkpoints(directory)
        checkpoints.save(0, state, {})  # what compiles, compiles here
        checkpoints.wait()
        for number in range(options.rounds):
            for saves in (False, True) if number % 2 == 0 else (True, False):
                begin = time.perf_counter()
                if saves:
                    checkpoints.save(number + 1, state, {})
                    blocked.append(time.perf_counter() - begin)
                for _ in range(count):
                    state, metrics = step.placed(state, placed)
                    jax.block_until_ready(metrics)
                rates[saves].append(count / (time.perf_counter() - begin))
                if saves:
                    checkpoints.wait()
                    written.append(time.perf_counter() - begin)
        checkpoints.close()
    plain, saving = (statistics.median(rates[saves]) for saves in (False, True))
    told = {
        "benchmark": "saving",
        "device": jax.devices()[0].device_kind,
        "processes": processes.count(),
        "seconds_per_save": options.seconds,
        "state_mb": round(size / 1e6, 1),
        "steps_per_second": round(plain, 2),
        "steps_per_second_with_a_save": round(saving, 2),
        "loss": round(1 - saving / plain, 4),
        "blocked_seconds": round(statistics.median(blocked), 3),
        "written_seconds_at_most": round(statistics.median(written), 3),
    }
    if processes.is_first():
        print(json.dumps(told))


if __name__ == "__main__":
    main()
    processes.leave(0)
