"""One gradient step that knows what a sinusoid is: MAML and Meta-SGD on few-shot regression.

The protocol of Meta-SGD (Li et al. 2017, arXiv:1707.09835, table 1). A task is a curve y = A sin(ωx + b) with A in
[0.1, 5], ω in [0.8, 1.2] and b in [0, π], uniform, seen at K points x uniform in [-5, 5]. A perceptron with two hidden
layers of 40 makes one gradient step on them and is judged by the mean squared error at 100 other points. It is
meta-trained by 60,000 updates of 4 tasks, for each K; each network is then tested with each K, on 2,000 curves that no
training saw. MAML's inner rate is one number, Meta-SGD learns one per parameter. Twenty query points per task and the
rates below were chosen on separate curves, with seed 0 and K = 10 for the most part; the paper doesn't fix them. The
same is then done with ω = 1, the curves of Finn et al. 2017.

Command: `python -m experiments.sinusoid`; `--frequency 0.8 1.2` for one range of ω alone, `--tiny` for a quick look at
the machinery. Two cores: 95 s, 4 to 9 s of it for each of the twelve networks.

Reached with as many points in the test as in training (± 0.04, 0.03 and 0.02 over the test curves for 5, 10 and 20
points, and two thirds of that with ω = 1; seeds 0 to 2, seed 0 alone with ω = 1):

                         5 points              10 points             20 points
    MAML                 0.90, 0.87, 0.89      0.57, 0.58, 0.57      0.33, 0.34, 0.32
      published          1.13                  0.77                  0.48
    Meta-SGD             0.71, 0.72, 0.73      0.41, 0.42, 0.41      0.22, 0.23, 0.23
      published          0.90                  0.53                  0.31
    MAML, ω = 1          0.59                  0.35                  0.20
    Meta-SGD, ω = 1      0.40                  0.23                  0.12

The frequency is what makes the first curves hard. More training doesn't change the picture: on other curves MAML's
0.87 at 5 points becomes 0.86 with five times the updates and 0.83 with eight times the tasks in each, Meta-SGD's 0.41
at 10 points becomes 0.37 with eight times the tasks and 0.36 with four times the updates besides, at twice the rate.
Nor do other first weights help (seed 0, 5 points): the kinks of the first layer spread over [-5, 5], PyTorch's
initialisation, larger or smaller weights.
More steps at test time go on helping MAML; Meta-SGD's rates are made for one step, and a few diverge.
"""

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import jaxtransfer as jt
from jaxtransfer.runs import report

PUBLISHED = {"MAML": {5: 1.13, 10: 0.77, 20: 0.48}, "Meta-SGD": {5: 0.90, 10: 0.53, 20: 0.31}}
TEST_KEY, TEST_POINTS = 20_170_731, 100  # the curves of the test are the same for every seed
PROTOCOL = (0.8, 1.2)  # the frequencies of the published numbers
DISTRIBUTIONS = {"varying": PROTOCOL, "fixed": (1.0, 1.0)}  # names of the folders when both are run
STEPS_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Sinusoid:
    """Meta-learn sinusoids with MAML and Meta-SGD; writes a table, its numbers and two plots."""

    out: Path = Path("runs/sinusoid")
    """Folder for sinusoid.json, adaptation.png and steps.png."""
    seed: int = 0
    """Weights and training tasks; the test tasks stay the same."""
    shots: tuple[int, ...] = (5, 10, 20)
    """Labelled points per task, K: one network is trained for each, and tested with all."""
    meta_steps: int = 60_000
    """Updates of the outer loop, for each network; fewer are quicker and worse."""
    tasks: int = 4
    """Tasks per update."""
    query: int = 20
    """Points per task that the outer loop's loss is taken at."""
    test_tasks: int = 2_000
    """Curves that each network is tested on."""
    frequency: tuple[float, float] | None = None
    """Range of ω. By default both [0.8, 1.2], as published, and ω = 1, the easier curves of Finn et al. 2017."""
    inner_rate: float = 0.01
    """MAML's rate of the inner step, and the first value of Meta-SGD's."""
    learning_rate: float = 4e-3
    """Adam's, in the outer loop: a warm-up over a twentieth of the updates, then a cosine to zero."""
    clip: float = 1.0
    """Largest norm of the outer gradient."""
    steps_per_call: int = 1_000
    """Updates that one compiled call makes; divides --meta-steps. It changes the speed, not the result."""
    tiny: bool = False
    """400 updates, 5 shots, 50 test curves: shows that everything runs, not what comes out."""


class Learned(NamedTuple):
    """A meta-trained network: the objective over episodes, its state, and the seconds that it took."""

    objective: jt.Objective
    state: jt.TrainState
    seconds: float


def draw(key: jax.Array, tasks: int, points: int, frequency: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    """Draws curves y = A sin(ωx + b) and where to look at them.

    Returns:
      `amplitude`, `frequency` and `phase` [T, 1, 1] of the curves, and points x [T, n, 1].
    """
    uniform = jax.random.uniform(key, (tasks, 3 + points, 1))  # at once, which is cheaper than one by one
    amplitude, omega, phase = (uniform[:, i : i + 1] for i in range(3))
    curve = {
        "amplitude": 0.1 + 4.9 * amplitude,
        "frequency": frequency[0] + (frequency[1] - frequency[0]) * omega,
        "phase": np.pi * phase,
    }
    return curve, 10.0 * uniform[:, 3:] - 5.0


def values(curve: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Returns A sin(ωx + b) for the points `x` [T, n, 1] of each curve."""
    return curve["amplitude"] * jnp.sin(curve["frequency"] * x + curve["phase"])


def episodes(key: jax.Array, tasks: int, shots: int, query: int, frequency: jax.Array) -> dict[str, Any]:
    """Draws tasks: `support` of `shots` points and `query`, each with `input` and `value` [T, n, 1]."""
    curve, x = draw(key, tasks, shots + query, frequency)
    y = values(curve, x)
    support, rest = {"input": x[:, :shots], "value": y[:, :shots]}, {"input": x[:, shots:], "value": y[:, shots:]}
    return {"support": support, "query": rest}


def task_objective() -> jt.Objective:
    """Returns the loss of one task: mean squared error of the perceptron of 2 × 40."""
    return jt.regression(jt.models.mlp(1, hidden=(40, 40)))


def maml(rate: float) -> jt.Objective:
    """Returns MAML with one inner step."""
    return jt.maml(task_objective(), inner=optax.sgd(rate), steps=1)


def meta_sgd(rate: float) -> jt.Objective:
    """Returns Meta-SGD with one inner step, whose rates all start at `rate`."""
    return jt.maml(task_objective(), inner=optax.sgd(1.0), steps=1, rates=jt.meta.per_parameter(rate))


METHODS = {"MAML": maml, "Meta-SGD": meta_sgd}


def main(options: Sinusoid) -> dict[str, Any]:
    """Trains and tests every network, writes the files and returns the results; with both ranges, by name."""
    if options.tiny:
        options = dataclasses.replace(options, shots=(5,), meta_steps=400, steps_per_call=200, test_tasks=50)
        options = dataclasses.replace(options, frequency=options.frequency or PROTOCOL)
    _check(options)
    if options.frequency is not None:
        return run(options, options.frequency)
    return {
        name: run(dataclasses.replace(options, out=options.out / name), frequency)
        for name, frequency in DISTRIBUTIONS.items()
    }


def run(options: Sinusoid, omega: tuple[float, float]) -> dict[str, Any]:
    """Trains and tests every network on curves whose ω lies in one range."""
    options, frequency = dataclasses.replace(options, frequency=omega), jnp.asarray(omega)
    console, begin = Console(), time.perf_counter()
    tests = {k: _test_episodes(options, k, frequency) for k in options.shots}
    learned: dict[str, dict[int, Learned]] = {method: {} for method in METHODS}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("compiling", total=options.meta_steps * len(METHODS) * len(options.shots))
        for method, build in METHODS.items():
            for shots in options.shots:

                def tell(loss, label=f"{method}, {shots} shots"):
                    progress.update(bar, advance=options.steps_per_call, description=f"{label}: {loss:.3f}")

                learned[method][shots] = train(build(options.inner_rate), options, shots, frequency, tell)
    trained_in = time.perf_counter() - begin
    results: dict[str, Any] = {
        "mse": {
            method: {
                trained: {tested: _interval(network, test) for tested, test in tests.items()}
                for trained, network in networks.items()
            }
            for method, networks in learned.items()
        },
        "mse_by_step": {
            method: {
                shots: _rounded(errors_by_step(network.state.params, options.inner_rate, tests[shots]))
                for shots, network in networks.items()
            }
            for method, networks in learned.items()
        },
        "train_seconds": {
            method: {shots: round(network.seconds, 1) for shots, network in networks.items()}
            for method, networks in learned.items()
        },
        "test_seconds": 0.0,
        "published": PUBLISHED,
        "options": {**dataclasses.asdict(options), "out": str(options.out)},
        "device": jax.devices()[0].device_kind,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    _plot_adaptation(learned, options, frequency, options.out / "adaptation.png")
    _plot_steps(results["mse_by_step"], options.out / "steps.png")
    results["seconds"] = round(time.perf_counter() - begin, 1)
    results["test_seconds"] = round(results["seconds"] - trained_in, 1)
    (options.out / "sinusoid.json").write_text(json.dumps(results, indent=1) + "\n")
    _show(results, options, omega, console)
    return results


def train(objective: jt.Objective, options: Sinusoid, shots: int, frequency: jax.Array, tell) -> Learned:
    """Meta-trains one network on tasks of `shots` points, drawn inside the compiled program."""
    begin = time.perf_counter()
    warm_up = options.meta_steps // 20
    schedule = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, warm_up, options.meta_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(options.clip), optax.adam(schedule))

    def sample(key, data):
        return episodes(key, options.tasks, shots, options.query, data["frequency"])

    key, data = jax.random.key(options.seed), {"frequency": frequency}
    state = jt.init(objective, optimizer, key, jax.jit(sample)(key, data))
    step = jt.train_step(objective, optimizer, sample=sample, steps_per_call=options.steps_per_call)
    for _ in range(options.meta_steps // options.steps_per_call):
        state, metrics = step(state, data)
        tell(float(metrics["loss"]))
    return Learned(objective, state, time.perf_counter() - begin)


def adapted_by_step(params: Any, rate: float, support: dict[str, jax.Array]) -> Any:
    """Returns the parameters of one task after 0, 1, ..., 10 inner steps, stacked [11, ...].

    Args:
      params: of a trained network, with Meta-SGD's `rates` where it has learned some.
      rate: MAML's.
      support: the labelled points of one task.
    """
    own = {name: value for name, value in params.items() if name != "rates"}
    if "rates" not in params:
        inner = optax.sgd(rate)
    else:
        rates = jax.tree.map(lambda rate: rate[0], params["rates"])
        inner = optax.stateless(lambda updates, _: jax.tree.map(lambda g, r: -r * g, updates, rates))

    def step(fast, _):
        return jt.meta.adapt(task_loss, fast, support, optimizer=inner, steps=1), fast

    return jax.lax.scan(step, own, None, length=STEPS_SHOWN + 1)[1]


@jax.jit
def errors_by_step(params: Any, rate: float, test: dict[str, Any]) -> jax.Array:
    """Returns the mean squared error [11] on the query sets of the test after 0, 1, ..., 10 inner steps."""

    def one(episode):
        by_step = adapted_by_step(params, rate, episode["support"])
        return jax.vmap(task_loss, in_axes=(0, None))(by_step, episode["query"])

    return jnp.mean(jax.vmap(one)(test), axis=0)


def task_loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """Returns the loss of one task's batch."""
    return task_objective()(params, {"model": {}}, batch, jt.Context())[0]


def _test_episodes(options: Sinusoid, shots: int, frequency: jax.Array) -> dict[str, Any]:
    key = jax.random.fold_in(jax.random.key(TEST_KEY), shots)
    draw_all = jax.jit(episodes, static_argnums=(1, 2, 3))
    return draw_all(key, options.test_tasks, shots, TEST_POINTS, frequency)


def _interval(network: Learned, test: dict[str, Any]) -> dict[str, float]:
    count = len(test["query"]["input"])
    found = jt.evaluate_episodes(network.objective, network.state, [test], at_once=count)["maml"]
    return {"mean": round(found.mean, 4), "interval": round(found.half, 4)}


def _rounded(numbers: jax.Array) -> list[float | None]:
    """Returns numbers for JSON, None where one has left the range of float32."""
    return [round(float(number), 4) if np.isfinite(number) else None for number in numbers]


def _check(options: Sinusoid) -> None:
    for name in ("meta_steps", "tasks", "query", "test_tasks", "steps_per_call"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise jt.InputError(f"--{flag} must be at least 1; got {getattr(options, name)}")
    if not options.shots or min(options.shots) < 1 or len(set(options.shots)) < len(options.shots):
        raise jt.InputError(f"--shots needs different numbers of at least 1; got {options.shots}")
    if options.meta_steps % options.steps_per_call:
        raise jt.InputError(
            f"--steps-per-call must divide --meta-steps; got {options.steps_per_call} and {options.meta_steps}"
        )
    if options.frequency is not None and options.frequency[0] > options.frequency[1]:
        raise jt.InputError(f"--frequency takes the lowest and the highest; got {options.frequency}")


def _show(results: dict[str, Any], options: Sinusoid, omega: tuple[float, float], console: Console) -> None:
    caption = f"mean squared error after one step, ± 95 % interval over {options.test_tasks} test curves"
    curves = f"ω = {omega[0]:g}" if omega[0] == omega[1] else f"ω in [{omega[0]:g}, {omega[1]:g}]"
    table = Table(title=f"Sinusoid regression, {curves}", caption=caption)
    table.add_column("method")
    for header in ("trained with", *(f"tested with {k}" for k in options.shots), "published", "seconds"):
        table.add_column(header, justify="right")
    for method, by_shots in results["mse"].items():
        for trained, cells in by_shots.items():
            found = [f"{cell['mean']:.3f} ± {cell['interval']:.3f}" for cell in cells.values()]
            published = PUBLISHED[method].get(trained) if omega == PROTOCOL else None
            seconds = f"{results['train_seconds'][method][trained]:.1f}"
            table.add_row(method, str(trained), *found, f"{published:.2f}" if published else "–", seconds)
    if not console.is_terminal:
        console.width = 120
    console.print(table)
    if omega == PROTOCOL:
        console.print("published: the same number of points in training and test", highlight=False)
    console.print(f"{results['seconds']} s; numbers and plots: {options.out}", soft_wrap=True)


def _plot_adaptation(
    learned: dict[str, dict[int, Learned]], options: Sinusoid, frequency: jax.Array, path: Path
) -> None:
    from matplotlib.figure import Figure

    count, shots = 3, sorted(options.shots)[len(options.shots) // 2]
    key = jax.random.fold_in(jax.random.key(TEST_KEY), 0)
    curve, x = draw(key, count, shots, frequency)
    support = {"input": x, "value": values(curve, x)}
    line = jnp.broadcast_to(jnp.linspace(-5.0, 5.0, 200)[None, :, None], (count, 200, 1))
    truth = np.asarray(values(curve, line))
    model = jt.models.mlp(1, hidden=(40, 40))

    def predictions(network):
        def one(part):
            by_step = adapted_by_step(network.state.params, options.inner_rate, part)["model"]
            return jax.vmap(lambda p: model.apply({"params": p}, line[0], train=False, key=None)[0]["logits"])(by_step)

        return np.asarray(jax.jit(jax.vmap(one))(support))

    figure = Figure(figsize=(4 * count, 3 * len(learned)), layout="constrained")
    axes = figure.subplots(len(learned), count, sharex=True, sharey="col", squeeze=False)
    for row, (method, networks) in zip(axes, learned.items(), strict=True):
        by_task = predictions(networks[shots])
        for task, axis in enumerate(row):
            axis.plot(line[task, :, 0], truth[task, :, 0], color="black", linewidth=1, label="true curve")
            for step, style in ((0, ":"), (1, "-"), (STEPS_SHOWN, "--")):
                label = "before" if step == 0 else f"after {step} step{'s' * (step > 1)}"
                axis.plot(line[task, :, 0], by_task[task, step, :, 0], style, label=label)
            axis.plot(x[task, :, 0], support["value"][task, :, 0], "k.", markersize=7, label=f"{shots} labelled points")
            reach = 1.6 * np.abs(truth[task]).max() + 0.5
            axis.set(title=f"{method}, curve {task + 1}", ylim=(-reach, reach))
            axis.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False, fontsize="x-small")
    report.save_figure(figure, path)


def _plot_steps(errors: dict[str, dict[int, list[float | None]]], path: Path) -> None:
    from matplotlib.figure import Figure

    shots = list(next(iter(errors.values())))
    figure = Figure(figsize=(4 * len(shots), 3.2), layout="constrained")
    for axis, k in zip(figure.subplots(1, len(shots), squeeze=False)[0], shots, strict=True):
        for method, by_shots in errors.items():
            axis.semilogy(range(STEPS_SHOWN + 1), np.array(by_shots[k], float), marker=".", label=method)
        lowest = min(mse for by_shots in errors.values() for mse in by_shots[k] if mse is not None)
        axis.set(title=f"{k} points", xlabel="inner steps", ylabel="test mean squared error", ylim=(lowest / 2, 10))
        axis.grid(alpha=0.3, which="both")
        axis.legend(frameon=False)
    report.save_figure(figure, path)


if __name__ == "__main__":
    try:
        options = tyro.cli(Sinusoid)
        with tempfile.TemporaryDirectory() as programs:  # the tests of networks that differ in weights only
            jax.config.update("jax_compilation_cache_dir", programs)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            main(options)
    except jt.InputError as error:
        print(f"sinusoid: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
