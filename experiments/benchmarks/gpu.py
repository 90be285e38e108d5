"""Where the library stands on one GPU, beside PyTorch in the same run: fine-tuning, distillation, contrast, MAML.

Ours and PyTorch's take turns, compiled and warmed up before; a row is the medians of the turns, in milliseconds per
step, the median of their paired ratios (PyTorch's time over ours), the images per second, and what share of the card's
own matrix product in bfloat16 (measured first, 8192³) ours reaches. Images and networks compute in bfloat16 with
float32 weights, statistics and losses, on both sides; MAML and NT-Xent are in float32: MAML's convolutions may use TF32
on both sides; NT-Xent multiplies in full float32, and PyTorch's by TF32 is told too.

Command: `python -m experiments.benchmarks.gpu --out experiments/benchmarks/results --limit 600` (about 11 minutes on an
H100; `--tiny` for a dry run anywhere). No network; where PyTorch or torchvision is missing ours alone is timed. One
JSON line per row, in `gpu-CARD.jsonl` too; a row that fails is told and the others run. After `--limit` seconds no row
begins.

One H100 80GB, jax 0.11.2, PyTorch 2.11.0, 26 November 2026, in two runs (`results/gpu-nvidia-h100-80gb-hbm3.jsonl`),
times of PyTorch over ours: a meta-step of MAML on Conv4 8.2 ms against 509 ms (66 times; with five steps 48 times, by
first order 36, with pooling 50); NT-Xent of 4,096 pairs 2.0 against 33 ms (16.6 times; the plain form in JAX takes 0.87
of ours, in 541 MB for 149), of 16,384 29.6 against 518 ms in 190 MB for 61 GB, 65,536 in 0.46 s and 346 MB; SimCLR of
ResNet-18, 512 pairs 12.8 against 19.8 ms (1.54 times; making the views inside the step costs 2 % more); ResNet-50
teaching ResNet-18 15.2 against 30.5 ms (2.0 times); ResNet-50 with L2-SP 26.3 against 59.8 ms (2.3 times; 2.1 times
`torch.compile`), the penalty 4.4 % of it. Compiled derivatives through a maximum, wrong on CPU, are right there.
ViT-B/16 and 262,144 pairs have not been run. The file joins both runs; operations per second were added afterwards, by
the counts of `FORWARD`, and a copy's bandwidth left out, as it timed the allocator. This script was changed for both
after the runs. The tile of NT-Xent was 4,096 then, and is 8,192 on GPUs since, from the
row `nt_xent_tiles`.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants some of the card, too

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jaxtransfer as jt
from experiments import max_gradient
from experiments.benchmarks import info_nce, maml, torch_forms, torch_loop

VIEWS = ("image", "image2")  # what two_views makes
FORWARD = {"resnet50": 8.18e9, "resnet18": 3.63e9, "vit_b_16": 35.1e9, "resnet18 of 32×32": 1.11e9}
"""Operations of a forward pass per image, two for a multiplication and addition; a training step makes 3 times them."""

Run = Callable[[int], None]
"""Makes so many steps and waits for the last."""


@dataclasses.dataclass(frozen=True)
class GpuBenchmark:
    """Time the library's workloads on this machine's GPU, interleaved with PyTorch's."""

    out: Path | None = None
    """Folder for gpu-CARD.jsonl."""
    rows: tuple[str, ...] = ()
    """Rows to run, by name; all of them by default."""
    turns: int = 7
    """Timed turns of each side."""
    turn_seconds: float = 0.4
    """About how long a turn takes."""
    limit: float = 420.0
    """Seconds after which no further row begins."""
    tiny: bool = False
    """Small nets and batches and two short turns: shows that it runs, not how fast."""


class Row:
    """A workload in the making: its sides by name, compiled when they are added, and what is known of it."""

    def __init__(self, benchmark: GpuBenchmark):
        self.benchmark, self.sides, self.facts = benchmark, {}, {}

    def ours(
        self, step: jt.TrainStep, state: jt.TrainState, batch: Any, name: str = "ours", flops: bool = True
    ) -> None:
        """Adds a train step of the library."""
        placed = step.place(batch)
        if flops:
            cost = step.lower(state, batch).cost_analysis()
            self.facts["flops"] = (cost[0] if isinstance(cost, list) else cost or {}).get("flops")

        def run(steps: int) -> None:
            nonlocal state
            for _ in range(steps):
                state, _ = step.placed(state, placed)
            jax.block_until_ready(state)

        self.add(name, run)

    def function(self, compiled: Any, arguments: Any, name: str = "ours") -> None:
        """Adds a compiled function."""

        def run(steps: int) -> None:
            found = None
            for _ in range(steps):
                found = compiled(*arguments)
            jax.block_until_ready(found)

        self.add(name, run)

    def pytorch(self, make: Callable[[], torch_forms.Step], name: str = "pytorch") -> None:
        """Adds a step of PyTorch, where there is one."""
        if importlib.util.find_spec("torch") is None:
            return
        import torch  # pyright: ignore[reportMissingImports]

        cuda = torch.cuda.is_available()
        torch.set_default_device("cuda" if cuda else "cpu")
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = True

        def run(steps: int) -> None:
            for _ in range(steps):
                step()
            if cuda:
                torch.cuda.synchronize()

        if cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            step = make()
            self.add(name, run)
        except Exception as error:  # no torchvision, or too little memory: ours is told without it
            self.facts[name] = f"{type(error).__name__}: {str(error)[:200]}"
            return
        if cuda:
            self.facts[f"{name}_peak_mb"] = round(torch.cuda.max_memory_allocated() / 1e6)

    def add(self, name: str, run: Run) -> None:
        """Adds a side and lets it compile and settle."""
        begin = time.perf_counter()
        run(1)
        self.facts[f"{name}_first_s"] = round(time.perf_counter() - begin, 2)
        run(1 if self.benchmark.tiny else 5)
        self.sides[name] = run

    def measured(self) -> dict[str, Any]:
        """Lets the sides take turns and returns medians in ms per step, and ratios to ours."""
        names, counts = list(self.sides), {}
        for name, run in self.sides.items():
            begin = time.perf_counter()
            run(2)
            once = (time.perf_counter() - begin) / 2
            counts[name] = 1 if self.benchmark.tiny else max(int(self.benchmark.turn_seconds / once), 1)
        turns = 2 if self.benchmark.tiny else self.benchmark.turns
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(turns):
            for name in names if turn % 2 == 0 else reversed(names):
                begin = time.perf_counter()
                self.sides[name](counts[name])
                times[name].append((time.perf_counter() - begin) / counts[name])
        found: dict[str, Any] = {f"{name}_ms": round(1e3 * float(np.median(times[name])), 3) for name in names}
        own = np.array(times[names[0]])
        for name in names[1:]:
            found[f"{name}_ratio"] = round(float(np.median(np.array(times[name]) / own)), 3)
        return found


def main(benchmark: GpuBenchmark) -> list[dict[str, Any]]:
    """Runs the rows, prints each and returns them."""
    if unknown := set(benchmark.rows) - ROWS.keys():
        raise jt.InputError(f"unknown row {sorted(unknown)[0]!r}; there are {', '.join(ROWS)}")
    device, begin = jax.devices()[0], time.perf_counter()
    card = re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower()).strip("-")
    peak = ceiling(benchmark)
    found = [{"row": "machine", "device": device.device_kind, "jax": jax.__version__, "pytorch": version("torch")}]
    found[0]["matmul_tflops"] = round(1e-12 * peak, 1)
    print(json.dumps(found[0]), flush=True)
    for name in benchmark.rows or ROWS:
        if time.perf_counter() - begin > benchmark.limit:
            row = {"row": name, "left_out": f"the limit of {benchmark.limit:.0f} s is reached"}
        else:
            row = {"row": name, **one(ROWS[name], benchmark, peak)}
        print(json.dumps(row), flush=True)
        found.append(row)
    if benchmark.out is not None:
        benchmark.out.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (benchmark.out / f"gpu-{card}.jsonl").write_text(lines)
    return found


def one(make: Callable[[Row], None], benchmark: GpuBenchmark, peak: float) -> dict[str, Any]:
    """Makes and measures a row; what fails is told in it."""
    row, begin = Row(benchmark), time.perf_counter()
    try:
        make(row)
        figures = row.measured() if row.sides else {}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        jax.clear_caches()
        free_pytorch()
    images, flops = row.facts.pop("images", None), row.facts.pop("flops", None)
    if images is not None:
        figures["images_per_s"] = round(1e3 * images / figures["ours_ms"])
    if flops is not None:
        figures["tflops"] = round(flops / (1e9 * figures["ours_ms"]), 1)
        figures["share_of_matmul"] = round(1e3 * flops / figures["ours_ms"] / peak, 3)
    return {**figures, **row.facts, "seconds": round(time.perf_counter() - begin, 1)}


def free_pytorch() -> None:
    """Gives PyTorch's cached memory back."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        sys.modules["torch"].cuda.empty_cache()


def version(package: str) -> str | None:
    """The version of a package that is there."""
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else None


def ceiling(benchmark: GpuBenchmark) -> float:
    """Measures the operations/s of a product of random matrices in bfloat16."""
    side, repeats = (256, 2) if benchmark.tiny else (8192, 30)
    a, b = (jax.random.normal(key, (side, side), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, b))
    begin, found = time.perf_counter(), None
    for _ in range(repeats):
        found = product(a, b)
    jax.block_until_ready(found)
    return 2 * side**3 * repeats / (time.perf_counter() - begin)


def image_batch(
    count: int, side: int, classes: int = 1000, views: tuple[str, ...] = ("image",)
) -> dict[str, np.ndarray]:
    """Returns images of noise [count, side, side, 3] under each name, and labels."""
    rng = np.random.default_rng(0)
    images = {view: rng.random((count, side, side, 3), np.float32) for view in views}
    return {**images, "label": rng.integers(0, classes, count).astype(np.int32)}


def sgd() -> optax.GradientTransformation:
    """What the rows of images train with, on both sides."""
    return optax.sgd(torch_forms.RATE, momentum=torch_forms.MOMENTUM)


def started(objective: jt.Objective, batch: Mapping[str, Any]) -> tuple[jt.TrainStep, jt.TrainState, Any]:
    """Returns the step, its first state and the batch."""
    return jt.train_step(objective, sgd()), jt.init(objective, sgd(), jax.random.key(0), batch), batch


def fine_tuning(row: Row, zoo: str, torchvision: str, count: int) -> None:
    """Fine-tuning with L2-SP, against the same without the penalty and against PyTorch with it, eager and compiled."""
    tiny = row.benchmark.tiny
    count, side = (4, 32) if tiny else (count, 224)
    model = jt.models.create("resnet18" if tiny else zoo, 1000, dtype=jnp.bfloat16)
    batch = image_batch(count, side)
    plain = jt.classification(model)
    anchor, _ = plain.init(jax.random.key(1), batch)
    row.facts |= {"images": count, "batch": count, "side": side, "flops": 3 * count * FORWARD[torchvision]}
    row.ours(*started(plain + jt.l2_sp(anchor, strength=torch_forms.STRENGTH), batch))
    row.ours(*started(plain, batch), name="ours_without_penalty")
    torchvision = "resnet18" if tiny else torchvision
    for name, compiled in (("pytorch", False), ("pytorch_compiled", True)):
        if compiled and tiny:
            continue
        row.pytorch(
            lambda compiled=compiled: torch_forms.fine_tuning(
                torchvision, count, side, penalty=True, compiled=compiled
            ),
            name,
        )


def distillation(row: Row) -> None:
    """ResNet-50 teaches ResNet-18."""
    tiny = row.benchmark.tiny
    count, side = (4, 32) if tiny else (128, 224)
    batch = image_batch(count, side)
    student = jt.models.resnet18(1000, small_images=tiny, name="student", dtype=jnp.bfloat16)
    build = jt.models.resnet18 if tiny else jt.models.resnet50
    teacher = build(1000, name="teacher", dtype=jnp.bfloat16)
    wise = jt.frozen(teacher, teacher.init(jax.random.key(1), batch["image"][:1]))
    objective = 0.1 * jt.classification(student) + 0.9 * jt.distillation(
        student, wise, temperature=torch_forms.TEMPERATURE
    )
    flops = count * (3 * FORWARD["resnet18"] + FORWARD["resnet50"])
    row.facts |= {"images": count, "batch": count, "side": side, "flops": flops}
    row.ours(*started(objective, batch))
    names = ("resnet18", "resnet18" if tiny else "resnet50")
    row.pytorch(lambda: torch_forms.distillation(*names, count, side))


def simclr(row: Row) -> None:
    """SimCLR of ResNet-18 on pairs of 32×32, the views given; and ours with the views made inside the step."""
    count = 8 if row.benchmark.tiny else 512
    encoder = jt.models.resnet18(10, small_images=True, dtype=jnp.bfloat16)
    network = jt.models.with_heads(encoder, projection=jt.models.head(512, 128))
    objective = jt.simclr(network, temperature=0.5)
    batch = image_batch(count, 32, views=VIEWS)
    row.facts |= {"images": 2 * count, "pairs": count, "flops": 6 * count * FORWARD["resnet18 of 32×32"]}
    row.ours(*started(objective, batch))
    images = image_batch(count, 32)
    transform = jt.data.views.two_views(jt.data.views.simclr())
    state = jt.init(objective, sgd(), jax.random.key(0), batch)
    row.ours(jt.train_step(objective, sgd(), transform=transform), state, images, "ours_making_views")
    row.pytorch(lambda: torch_forms.simclr(count))


def nt_xent(row: Row, pairs: int) -> None:
    """Value and gradient of NT-Xent, D = 128: ours, by the whole matrix, and PyTorch's, in full float32 and by TF32."""
    pairs = 64 if row.benchmark.tiny else pairs
    views = info_nce.inputs(pairs)
    program = info_nce.compiled(jt.losses.nt_xent, views)
    row.facts |= {"pairs": pairs, "ours_temp_mb": info_nce.temp_mb(program)}
    row.function(program, views)
    if pairs > 16_384:
        return
    if pairs <= 8192:
        with jax.default_matmul_precision("highest"):
            plain = info_nce.compiled(info_nce.plain, views)
        row.facts["plain_temp_mb"] = info_nce.temp_mb(plain)
        row.function(plain, views, "plain")
    one, other = (np.asarray(view) for view in views)
    for name, precision in (("pytorch", "highest"), ("pytorch_tf32", "high")):

        def make(precision=precision) -> torch_forms.Step:
            import torch  # pyright: ignore[reportMissingImports]

            device = torch.get_default_device()
            arrays = (torch.from_numpy(view.copy()).to(device) for view in (one, other))
            step = torch_forms.nt_xent(*arrays, temperature=info_nce.TEMPERATURE)

            def with_precision() -> Any:
                torch.set_float32_matmul_precision(precision)
                return step()

            return with_precision

        row.pytorch(make, name)


def tiles(row: Row) -> None:
    """The side of a tile of NT-Xent at 16,384 pairs: the one that is taken by default, and others."""
    pairs = 64 if row.benchmark.tiny else 16_384
    views = info_nce.inputs(pairs)
    for name, chunk in (("ours", None), *((f"tile_{side}", side) for side in (1024, 2048, 4096, 8192, 16_384))):

        def loss(one, other, *, temperature, chunk=chunk):
            return jt.losses.nt_xent(one, other, temperature=temperature, chunk=chunk)

        row.function(info_nce.compiled(loss, views), views, name)


def meta_step(row: Row, number: int) -> None:
    """A meta-step of MAML on Conv4, the CPU benchmark's workload."""
    workload, tasks = maml.ROWS[number], 2 if row.benchmark.tiny else 32
    row.facts |= {"tasks": tasks, **dataclasses.asdict(workload)}
    step, state, batch = maml.ours(workload, tasks)
    row.ours(step, state, batch)
    configuration = {
        **torch_loop.DEFAULTS,
        "model": "conv4",
        "tasks": tasks,
        "support": maml.WAYS,
        "query": maml.WAYS * maml.QUERIES,
        "steps": workload.steps,
        "pooled": workload.pooled,
        "first_order": workload.first_order,
        "lr": 0.4,
    }

    def make() -> torch_forms.Step:
        import torch  # pyright: ignore[reportMissingImports]

        return torch_loop.loop(torch, configuration)

    row.pytorch(make)


def maxima(row: Row) -> None:
    """Whether compiled derivatives through a maximum are right here: see `experiments.max_gradient`."""
    with jax.enable_x64(True):
        for name, maximum in max_gradient.MAXIMA.items():
            row.facts[name] = dict(
                zip(("difference", "eager", "compiled", "forward"), max_gradient.derivatives(maximum), strict=True)
            )


ROWS: dict[str, Callable[[Row], None]] = {
    "maxima": maxima,
    "nt_xent_4096": lambda row: nt_xent(row, 4096),
    "nt_xent_16384": lambda row: nt_xent(row, 16_384),
    "nt_xent_65536": lambda row: nt_xent(row, 65_536),
    "nt_xent_tiles": tiles,
    "maml_1_step": lambda row: meta_step(row, 0),
    "maml_5_steps": lambda row: meta_step(row, 1),
    "maml_5_steps_first_order": lambda row: meta_step(row, 3),
    "maml_pooled": lambda row: meta_step(row, 4),
    "simclr_resnet18": simclr,
    "distillation_resnet50_resnet18": distillation,
    "l2_sp_resnet50": lambda row: fine_tuning(row, "resnet50-imagenet", "resnet50", 128),
    "l2_sp_vit_b16": lambda row: fine_tuning(row, "vit-b-16", "vit_b_16", 128),
    "nt_xent_262144": lambda row: nt_xent(row, 262_144),
}


if __name__ == "__main__":
    try:
        main(tyro.cli(GpuBenchmark, description=__doc__))
    except jt.InputError as error:
        print(f"gpu: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
