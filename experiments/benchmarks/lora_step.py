"""What a LoRA step costs, against full fine-tuning: ViT-Ti on 32×32 images, patches of 4, Adam.

`lora` is `jt.deltas.delta(net, variables, jt.deltas.lora(8), only="attention/(query|value)/kernel")`, 73,728 parameters
that train of 5.4 million; `full` trains the net itself. Both are the library's step on the same batch, compiled first,
then run in turn, in an order that rotates; `ratio` is the median of the ratios of neighbours, and should be at most
0.75. `cpu_ratio` is that of the processor's time over all threads, which other programs on the machine disturb less.

    JAX_PLATFORMS=cpu python -m experiments.benchmarks.lora_step --rounds 8

On two cores that many other programs kept busy: 0.42 times the full step (quartiles 0.39 and 0.49; processor's time
0.43), and 0.4 times its time to compile; 147,457 numbers of optimiser state against 10,760,265.
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

CLASSES, SIDE = 100, 32


@dataclasses.dataclass(frozen=True)
class LoraStep:
    """Time a step of LoRA and of full fine-tuning, interleaved; prints one JSON line."""

    rounds: int = 20
    """Steps of each program that are timed."""
    batch_size: int = 32
    """Images."""
    rank: int = 8
    """Of the deltas of queries and values."""
    tiny: bool = False
    """Two rounds of a small net and batch: shows that it runs, not what it costs."""


def main(benchmark: LoraStep) -> dict[str, Any]:
    """Times the programs, prints the figures and returns them."""
    if benchmark.tiny:
        benchmark = dataclasses.replace(benchmark, rounds=2, batch_size=2, rank=2)
    if min(benchmark.rounds, benchmark.batch_size, benchmark.rank) < 1:
        raise jt.InputError(f"rounds, batch size and rank are 1 or more; got {benchmark}")
    net = jt.models.vit(8, 1, 2, CLASSES, patch=16) if benchmark.tiny else jt.models.vit_ti(CLASSES, patch=4)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(benchmark.batch_size, SIDE, SIDE, 3)).astype(np.float32)
    batch = {"image": image, "label": rng.integers(0, CLASSES, benchmark.batch_size).astype(np.int32)}
    variables = jax.jit(net.init)(jax.random.key(0), image)
    part = jt.deltas.lora(benchmark.rank)
    models = {
        "lora": jt.deltas.delta(net, variables, part, only="attention/(query|value)/kernel"),
        "full": net,
    }
    programs = {name: Timed(model, batch) for name, model in models.items()}
    for program in [*programs.values()] * 2:  # caches and the allocator settle
        program.seconds()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for number in range(benchmark.rounds):
        for name in list(programs)[:: 1 if number % 2 else -1]:
            times[name].append(programs[name].seconds())
    result: dict[str, Any] = {"benchmark": "lora_step", "device": jax.devices()[0].device_kind}
    for name, program in programs.items():
        result[name] = {
            "ms": round(1e3 * statistics.median(wall for wall, _ in times[name]), 1),
            "compile_s": round(program.compile_seconds, 2),
            "trained": program.trained,
            "optimizer_numbers": program.optimizer_numbers,
        }
    pairs = list(zip(times["lora"], times["full"], strict=True))
    ratios, worked = (sorted(mine[k] / max(other[k], 1e-9) for mine, other in pairs) for k in (0, 1))
    result["ratio"] = round(statistics.median(ratios), 3)
    result["quartiles"] = [round(ratios[len(ratios) * k // 4], 3) for k in (1, 3)]
    result["cpu_ratio"] = round(statistics.median(worked), 3)
    result |= {"rounds": benchmark.rounds, "batch_size": benchmark.batch_size, "rank": benchmark.rank}
    print(json.dumps(result), flush=True)
    return result


class Timed:
    """The library's step of a model on one batch that stays on the device, compiled when it is made."""

    def __init__(self, model, batch):
        objective, optimizer = jt.classification(model), optax.adam(1e-3)
        self.step = jt.train_step(objective, optimizer)
        self.state = jt.init(objective, optimizer, jax.random.key(0), batch)
        self.trained = jt.tree.count(self.state.params)
        self.optimizer_numbers = jt.tree.count(self.state.opt_state)
        self.batch = self.step.place(batch)
        self.compile_seconds, _ = self.seconds()

    def seconds(self) -> tuple[float, float]:
        """Makes one update and returns how long it took, by the clock and of the processor."""
        jax.block_until_ready((self.state, self.batch))
        begin, worked = time.perf_counter(), time.process_time()
        self.state, metrics = self.step.placed(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - begin, time.process_time() - worked


if __name__ == "__main__":
    try:
        main(tyro.cli(LoraStep))
    except jt.InputError as error:
        print(f"lora_step: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
