"""How fast is a meta-step of MAML on Conv4? Against the PyTorch loop that learn2learn amounts to.

Conv4-64 with batch norm on 28×28 images, 5 ways, 1 shot, 15 queries, 32 tasks, float32: the strided form by second and
first order, with one and five inner steps, and the form with pooling by second order with one. Ours and PyTorch's
take turns in one run; a row is the medians, their ratio, and the peak memory of the process up to then.

Command: `python -m experiments.benchmarks.maml` (about 3 minutes on two cores; `--torch-python PATH` names an
interpreter with PyTorch where this one has none; without PyTorch ours alone is timed; `--learn2learn FOLDER` has
learn2learn's own MAML run in place of the plain loop). Prints one JSON line per row.

On a CPU each core is a device of its own (`jax_num_cpu_devices`) and they share the tasks, by pmap: a task's many small
operations then follow one another on one core, instead of each being split over cores that must be woken for it.
`--devices 1` leaves the cores to XLA.

Two cores, against learn2learn's MAML, medians of 5: second order with one step 0.26 s against 0.68 s (2.6×), with five
0.41 s against 1.26 s (3.0×; 2.8× on one device); first order 0.21 s against 0.31 s (1.5×) and with five steps 0.24 s
against 0.59 s (2.5×). PyTorch's times vary more between runs than ours: with one step it took 0.59 s too (2.2×), with
five 1.2 to 1.7 s, so that the ratio lay between 2.9 and 4.1, most often at 3.0 to 3.1. On slower cores, later, with
PyTorch 2.14: 0.36 s against 0.88 s (2.4×), 0.69 s against 2.17 s (3.1×), first order 2.0× and 3.0×, and with pooling
1.81 s against 2.77 s (1.5×).
"""

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro

import jaxtransfer as jt
from experiments.benchmarks.torch_loop import TorchLoop, peak_mb, torch_python

WAYS, QUERIES = 5, 15
TURN = 3  # meta-steps of a turn, after one that is not timed: threads of the other side spin on for a while


@dataclasses.dataclass(frozen=True)
class Row:
    """A workload."""

    pooled: bool
    steps: int
    first_order: bool = False


ROWS = (Row(False, 1), Row(False, 5), Row(False, 1, True), Row(False, 5, True), Row(True, 1))


@dataclasses.dataclass(frozen=True)
class MamlBenchmark:
    """Time meta-steps of MAML on Conv4, interleaved with PyTorch's."""

    repeats: int = 9
    """Timed turns of each row, of three meta-steps."""
    tasks: int = 32
    """Tasks per meta-step."""
    devices: int | None = None
    """Devices that share the tasks, by pmap; as many as divide them by default. On a CPU each core is one."""
    rows: tuple[int, ...] = tuple(range(len(ROWS)))
    """Rows to run: 0 second order, 1 step; 1 with 5; 2 and 3 by first order; 4 with pooling."""
    torch_python: Path | None = None
    """Interpreter with PyTorch; this one by default, if it has it."""
    learn2learn: Path | None = None
    """Folder of learn2learn's unpacked sources, whose MAML then takes the place of the plain loop."""


def main(benchmark: MamlBenchmark) -> list[dict[str, Any]]:
    """Runs the rows, prints each and returns them."""
    python = benchmark.torch_python or torch_python()
    found = []
    for number in benchmark.rows:
        row = run(ROWS[number], benchmark, python)
        print(json.dumps(row), flush=True)
        found.append(row)
    return found


def run(row: Row, benchmark: MamlBenchmark, python: str | Path | None) -> dict[str, Any]:
    """Times one workload."""
    present = range(1, jax.local_device_count() + 1)
    devices = benchmark.devices or max(count for count in present if benchmark.tasks % count == 0)
    step, state, batch = ours(row, benchmark.tasks, devices)
    begin = time.perf_counter()
    state = jax.block_until_ready(step.placed(state, batch)[0])
    compiled, times = time.perf_counter() - begin, []
    with contextlib.ExitStack() as stack:
        torch = None
        if python is not None:
            sizes = {"tasks": benchmark.tasks, "support": WAYS, "query": WAYS * QUERIES}
            options = {"steps": row.steps, "pooled": row.pooled, "first_order": row.first_order, "lr": 0.4}
            source = benchmark.learn2learn and str(benchmark.learn2learn)
            torch = stack.enter_context(TorchLoop(python, model="conv4", learn2learn=source, **sizes, **options))
            torch.seconds(1)

        def seconds(steps: int) -> float:
            nonlocal state
            begin = time.perf_counter()
            for _ in range(steps):
                state, _ = step.placed(state, batch)
            jax.block_until_ready(state)
            return time.perf_counter() - begin

        sides = [seconds] if torch is None else [seconds, torch.seconds]
        for _ in range(benchmark.repeats):
            times.append([(side(1), side(TURN) / TURN)[1] for side in sides])
        theirs = torch.close() if torch else None
    mine, other = (*np.median(times, axis=0), float("nan"))[:2]
    result = {
        "benchmark": "maml",
        **dataclasses.asdict(row),
        "devices": devices,
        "seconds": round(float(mine), 4),
        "compile_seconds": round(compiled - float(mine), 2),
        "peak_mb": round(peak_mb()),
        "pytorch": None,
    }
    if theirs is not None:
        ratios = [b / a for a, b in times]
        result["pytorch"] = {"seconds": round(float(other), 4), **theirs}
        result["ratio"] = {"of_medians": round(float(other / mine), 2), "median": round(float(np.median(ratios)), 2)}
    return result


def ours(row: Row, tasks: int, devices: int = 1) -> tuple[jt.TrainStep, jt.TrainState, Any]:
    """Returns the compiled meta-step, its state and a batch of noise on the devices."""
    rng = np.random.default_rng(0)

    def part(count):
        image = rng.random((tasks, count, 28, 28, 1), np.float32)
        return {"image": image, "label": np.tile(np.arange(count, dtype=np.int32) % WAYS, (tasks, 1))}

    batch = {"support": part(WAYS), "query": part(WAYS * QUERIES)}
    model = jt.models.conv4(WAYS, pooling=row.pooled)
    at_once = 1 if jax.default_backend() == "cpu" else None
    inner = optax.sgd(0.4)
    objective = jt.maml(
        jt.classification(model), inner=inner, steps=row.steps, first_order=row.first_order, at_once=at_once
    )
    optimizer = optax.adam(1e-3)
    if devices == 1:
        step = jt.train_step(objective, optimizer)
    else:
        mesh = jax.make_mesh((devices,), ("data",), devices=jax.local_devices()[:devices])
        step = jt.train_step(objective, optimizer, mesh=mesh, mode="pmap")
    return step, jt.init(objective, optimizer, jax.random.key(0), batch), step.place(batch)


if __name__ == "__main__":
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jax.config.update("jax_num_cpu_devices", cores or 1)
    main(tyro.cli(MamlBenchmark, description=__doc__))
