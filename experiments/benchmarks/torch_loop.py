"""MAML in PyTorch, written as learn2learn runs it: what the meta-learning benchmarks compare themselves with.

Per task: clone the weights, take the gradient of the support loss with `create_graph`, update, add the query loss to
the gradients; after the last task one step of Adam. It runs in a process of its own, so that PyTorch may live in
another environment, and needs nothing but PyTorch there:

    python experiments/benchmarks/torch_loop.py '{"model": "mlp", "tasks": 25, "support": 10, "query": 10}'

For each line on stdin, the number of meta-steps to make, it answers one with the seconds that they took; when stdin
ends, one of JSON with its `peak_mb` and `version`. The configuration:

- `model`: "mlp" (regression, sinusoids) or "conv4" (classification, noise; batch norm by the statistics of the batch)
- `hidden` [40, 40] of the MLP; `width` 64, `pooled` true (false: strided), `ways` 5, `image` [1, 28, 28] of Conv4
- `tasks` 4, `support` and `query` 10: tasks per meta-step and examples per task in all
- `steps` 1, `first_order` false, `lr` 0.01 of the inner loop, `outer_lr` 0.001, `threads` PyTorch's own choice
- `learn2learn` null, or the folder of its unpacked sources: then its own MAML makes the clones, gradients and updates.
  (The package's compiled parts, which newer Pythons don't build, are not needed for that.)
"""

import contextlib
import importlib.util
import itertools
import json
import math
import resource
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

DEFAULTS = {
    "model": "mlp",
    "hidden": [40, 40],
    "width": 64,
    "pooled": True,
    "ways": 5,
    "image": [1, 28, 28],
    "tasks": 4,
    "support": 10,
    "query": 10,
    "steps": 1,
    "first_order": False,
    "lr": 0.01,
    "outer_lr": 1e-3,
    "threads": None,
    "learn2learn": None,
}


class TorchLoop:
    """The loop in another process: `seconds(steps)` runs it, `close()` ends it and returns peak memory and version."""

    def __init__(self, python: str | Path, **configuration: Any):
        command = [str(python), str(Path(__file__).resolve()), json.dumps(configuration)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "TorchLoop":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # nothing where it has ended
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def seconds(self, steps: int = 1) -> float:
        """Makes meta-steps and returns how long they took."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> dict[str, Any]:
        """Ends the process and returns `peak_mb`, its largest resident memory, and PyTorch's `version`."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        answer = json.loads(self._answer())
        self._process.wait()
        return answer

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the PyTorch process ended with code {self._process.wait()}; its message is above")
        return line


def torch_python() -> str | None:
    """Returns this interpreter where it has PyTorch, else None."""
    return sys.executable if importlib.util.find_spec("torch") else None


def main(configuration: dict[str, Any]) -> None:
    """Answers the lines of stdin."""
    if unknown := sorted(configuration.keys() - DEFAULTS.keys()):
        raise SystemExit(f"torch_loop: unknown setting {unknown[0]!r}; there are {', '.join(DEFAULTS)}")
    import torch  # pyright: ignore[reportMissingImports]

    configuration = {**DEFAULTS, **configuration}
    if configuration["threads"]:
        torch.set_num_threads(configuration["threads"])
    torch.manual_seed(0)
    meta_step = loop(torch, configuration)
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            meta_step()
        print(time.perf_counter() - begin, flush=True)
    print(json.dumps({"peak_mb": round(peak_mb()), "version": str(torch.__version__)}), flush=True)


def peak_mb() -> float:
    """Returns this program's largest resident memory; on Linux without what it inherits from the one that began it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def loop(torch: Any, configuration: dict[str, Any]) -> Any:
    """Returns a function that makes one meta-step and returns the mean query loss, a tensor."""
    parameters, forward, loss, data = (mlp if configuration["model"] == "mlp" else conv4)(torch, configuration)
    optimizer = torch.optim.Adam(parameters, lr=configuration["outer_lr"])
    tasks, lr, second_order = configuration["tasks"], configuration["lr"], not configuration["first_order"]

    if configuration["learn2learn"]:
        return learn2learn_loop(torch, configuration, parameters, loss, data)

    def meta_step():
        total = 0.0
        optimizer.zero_grad()
        for support_x, support_y, query_x, query_y in zip(*data, strict=True):
            fast = [p.clone() for p in parameters]
            for _ in range(configuration["steps"]):
                support_loss = loss(forward(fast, support_x), support_y)
                gradients = torch.autograd.grad(support_loss, fast, create_graph=second_order)
                fast = [p - lr * g for p, g in zip(fast, gradients, strict=True)]
            query_loss = loss(forward(fast, query_x), query_y) / tasks
            query_loss.backward()
            total = total + query_loss.detach()
        optimizer.step()
        return total

    return meta_step


def learn2learn_loop(torch: Any, configuration: dict[str, Any], parameters: list, loss: Any, data: Any) -> Any:
    """Returns the same meta-step by learn2learn's MAML around a module of the same weights."""
    source = Path(configuration["learn2learn"]) / "learn2learn"
    if not (source / "algorithms" / "maml.py").exists():
        raise SystemExit(f"torch_loop: expected learn2learn's sources in {configuration['learn2learn']}")
    for name, folder in (("learn2learn", source), ("learn2learn.algorithms", source / "algorithms")):
        package = types.ModuleType(name)  # without its __init__, which imports everything
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    from learn2learn.algorithms.maml import MAML  # pyright: ignore[reportMissingImports]

    module = (mlp_module if configuration["model"] == "mlp" else conv4_module)(torch, configuration)
    with torch.no_grad():
        for ours, theirs in zip(parameters, module.parameters(), strict=True):
            theirs.copy_(ours)
    maml = MAML(module, lr=configuration["lr"], first_order=configuration["first_order"])
    optimizer = torch.optim.Adam(maml.parameters(), lr=configuration["outer_lr"])

    def meta_step():
        total = 0.0
        optimizer.zero_grad()
        for support_x, support_y, query_x, query_y in zip(*data, strict=True):
            learner = maml.clone()
            for _ in range(configuration["steps"]):
                learner.adapt(loss(learner(support_x), support_y))
            query_loss = loss(learner(query_x), query_y) / configuration["tasks"]
            query_loss.backward()
            total = total + query_loss.detach()
        optimizer.step()
        return total

    return meta_step


def mlp_module(torch: Any, configuration: dict[str, Any]) -> Any:
    """Returns the perceptron as a module, its weights in the order of `mlp`."""
    sizes, layers = [1, *configuration["hidden"], 1], []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(fan_in, fan_out), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def conv4_module(torch: Any, configuration: dict[str, Any]) -> Any:
    """Returns Conv4 as a module, its weights in the order of `conv4`."""
    width, pooled = configuration["width"], configuration["pooled"]
    channels, *sides = configuration["image"]
    layers = []
    for _ in range(4):
        layers.append(torch.nn.Conv2d(channels, width, 3, stride=1 if pooled else 2, padding=1))
        layers += [torch.nn.BatchNorm2d(width, track_running_stats=False), torch.nn.ReLU()]
        layers += [torch.nn.MaxPool2d(2)] if pooled else []
        channels, sides = width, [side // 2 if pooled else -(-side // 2) for side in sides]
    return torch.nn.Sequential(
        *layers, torch.nn.Flatten(), torch.nn.Linear(width * math.prod(sides), configuration["ways"])
    )


def mlp(torch: Any, configuration: dict[str, Any]) -> tuple:
    """Returns weights, forward, loss and tasks of sinusoid regression."""
    sizes = [1, *configuration["hidden"], 1]
    parameters = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        parameters += [torch.randn(fan_out, fan_in) / math.sqrt(fan_in), torch.zeros(fan_out)]

    def forward(p, x):
        for i in range(0, len(p) - 2, 2):
            x = torch.relu(torch.nn.functional.linear(x, p[i], p[i + 1]))
        return torch.nn.functional.linear(x, p[-2], p[-1])

    tasks, support, query = (configuration[name] for name in ("tasks", "support", "query"))
    amplitude, omega, phase = (low + span * torch.rand(tasks, 1, 1) for low, span in ((0.1, 4.9), (0.8, 0.4), (0, 3.1)))
    x = 10 * torch.rand(tasks, support + query, 1) - 5
    y = amplitude * torch.sin(omega * x + phase)
    data = x[:, :support], y[:, :support], x[:, support:], y[:, support:]
    return [p.requires_grad_() for p in parameters], forward, torch.nn.functional.mse_loss, data


def conv4(torch: Any, configuration: dict[str, Any]) -> tuple:
    """Returns weights, forward, loss and tasks of Conv4 on noise; labels go round the ways."""
    functional = torch.nn.functional
    width, pooled, ways = configuration["width"], configuration["pooled"], configuration["ways"]
    channels, *sides = configuration["image"]
    parameters = []
    for _ in range(4):
        kernel = torch.randn(width, channels, 3, 3) * math.sqrt(2 / (9 * width))
        parameters += [kernel, torch.zeros(width), torch.ones(width), torch.zeros(width)]
        channels, sides = width, [side // 2 if pooled else -(-side // 2) for side in sides]
    features = width * math.prod(sides)
    parameters += [torch.randn(ways, features) / math.sqrt(features), torch.zeros(ways)]

    def forward(p, x):
        for i in range(0, 16, 4):
            x = functional.conv2d(x, p[i], p[i + 1], stride=1 if pooled else 2, padding=1)
            x = torch.relu(functional.batch_norm(x, None, None, p[i + 2], p[i + 3], training=True))
            if pooled:
                x = functional.max_pool2d(x, 2)
        return functional.linear(x.flatten(1), p[16], p[17])

    def part(count):
        images = torch.rand(configuration["tasks"], count, *configuration["image"])
        return images, (torch.arange(count) % ways).repeat(configuration["tasks"], 1)

    data = *part(configuration["support"]), *part(configuration["query"])
    return [p.requires_grad_() for p in parameters], forward, functional.cross_entropy, data


if __name__ == "__main__":
    main(json.loads(sys.argv[1]) if len(sys.argv) > 1 else {})
