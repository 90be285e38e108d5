"""When does knowledge move? Pretrain on upright digits, then learn shifted digits from a few labels.

Two targets, both real shifts of scikit-learn's handwritten digits (8×8, no network needed): `noisy`, where the source
helps, and `rotated` (by 90°), where it does not. Each is learnt from 2 and from 5 labels per class, over five seeds
(weights, choice of labels, order of batches), by every method with the same steps and learning rate; the head is kept,
as the classes are the same. Accuracy is that of the last step on the whole test split; ± is the half-width of the 95 %
interval of the mean (Student's t). Nothing was tuned on the target. With `--dtype bfloat16` no mean
differs from that in float32 by more than 0.7 points, and the verdicts are the same.

Command: `make demo`, or `python -m experiments.demo --out runs/demo`; `--tiny` for a quick look at the machinery.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import Progress

import jaxtransfer as jt
from jaxtransfer.runs import report

SOURCE, TARGETS, SHOTS = "digits/upright", ("digits/noisy", "digits/rotated"), (2, 5)
MEAN, STD = 0.3, 0.37  # of the source's images
LEARNING_RATE, STRENGTH = 1e-3, 0.1


@dataclasses.dataclass(frozen=True)
class Demo:
    """Compare ways of transfer on a pair where it helps and on one where it doesn't; writes a table and a plot."""

    out: Path = Path("runs/demo")
    """Folder for report.md, results.png and results.json."""
    seeds: int = 5
    """Repetitions, at least two for an interval."""
    source_steps: int = 400
    """Updates on the source domain."""
    steps: int = 200
    """Updates on the target domain, the same for every method."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type that the network computes in; weights, statistics and losses stay float32."""
    tiny: bool = False
    """Two seeds and a handful of steps: shows that everything runs, not what comes out."""


def main(demo: Demo) -> dict[str, Any]:
    """Runs the comparison and returns the accuracies by target, shots and method."""
    if demo.tiny:
        demo = dataclasses.replace(demo, seeds=2, source_steps=10, steps=4)
    console, begin = Console(), time.perf_counter()
    test = {name: jt.data.load(name, "test").decoded() for name in (SOURCE, *TARGETS)}
    train = {name: jt.data.load(name, "train").decoded() for name in (SOURCE, *TARGETS)}
    accuracies: dict[str, dict[int, dict[str, list[float]]]] = {
        target: {shots: {method: [] for method in METHODS} for shots in SHOTS} for target in TARGETS
    }
    source_accuracy = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("training", total=demo.seeds * (1 + len(TARGETS) * len(SHOTS) * len(METHODS)))
        for seed in range(demo.seeds):
            bench = Bench(demo, seed)
            source = bench.fit(bench.full(), train[SOURCE], demo.source_steps, bench.fresh())
            source_accuracy.append(bench.accuracy(source, test[SOURCE]))
            progress.advance(bar)
            for target in TARGETS:
                for shots in SHOTS:
                    few = train[target].subset(per_class=shots, seed=seed)
                    for name, method in METHODS.items():
                        trained = method(bench, source, few)
                        accuracies[target][shots][name].append(bench.accuracy(trained, test[target]))
                        progress.advance(bar)
    results = {
        "source": {"data": SOURCE, "accuracy": summary(source_accuracy)},
        "targets": {
            target: {shots: {name: summary(values) for name, values in by.items()} for shots, by in found.items()}
            for target, found in accuracies.items()
        },
        "seconds": round(time.perf_counter() - begin, 1),
    }
    _show(results, demo, console)
    return results


class Bench:
    """One seed's model, and how each method trains it."""

    def __init__(self, demo: Demo, seed: int):
        self.demo, self.seed = demo, seed
        self.model = jt.models.normalize(jt.models.small_cnn(10, dtype=jnp.dtype(demo.dtype)), MEAN, STD)

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Returns Adam with a cosine schedule over the steps."""
        return optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

    def fresh(self) -> dict[str, Any]:
        """Returns new weights."""
        return dict(jax.jit(self.model.init)(jax.random.key(self.seed), np.zeros((1, 8, 8, 1), np.uint8)))

    def full(self, steps: int | None = None) -> tuple[jt.methods.Stage, ...]:
        """Returns plain training of all weights."""
        return jt.methods.full(self.model, self.optimizer(steps or self.demo.source_steps))

    def fit(self, stages, data: jt.data.Dataset, steps: int, start: dict[str, Any]) -> dict[str, Any]:
        """Trains the stages one after the other and returns the variables."""
        batches = jt.data.pipeline(data, 20, seed=self.seed, threads=0)
        params = {"model": start["params"]}
        state = {"model": {k: v for k, v in start.items() if k != "params"}}
        for stage in stages:
            fitted = jt.fit(
                stage.objective,
                stage.optimizer,
                batches,
                steps=max(1, round(steps * stage.share)),
                key=self.seed,
                params=params,
                state=state,
                progress=False,
            )
            params, state = fitted.state.params, fitted.state.state
        return {"params": params["model"], **state["model"]}

    def accuracy(self, variables: dict[str, Any], data: jt.data.Dataset) -> float:
        """Returns the accuracy over the whole split, in per cent."""
        objective = jt.classification(jt.frozen(self.model, variables))
        batches = jt.data.eval_batches(data, 256, threads=0)
        return 100 * jt.evaluate(objective, jt.TrainState.of({}), batches)["accuracy"]


def _scratch(bench: Bench, source, data):
    return bench.fit(bench.full(bench.demo.steps), data, bench.demo.steps, bench.fresh())


def _full(bench: Bench, source, data):
    return bench.fit(bench.full(bench.demo.steps), data, bench.demo.steps, source)


def _probe(bench: Bench, source, data):
    steps = bench.demo.steps
    return bench.fit(jt.methods.linear_probe(bench.model, bench.optimizer(steps)), data, steps, source)


def _l2_sp(bench: Bench, source, data):
    steps, anchor = bench.demo.steps, {"model": source["params"]}
    stages = jt.methods.anchored(bench.model, bench.optimizer(steps), anchor, strength=STRENGTH, new_head=False)
    return bench.fit(stages, data, steps, source)


def _lp_ft(bench: Bench, source, data):
    steps = bench.demo.steps
    stages = jt.methods.lp_ft(bench.model, bench.optimizer(steps // 2))
    return bench.fit(stages, data, steps, source)


METHODS: dict[str, Callable] = {
    "source only": lambda bench, source, data: source,
    "scratch": _scratch,
    "linear probe": _probe,
    "fine-tuning": _full,
    "L2-SP": _l2_sp,
    "LP-FT": _lp_ft,
}


def summary(values: list[float]) -> dict[str, Any]:
    """Returns mean and half-width of the 95 % interval of the mean (Student's t)."""
    from scipy import stats

    count = len(values)
    half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
    return {"mean": float(np.mean(values)), "interval": half, "values": [round(v, 3) for v in values]}


def verdict(by_method: dict[str, dict[str, Any]]) -> str:
    """Says in a sentence whether the source helped: L2-SP against scratch, paired by seed."""
    ours, scratch = by_method["L2-SP"], by_method["scratch"]
    gain = summary([a - b for a, b in zip(ours["values"], scratch["values"], strict=True)])
    side = "ahead of" if gain["mean"] > 0 else "behind"
    figures = f"L2-SP is {abs(gain['mean']):.1f} ± {gain['interval']:.1f} points {side} scratch"
    if abs(gain["mean"]) <= gain["interval"]:
        return f"no clear difference: {figures}"
    return f"knowledge moves: {figures}" if gain["mean"] > 0 else f"transfer loses: {figures}"


def _show(results: dict[str, Any], demo: Demo, console: Console) -> None:
    demo.out.mkdir(parents=True, exist_ok=True)
    columns = [(target, shots) for target in TARGETS for shots in SHOTS]
    header = ["method", *(f"{target.split('/')[1]}, {shots} labels/class" for target, shots in columns)]

    def cell(method, target, shots):
        found = results["targets"][target][shots][method]
        return f"{found['mean']:.1f} ± {found['interval']:.1f}"

    rows = [[method, *(cell(method, *column) for column in columns)] for method in METHODS]
    verdicts = [
        f"upright → {t.split('/')[1]}, {s} labels per class: {verdict(results['targets'][t][s])}" for t, s in columns
    ]
    source = results["source"]["accuracy"]
    caption = (
        f"test accuracy in %, mean ± 95 % interval over {demo.seeds} seeds; "
        f"on the source itself {source['mean']:.1f} ± {source['interval']:.1f}"
    )
    report.print_table(console, header, rows, title="From upright digits to shifted ones", caption=caption)
    for line in verdicts:
        console.print(line, highlight=False)
    _plot(results, demo.out / "results.png")
    page = ["# From upright digits to shifted ones", "", caption, "", *report.table(header, rows), ""]
    page += [f"- {line}" for line in verdicts]
    page += ["", "![accuracy by method](results.png)", "", f"Measured in {results['seconds']} s by `make demo`."]
    (demo.out / "report.md").write_text("\n".join(page) + "\n")
    (demo.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"{results['seconds']} s; table, plot and numbers: {demo.out / 'report.md'}", soft_wrap=True)


def _plot(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, len(TARGETS), sharey=True)
    for axis, target in zip(axes, TARGETS, strict=True):
        for offset, shots in zip((-0.2, 0.2), SHOTS, strict=True):
            found = [results["targets"][target][shots][method] for method in METHODS]
            axis.bar(
                np.arange(len(METHODS)) + offset,
                [f["mean"] for f in found],
                0.38,
                yerr=[f["interval"] for f in found],
                capsize=3,
                label=f"{shots} labels per class",
            )
        axis.set_xticks(range(len(METHODS)), list(METHODS), rotation=30, ha="right")
        axis.set(title=f"upright → {target.split('/')[1]}", ylim=(0, 100))
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(frameon=False, loc="upper left", fontsize="small")
    report.save_figure(figure, path)


if __name__ == "__main__":
    # The anchor is an argument of the compiled step, so each program is compiled once for all seeds.
    with tempfile.TemporaryDirectory() as programs:
        jax.config.update("jax_compilation_cache_dir", programs)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        main(tyro.cli(Demo))
