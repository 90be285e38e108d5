"""Meta-steps per second of second-order MAML on sinusoids, against the loop over tasks that PyTorch libraries run.

A meta-step: 25 tasks of 10 support and 10 query points, one inner step, a perceptron of 2 × 40, Adam. Ours runs twice:
with many steps in one compiled call, which draws its tasks itself, and one step per call on a given batch. PyTorch's
loop (`torch_loop.py`) keeps one batch, which is in its favour. All run in turns, and each figure is the median over
the rounds; `ratio` is the median of the rounds' ratios. Compiling is counted by itself.

    JAX_PLATFORMS=cpu python -m experiments.benchmarks.sinusoid_speed --torch-python PYTHON

PYTHON is an interpreter with PyTorch; without one, ours alone is measured and `pytorch` is null. `--learn2learn FOLDER`
has learn2learn's own MAML run there, from its unpacked sources, in place of a loop over plain lists of weights, which
is leaner than any library. (`pip download learn2learn --no-deps --no-binary :all:` gets the sources.)

Two cores, 30 s each: 4,570 meta-steps/s, 60.7 times learn2learn's 75 (quartiles 53.6 and 61.6; 60.6, 59.7 and 62.0 in a
run before) and 47 times the plain loop's 98 (45, 48); with single calls 3,810, 50 times learn2learn's. Compiling takes
1.2 s.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

import jaxtransfer as jt
from experiments import sinusoid
from experiments.benchmarks.torch_loop import TorchLoop, torch_python

INNER_RATE, FREQUENCY = 0.01, sinusoid.PROTOCOL


@dataclasses.dataclass(frozen=True)
class Speed:
    """Measure meta-steps per second on sinusoids; prints one JSON line."""

    torch_python: Path | None = None
    """An interpreter that has PyTorch; by default this one, where it does."""
    torch_threads: int = 1
    """Threads of PyTorch's loop; arrays this small are quickest with one, far more so beside other jobs."""
    learn2learn: Path | None = None
    """Folder of learn2learn's unpacked sources, whose MAML then takes the place of the plain loop."""
    rounds: int = 15
    """Turns that each side takes."""
    steps_per_call: int = 1_000
    """Meta-steps in one of our calls, and in each of our turns."""
    torch_steps: int = 20
    """Meta-steps in each of PyTorch's turns."""
    tasks: int = 25
    """Tasks per meta-step."""
    shots: int = 10
    """Support points per task, and as many query points."""
    tiny: bool = False
    """One round of a few steps: shows that it runs, not how fast."""


def main(speed: Speed) -> dict[str, Any]:
    """Takes the times, prints the figures and returns them."""
    if speed.tiny:
        speed = dataclasses.replace(speed, rounds=1, steps_per_call=5, torch_steps=2, tasks=3)
    for name in ("torch_threads", "rounds", "steps_per_call", "torch_steps", "tasks", "shots"):
        if getattr(speed, name) < 1:
            raise jt.InputError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(speed, name)}")
    python = speed.torch_python or torch_python()
    many, single = Ours(speed, speed.steps_per_call), Ours(speed, 1)
    rounds: list[dict[str, float]] = []
    about_torch = None
    with contextlib.ExitStack() as stack:
        theirs = None
        if python is not None:
            size = {"tasks": speed.tasks, "support": speed.shots, "query": speed.shots, "lr": INNER_RATE}
            size |= {"threads": speed.torch_threads, "learn2learn": speed.learn2learn and str(speed.learn2learn)}
            theirs = stack.enter_context(TorchLoop(python, model="mlp", **size))
            theirs.seconds(speed.torch_steps)
        for _ in range(speed.rounds):
            rates = {"many": speed.steps_per_call / many.seconds(1)}
            if theirs is not None:
                rates["pytorch"] = speed.torch_steps / theirs.seconds(speed.torch_steps)
            calls = max(1, speed.steps_per_call // 10)
            rounds.append(rates | {"single": calls / single.seconds(calls)})
        if theirs is not None:
            about_torch = theirs.close()
    result = {
        "ours_per_second": _median(rounds, "many"),
        "ours_single_calls_per_second": _median(rounds, "single"),
        "compile_s": round(many.compile_seconds, 2),
        "compile_s_single": round(single.compile_seconds, 2),
        "pytorch": None,
        "ratio": None,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        **{
            name: value
            for name, value in dataclasses.asdict(speed).items()
            if name not in ("torch_python", "learn2learn")
        },
        "against": "PyTorch" if speed.learn2learn is None else "learn2learn",
    }
    if about_torch is not None:
        ratios = sorted(rates["many"] / rates["pytorch"] for rates in rounds)
        result["pytorch"] = {"per_second": _median(rounds, "pytorch"), **about_torch}
        result["ratio"] = round(statistics.median(ratios), 1)
        result["ratio_quartiles"] = [round(ratios[len(ratios) * k // 4], 1) for k in (1, 3)]
        result["ratio_single_calls"] = round(statistics.median(r["single"] / r["pytorch"] for r in rounds), 1)
    print(json.dumps(result))
    return result


class Ours:
    """The compiled meta-step, `steps` in one call; compiled and run once when it is made."""

    def __init__(self, speed: Speed, steps: int):
        optimizer, objective = optax.adam(1e-3), sinusoid.maml(INNER_RATE)
        self.frequency = jnp.asarray(FREQUENCY)
        batch = sinusoid.episodes(jax.random.key(1), speed.tasks, speed.shots, speed.shots, self.frequency)

        def sample(key, frequency):
            return sinusoid.episodes(key, speed.tasks, speed.shots, speed.shots, frequency)

        drawn = {"sample": sample, "steps_per_call": steps} if steps > 1 else {}
        self.step = jt.train_step(objective, optimizer, **drawn)
        self.state = jt.init(objective, optimizer, jax.random.key(0), batch)
        self.data = self.step.place(self.frequency if drawn else batch)
        begin = time.perf_counter()
        self.step.lower(self.state, self.data).compile()
        self.compile_seconds = time.perf_counter() - begin
        self.seconds(1)

    def seconds(self, calls: int) -> float:
        """Makes calls and returns how long they took."""
        jax.block_until_ready(self.state)
        begin = time.perf_counter()
        for _ in range(calls):
            self.state, _ = self.step.placed(self.state, self.data)
        jax.block_until_ready(self.state)
        return time.perf_counter() - begin


def _median(rounds: list[dict[str, float]], name: str) -> float:
    return round(statistics.median(rates[name] for rates in rounds), 1)


if __name__ == "__main__":
    try:
        main(tyro.cli(Speed))
    except jt.InputError as error:
        print(f"sinusoid_speed: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
