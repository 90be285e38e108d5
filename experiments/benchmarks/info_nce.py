"""How fast and how large is NT-Xent? Against the plain compiled form that holds the matrix, and against PyTorch's.

Value and gradient of `jt.losses.nt_xent` for N pairs of views, D = 128, float32. Ours, the plain form and PyTorch's
(lightly's NTXentLoss amounts to it: normalise, the whole matrix, cross-entropy) alternate in one process; seconds are
medians. `temp_mb` is what a compiled program needs besides its arguments and results; with `--memory` the peak memory
of ours (`info_nce` too) is measured in a process of its own, as resident memory above that after the inputs are there.

Command: `python -m experiments.benchmarks.info_nce` (about 3 minutes on two cores; `--tiny` for seconds). Prints one
JSON line. The figures at 2,048 and 8,192 take `--sizes 2048 8192 --plain-up-to 8192`.

Two cores, medians: 0.015 s at N = 1,024 (the plain form 1.35 times that, PyTorch 6.5 times), 0.039 s at 2,048 (1.8 and
13 times), 0.143 s at 4,096 (2.0 and 13 times), 0.65 s at 8,192 (2.2 and 18 times), 2.3 s at 16,384. Peak memory: 27 MB
at 4,096 where PyTorch takes 1,795 MB, 85 MB at 16,384, where PyTorch takes more than the machine's 20 GB, 375 MB at
65,536; `info_nce` takes 231 MB there.
"""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jaxtransfer as jt
from experiments.benchmarks.torch_loop import peak_mb

DIM, TEMPERATURE = 128, 0.5


@dataclasses.dataclass(frozen=True)
class InfoNceBenchmark:
    """Time value and gradient of NT-Xent, interleaved with the plain form and PyTorch's."""

    sizes: tuple[int, ...] = (1024, 4096, 16384)
    """Pairs N."""
    repeats: int = 9
    """Timed runs of each form up to 4096 pairs; a third of them beyond."""
    plain_up_to: int = 4096
    """The largest N whose matrix is held, by the plain form and by PyTorch."""
    memory: tuple[int, ...] = (4096, 16384, 65536)
    """Numbers of pairs whose peak memory is measured."""
    pytorch: tuple[int, ...] = (4096,)
    """Numbers of pairs that PyTorch runs once, in a process of its own: time and peak memory; 16384 take over 20 GB."""
    tiny: bool = False
    """A run of seconds, on 64 pairs."""


def main(benchmark: InfoNceBenchmark) -> dict[str, Any]:
    """Runs all sizes, prints and returns the results."""
    if benchmark.tiny:
        benchmark = dataclasses.replace(benchmark, sizes=(64,), repeats=2, memory=(64,), pytorch=(64,))
    result = {
        "benchmark": "info_nce",
        "rows": [run(size, benchmark) for size in benchmark.sizes],
        "peak_mb": {str(size): measured(size) for size in benchmark.memory},
        "pytorch": {str(size): alone("peak_of_pytorch", size) for size in benchmark.pytorch if pytorch(inputs(2))},
    }
    print(json.dumps(result), flush=True)
    return result


def run(size: int, benchmark: InfoNceBenchmark) -> dict[str, Any]:
    """Times one size."""
    views = inputs(size)
    forms: dict[str, Any] = {"ours": compiled(jt.losses.nt_xent, views)}
    row: dict[str, Any] = {"pairs": size, "temp_mb": {"ours": temp_mb(forms["ours"])}, "plain": None, "pytorch": None}
    if size <= benchmark.plain_up_to:
        forms["plain"] = compiled(plain, views)
        row["temp_mb"]["plain"] = temp_mb(forms["plain"])
        if torch_form := pytorch(views):
            forms["pytorch"] = torch_form
    times: dict[str, list[float]] = {name: [] for name in forms}
    repeats = benchmark.repeats if size <= 4096 else -(-benchmark.repeats // 3)
    names = list(forms)
    for number in range(repeats + 1):
        for name in [
            *names[number % len(names) :],
            *names[: number % len(names)],
        ]:  # PyTorch's threads spin on after it
            form = forms[name]
            begin = time.perf_counter()
            jax.block_until_ready(form(*views))
            if number:
                times[name].append(time.perf_counter() - begin)
    for name, values in times.items():
        row[name] = {"seconds": round(float(np.median(values)), 5)}
        if name != "ours":
            ratios = [other / mine for other, mine in zip(values, times["ours"], strict=True)]
            row[name]["ratio"] = round(float(np.median(ratios)), 2)
    return row


def inputs(size: int) -> tuple[jax.Array, jax.Array]:
    """Returns two views [size, 128], noisy copies of each other."""
    rng = np.random.default_rng(0)
    one = rng.normal(size=(size, DIM)).astype(np.float32)
    return jnp.asarray(one), jnp.asarray(one + 0.5 * rng.normal(size=(size, DIM)).astype(np.float32))


def compiled(loss, views) -> Any:
    """Compiles value and gradient of the mean of `loss`."""
    slopes = jax.value_and_grad(lambda a, b: jnp.mean(loss(a, b, temperature=TEMPERATURE)), argnums=(0, 1))
    return jax.jit(slopes).lower(*views).compile()


def temp_mb(program: Any) -> float:
    """What a compiled program holds besides arguments and results."""
    return round(program.memory_analysis().temp_size_in_bytes / 1e6, 1)


def plain(z1: jax.Array, z2: jax.Array, *, temperature: float) -> jax.Array:
    """NT-Xent by the whole matrix and ordinary derivatives."""
    z = jnp.concatenate([z1, z2])
    z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
    scores = jnp.where(jnp.eye(len(z), dtype=bool), -jnp.inf, z @ z.T / temperature)
    own = jnp.sum(z * jnp.roll(z, len(z1), axis=0), axis=1) / temperature
    return jax.nn.logsumexp(scores, axis=1) - own


def pytorch(views) -> Any:
    """Returns value and gradient in PyTorch as a function that ignores its arguments; None without PyTorch."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch  # pyright: ignore[reportMissingImports]

    z1, z2 = (torch.tensor(np.asarray(view), requires_grad=True) for view in views)
    size = len(z1)
    off = ~torch.eye(2 * size, dtype=torch.bool)
    labels = torch.cat([torch.arange(size) + size - 1, torch.arange(size)])

    def form(*_: Any) -> float:
        z1.grad = z2.grad = None
        z = torch.nn.functional.normalize(torch.cat([z1, z2]), dim=1)
        scores = (z @ z.T / TEMPERATURE)[off].view(2 * size, -1)
        loss = torch.nn.functional.cross_entropy(scores, labels)
        loss.backward()
        return loss.item()

    return form


def measured(size: int) -> dict[str, float | None]:
    """Peak memory in MB above the inputs of value and gradient, each loss in a process of its own."""
    return {name: alone("peak", name, size) for name in ("nt_xent", "info_nce")}


def alone(function: str, *arguments: Any) -> Any:
    """Returns what a function here prints, called in a process of its own."""
    code = f"from experiments.benchmarks import info_nce; info_nce.{function}(*{arguments!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def peak(name: str, size: int) -> None:
    """Prints by how many MB the peak memory of this process rises while value and gradient run."""
    views = inputs(size)
    program = compiled(getattr(jt.losses, name), views)
    before = peak_mb()
    jax.block_until_ready(program(*views))
    print(round(peak_mb() - before, 1))


def peak_of_pytorch(size: int) -> None:
    """Prints the seconds and the rise of the peak memory of one run of PyTorch's form."""
    form = pytorch(inputs(size))
    before, begin = peak_mb(), time.perf_counter()
    form()
    print(json.dumps({"seconds": round(time.perf_counter() - begin, 3), "mb": round(peak_mb() - before, 1)}))


if __name__ == "__main__":
    main(tyro.cli(InfoNceBenchmark, description=__doc__))
