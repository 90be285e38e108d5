"""What the L2-SP penalty costs in one training step: ResNet-20, batches of 128 images 32×32, SGD with momentum.

Both steps are compiled first; then they run in pairs, the one without and the one with the penalty, in an order that
alternates from pair to pair. The figure is the median of the paired ratios minus one; it should be at most 3 %. The
penalty covers every parameter.

    JAX_PLATFORMS=cpu python -m experiments.benchmarks.l2_sp

Two cores: the penalty costs 0.5 % (quartiles −1.2 % and 2.4 %, 60 pairs), that is 679 ms against 676 ms; the steps
compile in 3.5 s with it and 3.3 s without. One pair varies more than the cost, so the median is what counts.
"""

import dataclasses
import json
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
import optax
import tyro

import jaxtransfer as jt


@dataclasses.dataclass(frozen=True)
class Cost:
    """Measure a training step with and without L2-SP; prints one JSON line."""

    pairs: int = 60
    """Pairs of steps that are timed."""
    batch_size: int = 128
    """Images per step."""
    model: str = "resnet20"
    """A model of the zoo, for images 32×32."""
    tiny: bool = False
    """Three pairs of a small net: shows that it runs, not what it costs."""


def main(cost: Cost) -> dict[str, Any]:
    """Times the steps, prints the figures and returns them."""
    if cost.tiny:
        cost = dataclasses.replace(cost, pairs=3, batch_size=8, model="small-cnn")
    if cost.pairs < 1 or cost.batch_size < 1:
        raise jt.InputError(f"--pairs and --batch-size must be at least 1; got {cost.pairs} and {cost.batch_size}")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (cost.batch_size, 32, 32, 3), dtype=np.uint8)
    batch = {"image": images, "label": rng.integers(0, 10, cost.batch_size).astype(np.int32)}
    model = jt.models.normalize(jt.models.create(cost.model, 10), 0.47, 0.25)
    plain = jt.classification(model)
    anchor, _ = plain.init(jax.random.key(1), batch)
    steps = [Timed(objective, batch) for objective in (plain, plain + jt.l2_sp(anchor, strength=0.01))]
    for step in steps * 2:  # caches and the allocator settle
        step.seconds()
    times = [[0.0, 0.0] for _ in range(cost.pairs)]
    for number, pair in enumerate(times):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            pair[which] = steps[which].seconds()
    ratios = sorted(with_penalty / without for without, with_penalty in times)
    without, with_penalty = (statistics.median(column) for column in zip(*times, strict=True))
    result = {
        "cost_percent": round(100 * (statistics.median(ratios) - 1), 2),
        "quartiles_percent": [round(100 * (ratios[len(ratios) * k // 4] - 1), 2) for k in (1, 3)],
        "ms_without": round(1e3 * without, 2),
        "ms_with": round(1e3 * with_penalty, 2),
        "compile_s_without": round(steps[0].compile_seconds, 2),
        "compile_s_with": round(steps[1].compile_seconds, 2),
        "device": jax.devices()[0].device_kind,
        **dataclasses.asdict(cost),
    }
    print(json.dumps(result))
    return result


class Timed:
    """A training step on one batch that stays on the device, compiled when it is made."""

    def __init__(self, objective: jt.Objective, batch: dict[str, np.ndarray]):
        optimizer = optax.sgd(0.01, momentum=0.9)
        self.step = jt.train_step(objective, optimizer)
        self.state = jt.init(objective, optimizer, jax.random.key(0), batch)
        self.batch = self.step.place(batch)
        self.compile_seconds = self.seconds()

    def seconds(self) -> float:
        """Makes one update and returns how long it took."""
        jax.block_until_ready((self.state, self.batch))
        begin = time.perf_counter()
        self.state, metrics = self.step.placed(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - begin


if __name__ == "__main__":
    try:
        main(tyro.cli(Cost))
    except jt.InputError as error:
        print(f"l2_sp: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
