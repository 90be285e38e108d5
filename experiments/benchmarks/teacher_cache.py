"""What a distillation step costs when the teacher's outputs come with the data, against plain supervised training.

The same student trains three ways: on labels alone; under 0.1 · classification + 0.9 · distillation from
`jt.cached()`, whose batches carry `teacher_logits`; and, with `--live`, from the teacher itself. `step` is the compiled
step on a batch that is on the device; `whole` adds the pipeline, which makes each batch when it is asked for (random
images as uint8, in memory), and the transfer to the device. The ways take turns, in an order drawn for each round; the
ratios to the plain steps, of the rounds, should be at most 1.15 with the cache in the median.

    JAX_PLATFORMS=cpu python -m experiments.benchmarks.teacher_cache --live

Two idle cores: 1.00 for the step alone (quartiles 0.98 and 1.01; 83.1 against 82.9 ms), 0.99 with pipeline and transfer
(0.98 and 1.00), on other ones 1.09 (46.8 against 43.0 ms) and 1.11. On busy cores ResNet-20 had 1.02 and 1.08, and the
live ResNet-18 about 7.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import tyro

import jaxtransfer as jt
from experiments.benchmarks.distillation import in_turns, ratio

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Cost:
    """Measure a step with a cached teacher against a supervised one; prints one JSON line."""

    rounds: int = 30
    """Turns that each way takes."""
    steps: int = 5
    """Steps in a turn."""
    batch_size: int = 64
    """Images per step."""
    student: str = "small-cnn"
    """A model of the zoo, for images 32×32."""
    teacher: str = "resnet18"
    """Likewise, for --live."""
    live: bool = False
    """Also run the teacher itself."""
    examples: int = 10_000
    """Images in the data set."""
    tiny: bool = False
    """Two rounds of a step on few images: shows that it runs, not what it costs."""


def main(cost: Cost) -> dict[str, Any]:
    """Times the steps, prints the figures and returns them."""
    if cost.tiny:
        cost = dataclasses.replace(cost, rounds=2, steps=1, batch_size=8, examples=32, teacher="small-cnn")
    for name in ("rounds", "steps", "batch_size", "examples"):
        if getattr(cost, name) < 1:
            raise jt.InputError(f"--{name.replace('_', '-')} must be at least 1; got {getattr(cost, name)}")
    ways = {name: Way(objective, data, cost) for name, (objective, data) in objectives(cost).items()}
    for way in ways.values():  # caches and the allocator settle
        way.alone()
        way.whole()
    result: dict[str, Any] = {}
    for kind, seconds in {"step": Way.alone, "whole": Way.whole}.items():
        times = in_turns([functools.partial(seconds, way) for way in ways.values()], cost.rounds)
        result[kind] = {
            "ms": dict(zip(ways, np.round(1e3 * np.median(times, axis=0), 2).tolist(), strict=True)),
            "ratio": {name: ratio(own, times[:, 0]) for name, own in list(zip(ways, times.T, strict=True))[1:]},
        }
    result |= {
        "compile_s": {name: round(way.compile_seconds, 2) for name, way in ways.items()},
        "device": jax.devices()[0].device_kind,
        **dataclasses.asdict(cost),
    }
    print(json.dumps(result))
    return result


def objectives(cost: Cost) -> dict[str, tuple[jt.Objective, jt.data.Dataset]]:
    """Returns what is minimised, and the data that it reads, by the name of the way."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (cost.examples, 32, 32, 3), dtype=np.uint8)
    plain = jt.data.Dataset.from_arrays(images, np.arange(cost.examples) % CLASSES, name="noise")
    logits = rng.normal(size=(cost.examples, CLASSES)).astype(np.float32)
    taught = plain.with_columns({"teacher_logits": logits}, of_image=True)
    student, teacher = (
        jt.models.normalize(jt.models.create(name, CLASSES, name_in_params=role), 0.47, 0.25)
        for name, role in ((cost.student, "student"), (cost.teacher, "teacher"))
    )
    labels = jt.classification(student)
    ways = {
        "labels": (labels, plain),
        "cached": (0.1 * labels + 0.9 * jt.distillation(student, jt.cached(), temperature=4.0), taught),
    }
    if cost.live:
        frozen = jt.frozen(teacher, teacher.init(jax.random.key(1), images[:1]))
        ways["live"] = 0.1 * labels + 0.9 * jt.distillation(student, frozen, temperature=4.0), plain
    return ways


class Way:
    """A compiled step, one of its batches on the device, and where the others come from; compiled when it is made."""

    def __init__(self, objective: jt.Objective, data: jt.data.Dataset, cost: Cost):
        optimizer = optax.sgd(0.01, momentum=0.9)
        self.batches, self.steps = jt.data.pipeline(data, cost.batch_size, threads=0).iterate(), cost.steps
        self.step, batch = jt.train_step(objective, optimizer), next(self.batches)
        self.batch, self.state = self.step.place(batch), jt.init(objective, optimizer, jax.random.key(0), batch)
        self.compile_seconds = self._seconds(lambda: self.batch, 1)

    def alone(self) -> float:
        """Makes steps on one batch that is on the device and returns how long each took."""
        return self._seconds(lambda: self.batch, self.steps)

    def whole(self) -> float:
        """Makes steps on new batches, which it makes and transfers, and returns how long each took."""
        return self._seconds(lambda: self.step.place(next(self.batches)), self.steps)

    def _seconds(self, batch: Callable[[], Any], steps: int) -> float:
        jax.block_until_ready(self.state)
        begin = time.perf_counter()
        for _ in range(steps):
            self.state, _ = self.step.placed(self.state, batch())
        jax.block_until_ready(self.state)
        return (time.perf_counter() - begin) / steps


if __name__ == "__main__":
    try:
        main(tyro.cli(Cost))
    except jt.InputError as error:
        print(f"teacher_cache: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
