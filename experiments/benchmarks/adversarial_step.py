"""What a DANN step costs, against a minimal program by hand: LeNet, 128 images 28×28 of each domain, Adam.

Three programs make the same update. `ours` is `jt.together(classification(net).on("source") + dann(net))`; `by_hand` is
plain JAX from the convolutions to the gradient reversal, in one function; `same_net` is a step by hand around the
library's LeNet, which leaves what objectives and the step cost. They are compiled first, then run in turn, in an order
that rotates; `ratio` is the median of the ratios of neighbours, and should be at most 1.05. `cpu_ratio` is that of the
processor's time over all threads, which other programs on the machine disturb less.

    JAX_PLATFORMS=cpu python -m experiments.benchmarks.adversarial_step

On two cores that many other programs kept busy, two runs of 40 rounds: 0.46 and 0.47 times `by_hand`, whose pooling and
its gradient are XLA's; 0.99 and 0.96 times `same_net` (quartiles 0.90 to 1.16; processor's time 1.03 and 0.98).
"""

import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jaxtransfer as jt

CLASSES, SIDE = 10, 28


@dataclasses.dataclass(frozen=True)
class AdversarialStep:
    """Time a DANN step, interleaved with minimal programs by hand; prints one JSON line."""

    rounds: int = 40
    """Steps of each program that are timed."""
    batch_size: int = 128
    """Images of each domain."""
    hidden: int = 1024
    """Units in each of the discriminator's two layers."""
    tiny: bool = False
    """Two rounds of small batches: shows that it runs, not what it costs."""


def main(benchmark: AdversarialStep) -> dict[str, Any]:
    """Times the programs, prints the figures and returns them."""
    if benchmark.tiny:
        benchmark = dataclasses.replace(benchmark, rounds=2, batch_size=4, hidden=16)
    if min(benchmark.rounds, benchmark.batch_size, benchmark.hidden) < 1:
        raise jt.InputError(f"rounds, batch size and hidden units are 1 or more; got {benchmark}")
    batch = two_domains(benchmark.batch_size)
    makers = {"ours": ours, "by_hand": by_hand, "same_net": same_net}
    programs = {name: Timed(*make(batch, benchmark.hidden)) for name, make in makers.items()}
    for program in [*programs.values()] * 2:  # caches and the allocator settle
        program.seconds()
    names = list(programs)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for number in range(benchmark.rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            times[name].append(programs[name].seconds())
    result: dict[str, Any] = {"benchmark": "adversarial_step", "device": jax.devices()[0].device_kind}
    for name, program in programs.items():
        result[name] = {
            "ms": round(1e3 * statistics.median(wall for wall, _ in times[name]), 2),
            "compile_s": round(program.compile_seconds, 2),
            "loss": round(program.loss, 3),
        }
        if name != "ours":
            pairs = list(zip(times["ours"], times[name], strict=True))
            ratios, worked = (sorted(mine[k] / max(other[k], 1e-9) for mine, other in pairs) for k in (0, 1))
            result[name]["ratio"] = round(statistics.median(ratios), 3)
            result[name]["quartiles"] = [round(ratios[len(ratios) * k // 4], 3) for k in (1, 3)]
            result[name]["cpu_ratio"] = round(statistics.median(worked), 3)
    result |= {"rounds": benchmark.rounds, "batch_size": benchmark.batch_size, "hidden": benchmark.hidden}
    print(json.dumps(result), flush=True)
    return result


class Timed:
    """A step `step(state, batch) -> (state, loss)` on one batch that stays on the device, compiled when it is made."""

    def __init__(self, step, state, batch):
        self.step, self.state, self.batch = step, state, batch
        self.loss = 0.0
        self.compile_seconds, _ = self.seconds()

    def seconds(self) -> tuple[float, float]:
        """Makes one update and returns how long it took, by the clock and of the processor."""
        jax.block_until_ready((self.state, self.batch))
        begin, worked = time.perf_counter(), time.process_time()
        self.state, loss = jax.block_until_ready(self.step(self.state, self.batch))
        took = time.perf_counter() - begin, time.process_time() - worked
        self.loss = float(loss)
        return took


def two_domains(size: int) -> dict[str, dict[str, np.ndarray]]:
    """Returns random images of two domains, and labels of one."""
    rng = np.random.default_rng(0)

    def part(shift):
        image = rng.normal(size=(size, SIDE, SIDE, 1)).astype(np.float32) + np.float32(shift)
        return {"image": image, "label": rng.integers(0, CLASSES, size).astype(np.int32)}

    return {"source": part(0), "target": part(1)}


def ours(batch, hidden):
    """The library's."""
    net = jt.models.lenet(CLASSES)
    discriminator = jt.adaptation.discriminator(hidden=(hidden, hidden))
    adversary = jt.adaptation.dann(net, discriminator=discriminator)
    objective, optimizer = jt.together(jt.classification(net).on("source") + adversary), optax.adam(1e-3)
    step = jt.train_step(objective, optimizer)

    def run(state, batch):
        state, metrics = step.placed(state, batch)
        return state, metrics["loss"]

    return run, jt.init(objective, optimizer, jax.random.key(0), batch), step.place(batch)


def same_net(batch, hidden):
    """A step by hand around the library's LeNet."""
    net = jt.models.lenet(CLASSES)
    params = net.init(jax.random.key(0), batch["source"]["image"])["params"]

    def apply(params, images, key):
        outputs, _ = net.apply({"params": params}, images, train=True, key=key)
        return outputs["features"], outputs["logits"]

    return written_out(apply, params, batch, hidden)


def by_hand(batch, hidden):
    """Plain JAX throughout."""
    rng = np.random.default_rng(1)

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)

    params = {
        "conv1": (drawn(5, 5, 1, 20), jnp.zeros(20)),
        "conv2": (drawn(5, 5, 20, 50), jnp.zeros(50)),
        "hidden": (drawn(800, 500), jnp.zeros(500)),
        "head": (drawn(500, CLASSES), jnp.zeros(CLASSES)),
    }

    def convolved(x, layer):
        x = jax.lax.conv_general_dilated(x, layer[0], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return x + layer[1][None, None, None]

    def dropout(x, key, shape):
        return jnp.where(jax.random.bernoulli(key, 0.5, shape), 2 * x, 0)

    def apply(params, images, key):
        keys = jax.random.split(key)
        x = jax.nn.relu(convolved(images, params["conv1"]))
        x = convolved(x, params["conv2"])
        x = jax.nn.relu(dropout(x, keys[0], (len(x), 1, 1, 50))).reshape(len(x), -1)
        x = jax.nn.relu(x @ params["hidden"][0] + params["hidden"][1][None])
        features = dropout(x, keys[1], x.shape)
        return features, features @ params["head"][0] + params["head"][1][None]

    return written_out(apply, params, batch, hidden)


def written_out(apply, params, batch, hidden):
    """A whole DANN step around a network `apply(params, images, key) -> (features, logits)`."""
    rng, optimizer = np.random.default_rng(2), optax.adam(1e-3)
    sizes = (500, hidden, hidden, 1)
    layers = [
        {"w": jnp.asarray(rng.uniform(-1, 1, pair) / np.sqrt(pair[0]), jnp.float32), "b": jnp.zeros(pair[1])}
        for pair in itertools.pairwise(sizes)
    ]
    scales = [{"scale": jnp.ones(hidden), "bias": jnp.zeros(hidden)} for _ in range(2)]
    params = {"net": params, "layers": layers, "scales": scales}
    running = [{"mean": jnp.zeros(hidden), "var": jnp.ones(hidden)} for _ in range(2)]

    def discriminate(params, running, x):
        new = []
        for layer, norm, stats in zip(params["layers"], params["scales"], running, strict=False):
            x = x @ layer["w"] + layer["b"][None]
            mean, var = x.mean(0), x.var(0)
            x = (x - mean[None]) * (jax.lax.rsqrt(var + 1e-5) * norm["scale"])[None] + norm["bias"][None]
            x = jax.nn.relu(x)
            new.append({"mean": 0.9 * stats["mean"] + 0.1 * mean, "var": 0.9 * stats["var"] + 0.1 * var})
        return (x @ params["layers"][-1]["w"] + params["layers"][-1]["b"][None])[:, 0], new

    def loss(params, running, number, batch, key):
        size = len(batch["source"]["image"])
        images = jnp.concatenate([batch["source"]["image"], batch["target"]["image"]])
        features, logits = apply(params["net"], images, key)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits[:size], batch["source"]["label"]).mean()
        rate = 2 / (1 + jnp.exp(-number / 1000)) - 1
        reversed_ = jax.lax.stop_gradient((1 + rate) * features) - rate * features
        scores, running = discriminate(params, running, reversed_)
        domain = (jax.nn.softplus(-scores[:size]).mean() + jax.nn.softplus(scores[size:]).mean()) / 2
        return entropy + domain, running

    @functools.partial(jax.jit, donate_argnums=0)  # as the library's
    def step(state, batch):
        params, running, opt_state, number, key = state
        (value, running), gradient = jax.value_and_grad(loss, has_aux=True)(
            params, running, number, batch, jax.random.fold_in(key, number)
        )
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), running, opt_state, number + 1, key), value

    state = (params, running, optimizer.init(params), jnp.zeros((), jnp.int32), jax.random.key(0))
    return step, state, jax.device_put(batch)


if __name__ == "__main__":
    try:
        main(tyro.cli(AdversarialStep))
    except jt.InputError as error:
        print(f"adversarial_step: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
