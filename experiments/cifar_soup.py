"""Soups of fine-tuned runs: several of one network, other rates and other orders of batches, averaged into one.

The published CIFAR-10 ResNet learns classes of CIFAR-100. A linear probe on its frozen features makes the head that all
runs start from; each run then fine-tunes all weights, with a rate and a seed of its own. Their weights are averaged
(Wortsman et al. 2022, arXiv:2203.05482): all of them, the uniform soup; or greedily, from the best run on, those that
don't make the average worse. `wise-ft` is a point on the line from the probe to the best run (arXiv:2109.01903).

A fifth of the training images of each class is held out: its labels choose the greedy soup's members, the best run and
the point of wise-ft. The test images are looked at once by each network and choose nothing. Batch statistics of all
averages are renewed on the training images.

    TFDS_DATA_DIR=... python -m experiments.cifar_soup --weights resnet20-12fca82f.th

Measured with `--classes 5` (400 training, 100 held-out, 500 test images), five runs, 12 updates each, 1,265 s on two
cores that twenty others shared, accuracy in %:

                        held out   test     test, statistics not renewed
    linear probe            70.0   73.0
    runs 0 to 4             71.0, 70.0, 71.0, 70.0, 68.0   74.2, 75.6, 75.8, 78.6, 76.4
    uniform soup            73.0   74.4     79.4
    greedy soup             73.0   74.4     (all five runs: the same)
    wise-ft                 71.0   74.2     (alpha 1, the best run itself)

The greedy soup is 2 points above its best run on the labels that chose it, and 0.2 on the test images; a hundred
held-out labels choose badly, run 3 is the best on the test. Statistics of 400 images are worth less here than the mean
of the runs' own: 12 updates hardly move the weights away from those that these belong to.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

import jaxtransfer as jt
from experiments.finetune_cifar100 import run
from jaxtransfer.data import augment
from jaxtransfer.runs import report

ALPHAS = (0.25, 0.5, 0.75, 1.0)  # of wise-ft
HELD_OUT = 0.2


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Fine-tune a published ResNet several times and average the runs; writes a table and a picture."""

    out: Path = Path("runs/cifar_soup")
    """Folder for report.md, results.json, soup.png and one run directory per training."""
    weights: Path | None = None
    """The published file, resnet20-12fca82f.th or that of another depth (see --model)."""
    model: str = "resnet20"
    """resnet20, resnet32, resnet44 or resnet56."""
    data: str = "cifar100"
    """Data set to learn, any that `jt.data.load` can name."""
    classes: int = 10
    """So many of its classes, the first ones."""
    rates: tuple[float, ...] = (0.003, 0.01, 0.01, 0.02, 0.05)
    """Peak learning rate of each run, five or so."""
    epochs: float = 2.0
    """Passes over the training images, of each run."""
    batch_size: int = 64
    """Examples per update."""
    decay: float = 5e-4
    """Weight decay."""
    seed: int = 0
    """Of what is held out, and of the runs: this one, the next, ..."""
    data_dir: Path | None = None
    """Folder of prepared tfds data sets; by default $TFDS_DATA_DIR."""
    tiny: bool = False
    """Digits, a small net with weights that nobody trained, few steps: shows that everything runs."""


def main(experiment: Experiment) -> dict[str, Any]:
    """Trains what is not trained yet, averages, and returns accuracies in per cent by network."""
    if experiment.tiny:
        small = {"model": "resnet8", "data": "digits/noisy", "weights": None, "classes": 4}
        experiment = dataclasses.replace(experiment, **small, epochs=0.05, batch_size=8)
    elif experiment.weights is None:
        raise jt.InputError("--weights is the published file, resnet20-12fca82f.th say; --tiny needs none")
    if not experiment.model.removeprefix("resnet").isdigit():
        raise jt.InputError(f"--model is a CIFAR ResNet, resnet20 or resnet56 say; got {experiment.model}")
    if len(experiment.rates) < 2 or min(experiment.rates) <= 0:
        raise jt.InputError(f"--rates are two or more, positive; got {experiment.rates}")
    for name in ("classes", "epochs", "batch_size"):
        if not getattr(experiment, name) > 0:
            raise jt.InputError(f"--{name.replace('_', '-')} must be positive; got {getattr(experiment, name)}")
    begin = time.perf_counter()
    bench = Bench(experiment)
    probe = bench.probe()
    results: dict[str, Any] = {"linear probe": bench.scores(probe)}
    members = []
    for number, rate in enumerate(experiment.rates):
        members.append(bench.train(probe, rate, experiment.seed + number))
        name = f"run {number}, rate {rate:g}"
        results[name] = bench.scores(members[-1])
        print(f"{name}: {results[name]['held out']:.1f} % held out", file=sys.stderr, flush=True)
    results |= bench.averages(probe, members)
    _write(results, experiment)
    console = Console()
    report.print_table(console, *table_of(results), title="Accuracy, %", min_width=60)
    console.print(f"{time.perf_counter() - begin:.0f} s; report: {experiment.out / 'report.md'}", soft_wrap=True)
    return results


class Bench:
    """The data, the published weights, how a run is trained and what averages are worth."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        shape = (8, 8, 3) if experiment.tiny else (32, 32, 3)
        both = {part: self._load(part, shape) for part in ("train", "test")}
        self.train_data, self.held = jt.data.hold_out(both["train"], HELD_OUT, seed=experiment.seed)
        self.test = both["test"]
        network = jt.models.cifar_resnet(int(experiment.model.removeprefix("resnet")), experiment.classes)
        image = jax.ShapeDtypeStruct((1, *shape), np.uint8)
        if experiment.weights is None:
            self.model = jt.models.normalize(network, 0.5, 0.25)
            self.pretrained = dict(self.model.init(jax.random.key(7), np.zeros(image.shape, np.uint8)))
        else:
            loaded = jt.load_pretrained(experiment.weights, network, inputs=image, reinit=network.head)
            self.model, self.pretrained = loaded.model, dict(loaded.variables)
        self.objective = jt.classification(self.model)
        self._evaluate = jt.eval_step(self.objective)
        size = min(100, len(self.held), len(self.test))
        self._batches = {
            "held out": jt.data.eval_batches(self.held, size),
            "test": jt.data.eval_batches(self.test, size),
        }

    def probe(self) -> dict[str, Any]:
        """Returns the published weights under the head of a linear classifier on their features."""
        deep = jt.features(self.model, self.pretrained, self.train_data)
        columns = jt.data.Dataset.from_columns(features=deep.column("features"), label=deep.labels)
        linear = jt.models.mlp(self.experiment.classes, hidden=(), name=self.model.name)
        objective = jt.classification(linear, view="features") + jt.l2(strength=1e-3, only=f"{linear.name}/head/kernel")
        steps = 20 if self.experiment.tiny else 300
        batches = jt.data.pipeline(columns, min(256, len(columns)), seed=self.experiment.seed)
        fitted = jt.fit(
            objective, optax.adam(optax.cosine_decay_schedule(0.01, steps)), batches, steps=steps, progress=False
        )
        head = jax.device_get(fitted.state.params[linear.name]["head"])
        return {**self.pretrained, "params": {**self.pretrained["params"], "head": head}}

    def train(self, start: dict[str, Any], rate: float, seed: int) -> dict[str, Any]:
        """Returns the variables of a run after fine-tuning, or of one that was fine-tuned before."""
        e, model = self.experiment, self.model.name
        steps = max(1, round(e.epochs * len(self.train_data) / e.batch_size))
        schedule = optax.cosine_decay_schedule(rate, steps)
        moves = augment.compose(augment.random_crop(1 if e.tiny else 4), augment.random_flip())
        fitted = jt.fit(
            self.objective,
            optax.chain(optax.add_decayed_weights(e.decay), optax.sgd(schedule, momentum=0.9, nesterov=True)),
            jt.data.pipeline(self.train_data, e.batch_size, seed=seed, augment=moves),
            steps=steps,
            key=seed,
            params={model: start["params"]},
            state={model: {kind: value for kind, value in start.items() if kind != "params"}},
            keep=1,
            out=e.out / f"rate{rate:g}-seed{seed}",
            config={"rate": rate, "epochs": e.epochs, "model": None, "weights": str(e.weights), "classes": e.classes},
            progress=False,
        )
        return jax.device_get({"params": fitted.state.params[model], **fitted.state.state[model]})

    def averages(self, probe: dict[str, Any], members: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns what the soups and wise-ft are worth, and whom the labels held out have chosen."""
        soup = jt.fusion.greedy_soup(members, lambda one: self._accuracy(one, "held out"), renew=self.renewed)
        best = members[soup.members[0]]
        line = {alpha: self._between(probe, best, alpha) for alpha in ALPHAS}
        alpha = max(ALPHAS, key=lambda a: (self._accuracy(line[a], "held out"), -a))
        whole = jt.fusion.average(members)
        uniform = self.scores(self.renewed(whole))
        return {
            f"best run ({soup.members[0]})": self.scores(best),
            "uniform soup": uniform | {"not renewed": self._accuracy(whole, "test")},
            f"greedy soup (runs {', '.join(map(str, soup.members))})": self.scores(soup.tree),
            f"wise-ft of the best run, alpha {alpha:g}": self.scores(line[alpha]),
        }

    def renewed(self, variables: Any) -> dict[str, Any]:
        """Returns variables with batch statistics of their own, of the training images."""
        batches = jt.data.eval_batches(self.train_data, min(200, len(self.train_data)))
        return jt.fusion.renewed(self.model, variables, batches)

    def scores(self, variables: Any) -> dict[str, float]:
        """Returns the accuracies on the examples held out, and on the test images."""
        return {part: self._accuracy(variables, part) for part in self._batches}

    def _between(self, probe: Any, best: Any, alpha: float) -> Any:
        mixed = jt.fusion.wise_ft(probe, best, alpha=alpha)
        return mixed if alpha in (0, 1) else self.renewed(mixed)

    def _accuracy(self, variables: Any, part: str) -> float:
        state = {kind: value for kind, value in variables.items() if kind != "params"}
        state = jt.TrainState.of({self.model.name: variables["params"]}, {self.model.name: state})
        return 100 * float(self._evaluate(state, self._batches[part])["accuracy"])

    def _load(self, part: str, shape: tuple[int, int, int]) -> jt.data.Dataset:
        e = self.experiment
        found = jt.data.load(e.data, part, data_dir=e.data_dir, image_shape=shape).decoded()
        few = found.select(np.flatnonzero(found.labels < e.classes))
        few = few.take(100) if e.tiny else few
        named = {"label": found.class_names[: e.classes]}
        return few.without("label").with_columns({"label": few.labels}, class_names=named)


def table_of(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows: the accuracies of each network."""
    columns = ["held out", "test", "not renewed"]
    rows = [[name, *(f"{own[c]:.1f}" if c in own else "" for c in columns)] for name, own in results.items()]
    return ["network", "held out", "test", "test, statistics not renewed"], rows


def _write(results: dict[str, Any], experiment: Experiment) -> None:
    title = f"{experiment.model}: CIFAR-10 → {experiment.classes} classes of {experiment.data}"
    page = [f"# Soups of {len(experiment.rates)} runs", "", f"{title}. Accuracy, %.", ""]
    page += [*report.table(*table_of(results)), "", "![accuracy](soup.png)", ""]
    experiment.out.mkdir(parents=True, exist_ok=True)
    (experiment.out / "report.md").write_text("\n".join(page))
    settings = {name: str(value) for name, value in dataclasses.asdict(experiment).items()}
    (experiment.out / "results.json").write_text(
        json.dumps({"results": results, "settings": settings}, indent=1) + "\n"
    )
    _plot(results, title, experiment.out / "soup.png")


def _plot(results: dict[str, Any], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for name, own in results.items():
        fused = "soup" in name or "wise" in name
        axis.plot(own["held out"], own["test"], "*" if fused else "o", markersize=11 if fused else 6, label=name)
    axis.set(title=title, xlabel="accuracy on labels held out, %", ylabel="test accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize="x-small")
    report.save_figure(figure, path)


if __name__ == "__main__":
    run("cifar_soup", Experiment, main)
