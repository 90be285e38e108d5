"""What a step of large trainings asks of a TPU pod: from our compiled programs on virtual devices, nothing is run.

Each plan is compiled by the library as a user would train it, over virtual CPU devices with the batch that one chip of
256 would have, and read: operations, bytes by kind of collective, bytes of arguments and temporaries on each device.
What is measured small is scaled by a formula: a ViT-L from nets of one and of two blocks (all figures are linear in
the number of blocks), collectives of activations from two numbers of devices (linear in their number; those of weights
are the same). Times are operations or bytes over a chip's data sheet, TPU v5e by default; `docs/scaling.md` says what
follows from them: `compute`, of products in bfloat16 at the peak; `state`, of weights, optimiser and batch read and
written once; `held`, of temporaries written and read once, both the least that a step asks of memory; `ici`, of what
collectives send. XLA compiles here for CPUs: it computes bfloat16 in float32, so temporaries are twice those that a TPU
holds (`held_gb` is the half), and makes no reduce-scatter. `utilisation` is that of the peak where nothing overlaps and
where everything does, with matrix units that never wait for anything else: ceilings, no forecast.

    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_backend_optimization_level=0 python -m experiments.benchmarks.scaling

The flag spares the time of machine code that is never run, and changes no figure. One JSON line for each plan;
`--plans vit-l-fsdp` chooses some.
"""

import collections
import contextlib
import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import tyro

import jaxtransfer as jt
from jaxtransfer.errors import unknown

CHIPS, BLOCKS = 256, 24
GATHER = "all-gather"
KINDS = ("all-reduce", GATHER, "reduce-scatter", "all-to-all", "collective-permute")
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_COLLECTIVE = re.compile(rf"= (?P<shape>.*?) (?P<kind>{'|'.join(KINDS)})(?:-start)?\(")


@dataclasses.dataclass(frozen=True)
class Chip:
    """A data sheet; by default Cloud TPU v5e's (docs.cloud.google.com/tpu/docs/v5e, read in November 2026)."""

    flops: float = 197e12
    """Operations per second, bfloat16."""
    memory: float = 16e9
    """Bytes."""
    bandwidth: float = 819e9
    """Bytes per second of its memory."""
    ici: float = 200e9
    """Bytes per second that a chip sends to its neighbours, over all of its links; as much comes in."""
    dcn: float = 3.125e9
    """Bytes per second and chip to another pod."""


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Compile the plans on virtual devices and tell what they take on 256 chips; prints JSON lines."""

    plans: tuple[str, ...] = ()
    """Some of them; all by default."""
    devices: int = 4
    """Virtual ones; the collectives of activations are measured on half as many, too."""
    tiny: bool = False
    """Small nets and images: shows that it runs, not what they take."""
    chip: Chip = dataclasses.field(default_factory=Chip)


class Found(NamedTuple):
    """What a compiled program takes on one device, or a linear combination of such.

    Attributes:
      flops: operations, those of a loop's body once.
      arguments: bytes.
      outputs: bytes, of what overwrites arguments, too.
      split: bytes of those arguments that grow fewer with more devices.
      split_outputs: bytes of those outputs.
      temporaries: bytes.
      collectives: by kind, bytes of their results.
      counts: by kind, how many.
    """

    flops: float
    arguments: float
    outputs: float
    split: float
    split_outputs: float
    temporaries: float
    collectives: Mapping[str, float]
    counts: Mapping[str, float]

    def plus(self, other: "Found", factor: float) -> "Found":
        """Returns the sum with a multiple of another."""
        numbers: list[Any] = [one + factor * two for one, two in zip(self[:6], other[:6], strict=True)]
        tables: list[Any] = [
            {kind: one.get(kind, 0) + factor * two.get(kind, 0) for kind in KINDS if kind in one or kind in two}
            for one, two in zip(self[6:], other[6:], strict=True)
        ]
        return Found(*numbers, *tables)


def line_through(low: Found, high: Found, at: tuple[float, float], where: float) -> Found:
    """Returns what is found at `where`, on the line through two measurements."""
    factor = (where - at[0]) / (at[1] - at[0])
    return low.plus(high.plus(low, -1), factor)


def collectives(text: str) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the bytes of the results of collectives in a compiled program by kind, and how many there are.

    Of a collective in two halves the first counts; where it names operands beside results, these count alone.
    """
    sizes: dict[str, float] = collections.defaultdict(float)
    counts: dict[str, float] = collections.defaultdict(float)
    for line in text.splitlines():
        if (found := _COLLECTIVE.search(line)) is None:
            continue
        arrays = [_bytes(*one) for one in _ARRAY.findall(found["shape"])]
        if f"{found['kind']}-start(" in line and found["kind"] != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]
        sizes[found["kind"]] += sum(arrays)
        counts[found["kind"]] += 1
    return dict(sizes), dict(counts)


def _bytes(dtype: str, dimensions: str) -> int:
    return _SIZES[dtype] * math.prod(int(size) for size in dimensions.split(",") if size)


def sent(kind: str, size: float, chips: int) -> float:
    """Returns the bytes that each chip sends for a collective with a result of `size` bytes, by the best algorithm."""
    around = (chips - 1) / chips
    return {
        "all-reduce": 2 * around * size,
        GATHER: around * size,
        "reduce-scatter": (chips - 1) * size,
        "all-to-all": around * size,
        "collective-permute": size,
    }[kind]


def read(step: jt.TrainStep, state: Any, batch: Any) -> Found:
    """Compiles a step for a state of shapes and reads the program."""
    lowered = step.lower(state, batch)
    program = lowered.compile()
    analysed, memory = program.cost_analysis(), program.memory_analysis()
    sizes, counts = collectives(program.as_text())
    (given, shardings), held = (lowered.args_info[0], program.input_shardings[0]), lowered.out_info[0]
    split = sum(_split(given[place], shardings[place]) for place in (0, 2))  # the batch is a chip's own
    return Found(
        float(analysed["flops"]),
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        split,
        _split(held, program.output_shardings[0]),
        memory.temp_size_in_bytes,
        sizes,
        counts,
    )


def _split(shapes: Any, shardings: Any) -> float:
    """Returns the bytes on one device of what is split."""
    found = 0.0
    for leaf, where in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True):
        if not where.is_fully_replicated:
            found += math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return found


def compiled(
    objective: jt.Objective, optimizer: Any, batch: Any, devices: int, *, shard: Mapping[str, Any] | None = None
) -> Found:
    """Returns what the library's step takes on each of some virtual devices; the state has shapes alone."""
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    step = jt.train_step(objective, optimizer, mesh=mesh, shard=shard)
    state = jax.eval_shape(lambda: jt.init(objective, optimizer, jax.random.key(0), batch))
    split = step.placement.shards
    where = step.placement.replicated if split is None else split.state(state)
    if split is None:
        where = jax.tree.map(lambda _: step.placement.replicated, state)
    shaped = jax.tree.map(lambda leaf, one: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), state, where)
    return read(step, shaped, batch)


def images(rows: int, side: int, classes: int, channels: int = 3, **more: Any) -> dict[str, np.ndarray]:
    """Returns a batch of zeros."""
    image = np.zeros((rows, side, side, channels), np.float32)
    return {"image": image, "label": np.arange(rows, dtype=np.int32) % classes, **more}


class Plan(NamedTuple):
    """A training.

    Attributes:
      told: in words.
      rows: of a chip's batch.
      find: `find(scaling, devices) -> Found`, on that many virtual devices, of the whole net.
      weights: whether collectives are of weights alone, the same on any number of devices.
      narrow: whether it computes in bfloat16, in which a TPU holds half of the temporaries that a CPU does.
    """

    told: str
    rows: int
    find: Callable[[Scaling, int], Found]
    weights: bool = True
    narrow: bool = True


def vit_l(*, fsdp: bool, remat: bool = False, lora: bool = False, rows: int = 16) -> Callable[[Scaling, int], Found]:
    """Returns how a ViT-L/16 is measured: by nets of one and of two of its blocks."""

    def of(scaling: Scaling, devices: int, blocks: int) -> Found:
        width, heads, side, size = (16, 2, 32, 2) if scaling.tiny else (1024, 16, 224, rows)
        net = jt.models.vit(width, blocks, heads, 1000, patch=16, dtype="bfloat16", remat=remat)
        batch = images(size * devices, side, 1000)
        if lora:
            base = net.init(jax.random.key(0), jax.ShapeDtypeStruct((1, side, side, 3), np.float32))
            net = jt.deltas.delta(net, base, jt.deltas.lora(8), only="attention/(query|value)/kernel")
        shard = {".*": jt.devices.fsdp("data")} if fsdp else None
        return compiled(jt.classification(net), optax.adamw(1e-4), batch, devices, shard=shard)

    def find(scaling: Scaling, devices: int) -> Found:
        one, two = (of(scaling, devices, blocks) for blocks in (1, 2))
        return line_through(one, two, (1, 2), BLOCKS)

    return find


def simclr(scaling: Scaling, devices: int) -> Found:
    """SimCLR on ResNet-50: 128 images of two views for a chip."""
    rows, side = (2, 32) if scaling.tiny else (128, 224)
    if scaling.tiny:
        net = jt.models.small_cnn(10, width=4)
    else:
        net = jt.models.resnet(50, 10, dtype="bfloat16")
    net = jt.models.with_heads(net, projection=jt.models.head(8 if scaling.tiny else 2048, 128))
    batch = images(rows * devices, side, 10)
    batch["image2"] = batch["image"]
    return compiled(jt.simclr(net, temperature=0.1), optax.lars(0.1), batch, devices)


def maml(scaling: Scaling, devices: int) -> Found:
    """MAML on Conv4: 16 tasks for a chip, of five classes, one example of each to adapt to and 15 to measure by.

    The inner steps are a loop, whose body XLA counts once. What a step of it takes is the difference to the gradient on
    the queries alone, which is compiled, too.
    """
    tasks, queries, steps = (1, 1, 2) if scaling.tiny else (16, 15, 5)
    net = jt.models.conv4(5, width=4 if scaling.tiny else 64)
    objective = jt.maml(jt.classification(net), inner=optax.sgd(0.4), steps=steps)

    def part(size):
        image = np.zeros((tasks * devices, 5 * size, 28, 28, 1), np.float32)
        return {"image": image, "label": np.tile(np.arange(5, dtype=np.int32), (tasks * devices, size))}

    found = compiled(objective, optax.adam(1e-3), {"support": part(1), "query": part(queries)}, devices)
    alone = {name: value.reshape(-1, *value.shape[2:]) for name, value in part(queries).items()}
    query = compiled(jt.classification(net), optax.adam(1e-3), alone, devices)
    return found._replace(flops=query.flops + steps * (found.flops - query.flops))


PLANS = {
    "vit-l": Plan("ViT-L/16 at 224, all weights, whole on each chip", 16, vit_l(fsdp=False)),
    "vit-l-fsdp": Plan("ViT-L/16 at 224, all weights, split over the chips", 16, vit_l(fsdp=True)),
    "vit-l-fsdp-remat": Plan(
        "ViT-L/16 at 224, all weights, split, blocks computed anew", 16, vit_l(fsdp=True, remat=True)
    ),
    "vit-l-lora": Plan("ViT-L/16 at 224, LoRA of rank 8, whole on each chip", 16, vit_l(fsdp=False, lora=True)),
    "vit-l-lora-fsdp": Plan("ViT-L/16 at 224, LoRA of rank 8, the base split", 16, vit_l(fsdp=True, lora=True)),
    "simclr": Plan("SimCLR, ResNet-50 at 224, 32,768 images of two views", 128, simclr, weights=False),
    "maml": Plan("MAML, Conv4 at 28, 4,096 tasks of 5 classes, 5 steps", 16, maml, weights=False, narrow=False),
}


def main(scaling: Scaling) -> list[dict[str, Any]]:
    """Compiles the plans, prints what they take and returns it."""
    for name in scaling.plans:
        if name not in PLANS:
            raise unknown("plan", name, PLANS)
    with contextlib.suppress(RuntimeError):  # JAX may have its devices already
        jax.config.update("jax_num_cpu_devices", scaling.devices)
    if not 2 <= scaling.devices <= len(jax.devices()):
        raise jt.InputError(f"expected 2 virtual devices or more; got {scaling.devices}, and there are {jax.devices()}")
    return [told(name, PLANS[name], scaling) for name in scaling.plans or PLANS]


def told(name: str, plan: Plan, scaling: Scaling) -> dict[str, Any]:
    """Measures a plan, prints what it takes on all of the chips and returns it."""
    found = plan.find(scaling, scaling.devices)
    if not plan.weights:
        half = plan.find(scaling, scaling.devices // 2)
        found = line_through(half, found, (scaling.devices // 2, scaling.devices), CHIPS)
    fewer, chip = 1 - scaling.devices / CHIPS, scaling.chip
    arguments, outputs = found.arguments - fewer * found.split, found.outputs - fewer * found.split_outputs
    bytes_sent = {kind: sent(kind, size, CHIPS) for kind, size in found.collectives.items()}
    held = found.temporaries / (2 if plan.narrow else 1)
    times = {
        "compute": found.flops / chip.flops,
        "state": (arguments + outputs) / chip.bandwidth,
        "held": 2 * held / chip.bandwidth,
        "ici": sum(bytes_sent.values()) / chip.ici,
    }
    result = {
        "plan": name,
        "told": plan.told,
        "global_batch": plan.rows * CHIPS,
        "tflop_per_chip": found.flops / 1e12,
        "argument_gb": arguments / 1e9,
        "temporary_gb": found.temporaries / 1e9,
        "held_gb": held / 1e9,
        "collectives": {
            kind: {"count": round(found.counts[kind]), "result_mb": size / 1e6, "sent_mb": bytes_sent[kind] / 1e6}
            for kind, size in found.collectives.items()
        },
        "ici_mb": sum(bytes_sent.values()) / 1e6,
        "ms": {kind: 1e3 * seconds for kind, seconds in times.items()},
        "utilisation": _between(times),
        "virtual_devices": scaling.devices,
        "jax": jax.__version__,
    }
    print(json.dumps(rounded(result)), flush=True)
    return result


def _between(times: Mapping[str, float]) -> list[float]:
    """Returns the share of its peak that a chip reaches where nothing overlaps, and where everything does."""
    compute = times["compute"]
    return [compute / sum(times.values()), compute / max(times.values())]


def rounded(value: Any) -> Any:
    """Returns numbers with four digits, in whatever they stand."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    try:
        main(tyro.cli(Scaling))
    except jt.InputError as error:
        print(f"scaling: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
