"""What the library's compiled step costs, against the smallest step that does the same by hand in plain JAX.

ResNet-18 for 32×32 images, batches of 64; ViT-Ti with patches of 4, batches of 32; a perceptron 784-256-256-10, batches
of 128; DANN on LeNet (`adversarial_step`'s forms). By hand means one function from the weights to the loss, an optax
optimiser and `jax.jit` that donates: no objective, no metrics, no names. Both start from weights of the same shapes,
are compiled ahead, each for itself, then run in turn, in an order that alternates. One JSON line for each net:

- `flops_ratio`, `bytes_ratio`: ours over by hand, of XLA's own count of the compiled programs, which no other program
  on the machine disturbs: operations, and bytes that they read and write. `temporary_ratio`: bytes held in between.
- `ratio`: the median of the ratios of neighbours' times (with quartiles), to be at most 1.03; `cpu_ratio` that of the
  processor's time over all threads. `ms` and `compile_s` of each.

    JAX_PLATFORMS=cpu python -m experiments.benchmarks.hand_written_step

Two cores that did nothing else, 24 rounds (the perceptron 400): ResNet-18 0.95 times the time by hand (quartiles 0.94
and 0.97; 2.13 s), ViT-Ti 0.96 (0.94 and 0.97; 1.56 s), the perceptron 1.02 (0.97 and 1.08; 1.4 ms), DANN 0.35 (30 ms;
1.22 times the operations, as convolution and pooling are one product, and 0.92 times the bytes). Operations of the
others: 0.998 to 1.0003 times, bytes 0.90 to 1.002.
"""

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jaxtransfer as jt
from experiments.benchmarks import adversarial_step
from jaxtransfer.errors import unknown

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class HandWrittenStep:
    """Time the library's step and one by hand, interleaved; prints a JSON line for each net."""

    nets: tuple[str, ...] = ()
    """Any of mlp, dann, vit-ti, resnet18; all by default."""
    rounds: int = 30
    """Steps of each program that are timed."""
    tiny: bool = False
    """Two rounds of small nets: shows that it runs, not what it costs."""


def main(benchmark: HandWrittenStep) -> list[dict[str, Any]]:
    """Times the programs, prints the figures and returns them."""
    for name in benchmark.nets:
        if name not in NETS:
            raise unknown("net", name, NETS)
    if benchmark.rounds < 1:
        raise jt.InputError(f"rounds are 1 or more; got {benchmark.rounds}")
    rounds = 2 if benchmark.tiny else benchmark.rounds
    with jax.numpy_rank_promotion("allow"):  # as the forms by hand are written, where strict tests run them
        return [measured(name, rounds, tiny=benchmark.tiny) for name in benchmark.nets or NETS]


def measured(name: str, rounds: int, *, tiny: bool) -> dict[str, Any]:
    """Compiles and times both steps of a net, prints what was found and returns it."""
    forms = NETS[name](tiny)
    programs = {which: Timed(*form) for which, form in zip(("ours", "by_hand"), forms, strict=True)}
    for program in [*programs.values()] * 2:  # caches and the allocator settle
        program.seconds()
    times: dict[str, list[tuple[float, float]]] = {which: [] for which in programs}
    for number in range(rounds):
        for which in list(programs)[:: 1 if number % 2 else -1]:
            times[which].append(programs[which].seconds())
    pairs = list(zip(times["ours"], times["by_hand"], strict=True))
    ratios, worked = (sorted(mine[k] / max(other[k], 1e-9) for mine, other in pairs) for k in (0, 1))
    mine, other = programs["ours"], programs["by_hand"]
    result = {
        "benchmark": "hand_written_step",
        "net": name,
        "flops_ratio": round(mine.flops / other.flops, 4),
        "bytes_ratio": round(mine.bytes / other.bytes, 4),
        "temporary_ratio": round(mine.temporaries / max(other.temporaries, 1), 4),
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(ratios[len(ratios) * k // 4], 3) for k in (1, 3)],
        "cpu_ratio": round(statistics.median(worked), 3),
        **{
            which: {
                "ms": round(1e3 * statistics.median(wall for wall, _ in times[which]), 2),
                "compile_s": round(program.compile_seconds, 2),
                "gflop": round(program.flops / 1e9, 4),
                "loss": round(program.loss, 4),
            }
            for which, program in programs.items()
        },
        "rounds": rounds,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    print(json.dumps(result), flush=True)
    return result


class Timed:
    """A step `step(state, batch) -> (state, loss)` on values that stay on the device, compiled when it is made.

    `lower(state, batch)` gives its program to count; the call finds what was compiled for that.
    """

    def __init__(self, step: Callable, lower: Callable, state: Any, batch: Any):
        begin = time.perf_counter()
        compiled = lower(state, batch).compile()
        self.compile_seconds = time.perf_counter() - begin
        cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
        self.flops, self.bytes = float(cost["flops"]), float(cost["bytes accessed"])
        self.temporaries = memory.temp_size_in_bytes
        self.step, self.state, self.batch, self.loss = step, state, jax.device_put(batch), 0.0

    def seconds(self) -> tuple[float, float]:
        """Makes one update and returns how long it took, by the clock and of the processor."""
        jax.block_until_ready((self.state, self.batch))
        begin, worked = time.perf_counter(), time.process_time()
        self.state, told = jax.block_until_ready(self.step(self.state, self.batch))
        took = time.perf_counter() - begin, time.process_time() - worked
        self.loss = float(told["loss"] if isinstance(told, dict) else told)
        return took


def by_library(objective: jt.Objective, optimizer: Any, batch: Any, variables: Any = None) -> tuple[Any, ...]:
    """Returns the library's step and what it is called with, from given variables or fresh ones."""
    step = jt.train_step(objective, optimizer)
    given: dict[str, Any] = {}
    if variables is not None:
        given = {"params": {"model": variables["params"]}}
        if state := {kind: value for kind, value in variables.items() if kind != "params"}:
            given["state"] = {"model": state}
    state = jt.init(objective, optimizer, jax.random.key(0), batch, **given)
    return step.placed, step.lower, state, step.place(batch)


def by_hand(
    forward: Callable, params: Any, running: Any, batch: dict[str, np.ndarray], optimizer: optax.GradientTransformation
) -> tuple[Any, ...]:
    """Returns a classification step around `forward(params, running, images) -> (logits, running)`, and its values."""

    def loss(params, running, batch):
        logits, running = forward(params, running, batch["image"])
        scores = jax.nn.log_softmax(logits.astype(jnp.float32))
        right = batch["label"][:, None] == jnp.arange(logits.shape[1])[None]
        return -jnp.mean(jnp.sum(jnp.where(right, scores, 0), 1)), running

    @functools.partial(jax.jit, donate_argnums=0)  # as the library's
    def step(state, batch):
        params, running, opt_state = state
        (value, running), gradient = jax.value_and_grad(loss, has_aux=True)(params, running, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), running, opt_state), value

    params, running = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), (params, running))
    return step, step.lower, (params, running, optimizer.init(params)), batch


def images(rows: int, *shape: int) -> dict[str, np.ndarray]:
    """Returns random images and labels."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(rows, *shape)).astype(np.float32)
    return {"image": image, "label": rng.integers(0, CLASSES, rows).astype(np.int32)}


def classifiers(net: jt.Model, forward: Callable, optimizer: optax.GradientTransformation, batch: Any):
    """Returns the library's step of a net, and one by hand from the same weights."""
    variables = jax.jit(net.init)(jax.random.key(0), batch["image"])
    ours = by_library(jt.classification(net), optimizer, batch, variables)
    return ours, by_hand(forward, variables["params"], variables.get("batch_stats", {}), batch, optimizer)


def dense(x: Any, p: Any) -> Any:
    """Returns a linear layer."""
    return x @ p["kernel"] + p["bias"]


def mlp(tiny: bool):
    """A perceptron."""

    def forward(params, running, x):
        x = x.reshape(len(x), -1)
        for name in ("stage1", "stage2"):
            x = jax.nn.relu(dense(x, params[name]))
        return dense(x, params["head"]), running

    net = jt.models.mlp(CLASSES, hidden=(8, 8) if tiny else (256, 256))
    return classifiers(net, forward, optax.adam(1e-3), images(4 if tiny else 128, 28, 28, 1))


def vit_ti(tiny: bool):
    """A vision transformer."""
    width, depth, heads, patch = (8, 1, 2, 16) if tiny else (192, 12, 3, 4)

    def norm(x, p):
        mean = x.mean(-1, keepdims=True)
        var = jnp.square(x - mean).mean(-1, keepdims=True)
        return (x - mean) * (jax.lax.rsqrt(var + 1e-6) * p["scale"]) + p["bias"]

    def attention(x, p):
        q, k, v = (
            jnp.einsum("bnd,dhe->bnhe", x, p[name]["kernel"]) + p[name]["bias"] for name in ("query", "key", "value")
        )
        scores = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q / np.sqrt(width // heads), k))
        mixed = jnp.einsum("bhqk,bkhe->bqhe", scores, v)
        return jnp.einsum("bnhe,hed->bnd", mixed, p["out"]["kernel"]) + p["out"]["bias"]

    def forward(params, running, x):
        rows, side = len(x), x.shape[1] // patch
        x = x.reshape(rows, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5).reshape(rows, side * side, -1)
        stem = params["stem_conv"]
        x = x @ stem["kernel"].reshape(-1, width) + stem["bias"]
        token = jnp.broadcast_to(params["stem_token"], (rows, 1, width))
        x = jnp.concatenate([token, x], 1) + params["stem_position"]
        for number in range(1, depth + 1):
            p = params[f"stage{number}"]
            x = x + attention(norm(x, p["norm1"]), p["attention"])
            hidden = jax.nn.gelu(dense(norm(x, p["norm2"]), p["fc1"]), approximate=False)
            x = x + dense(hidden, p["fc2"])
        return dense(norm(x, params["final_norm"])[:, 0], params["head"]), running

    net = jt.models.vit(width, depth, heads, CLASSES, patch=patch)
    return classifiers(net, forward, optax.adamw(1e-3), images(2 if tiny else 32, 32, 32, 3))


def resnet18(tiny: bool):
    """ResNet-18 with the stem for small images."""

    def convolved(x, kernel, stride=1):
        pad = kernel.shape[0] // 2
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, [(pad, pad)] * 2, dimension_numbers=layout)

    def forward(params, running, x):
        new: dict[str, Any] = {}

        def norm(x, *path):
            p, stats = params, running
            for name in path:
                p, stats = p[name], stats[name]
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            kept = {"mean": 0.9 * stats["mean"] + 0.1 * mean, "var": 0.9 * stats["var"] + 0.1 * var}
            (new if len(path) == 1 else new.setdefault(path[0], {}))[path[-1]] = kept
            return (x - mean) * (jax.lax.rsqrt(var + 1e-5) * p["scale"]) + p["bias"]

        x = jax.nn.relu(norm(convolved(x, params["stem_conv"]["kernel"]), "stem_norm"))
        for stage in range(1, 5):
            for block in (1, 2):
                name = f"stage{stage}_block{block}"
                stride, p = 2 if stage > 1 and block == 1 else 1, params[name]
                y = jax.nn.relu(norm(convolved(x, p["conv1"]["kernel"], stride), name, "norm1"))
                y = norm(convolved(y, p["conv2"]["kernel"]), name, "norm2")
                if "shortcut_conv" in p:
                    x = norm(convolved(x, p["shortcut_conv"]["kernel"], stride), name, "shortcut_norm")
                x = jax.nn.relu(x + y)
        return dense(x.mean((1, 2)), params["head"]), new

    net = jt.models.resnet18(CLASSES, small_images=True)
    return classifiers(net, forward, optax.sgd(0.1, momentum=0.9), images(*(2, 8, 8, 3) if tiny else (64, 32, 32, 3)))


def dann(tiny: bool):
    """DANN on LeNet."""
    rows, hidden = (4, 16) if tiny else (64, 1024)
    batch, net = adversarial_step.two_domains(rows), jt.models.lenet(adversarial_step.CLASSES)
    discriminator = jt.adaptation.discriminator(hidden=(hidden, hidden))
    adversary = jt.adaptation.dann(net, discriminator=discriminator)
    objective = jt.together(jt.classification(net).on("source") + adversary)
    step, state, placed = adversarial_step.by_hand(batch, hidden)
    return by_library(objective, optax.adam(1e-3), batch), (step, step.lower, state, placed)


NETS = {"mlp": mlp, "dann": dann, "vit-ti": vit_ti, "resnet18": resnet18}


if __name__ == "__main__":
    try:
        main(tyro.cli(HandWrittenStep))
    except jt.InputError as error:
        print(f"hand_written_step: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
