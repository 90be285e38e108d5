"""How few parameters carry CIFAR-10's network over to CIFAR-100: deltas against full fine-tuning, with few labels.

Methods: `linear-probe`, `full`, and between them BitFit, SSF, norm tuning, (IA)³, LoRA, DoRA, LoRA with the norms,
adapters (1×1 convolutions beside the convolutions with batch norm of their own; Houlsby's in a transformer), `vpt`
(deep visual prompts, of a transformer alone) and side-tuning (a small network beside). All begin from the pretrained
network under the head of the linear probe, which is trained on frozen features of the same labels, computed once; all
train the head along, with Adam, a cosine to zero, random crop and flip, for the same number of steps, so that they
differ in what trains and its learning rate alone. The rate is chosen for each method on a fifth of the labels of each
class, held out of the training set (probe and all), with `--choose-steps` steps on the rest, as many as the run has by
default (with fewer, the rate that moves nothing wins): three neighbours of a grid, and further ones while the best is
at the end. The choice is seed 0's. The test set is looked at once, at the end of a run.

    TFDS_DATA_DIR=... nice python -m experiments.deltas_cifar100 --weights resnet56-4bfd9763.th --out runs/deltas

Measured, 10 labels per class, 150 steps, seed 0. ResNet-56: linear probe 19.9 %, full 28.3 %, SSF (1.5 % of the
parameters) 22.2 %, LoRA of rank 1 with the norms (3.5 %) 21.6 %: at this length none is near full fine-tuning. ViT-Ti,
of the 1,200 steps that it has by default, which leave it with features of little worth: linear probe 9.88 %, full
10.66 %, SSF (1.3 %) and BitFit (0.8 %) 9.96 %: within a point, but so is the probe. The other rows and 100 labels have
not been run so.

`--model vit-ti` has the same table for a ViT-Ti with patches of `--patch` pixels, which is trained here first, once, on
CIFAR-10: labels and the published ResNet's softened outputs (Hinton et al. 2015), AdamW, `--source-steps` steps of 64
images.

Every cell has a folder of its own under `--out`: the same command resumes what is unfinished, and further methods,
sizes or seeds add to what is there; report.md, results.json and accuracy.png are written anew after each.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import jaxtransfer as jt
from experiments import cells
from experiments.delta_methods import GRID, METHODS, Kit, started
from experiments.delta_table import table_of, verdict, write
from experiments.finetune_cifar100 import run
from jaxtransfer.data import augment
from jaxtransfer.runs import report

PROBE, VIT = "linear-probe", "vit-ti"
SETTINGS = ("model", "data", "batch_size", "rank", "bottleneck", "patch", "source_steps")  # of which a cell is


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Learn CIFAR-100 from CIFAR-10's network by training little of it; writes a table and a picture."""

    out: Path = Path("runs/deltas_cifar100")
    """Folder for report.md, results.json, accuracy.png and one folder per training."""
    weights: Path | None = None
    """The published file, resnet56-4bfd9763.th or that of another depth (see --model)."""
    model: str = "resnet56"
    """resnet20, resnet32, resnet44 or resnet56 of --weights; or vit-ti, which learns from resnet56."""
    data: str = "cifar100"
    """Data set to learn, any that `jt.data.load` can name."""
    labels: tuple[int, ...] = (10, 100)
    """Labels per class."""
    steps: tuple[int, ...] = (150, 600)
    """Updates of a run, one number for each of --labels."""
    choose_steps: tuple[int, ...] = (150, 600)
    """Updates of the runs by which the learning rate is chosen, likewise."""
    methods: tuple[str, ...] = ()
    """Any of the methods, in the order in which they run; by default all that the model can have."""
    seeds: int = 1
    """Repetitions: each draws other labels, another order of batches."""
    rank: int | None = None
    """Of lora and dora; by default 1 in convolutions, 8 in attention."""
    bottleneck: int = 12
    """Of Houlsby's adapters."""
    batch_size: int = 32
    """Examples per update."""
    patch: int = 4
    """Side of the transformer's patches."""
    source_steps: int = 1200
    """Updates of the transformer on CIFAR-10."""
    data_dir: Path | None = None
    """Folder of prepared tfds data sets; by default $TFDS_DATA_DIR."""
    tiny: bool = False
    """Digits, small networks with weights that nobody trained, two steps: shows that everything runs."""


def main(experiment: Experiment) -> dict[str, Any]:
    """Trains what is not trained yet; returns by labels per class, method and seed what the cells tell."""
    experiment = settled(experiment)
    bench = Bench(experiment)
    results: dict[str, Any] = {str(size): {method: {} for method in experiment.methods} for size in experiment.labels}
    for size in experiment.labels:
        for seed in range(experiment.seeds):
            for method in experiment.methods:
                found = results[str(size)][method][str(seed)] = bench.cell(method, size, seed)
                told = f"{found['accuracy']:.2f} % ({found['seconds']:.0f} s)"
                print(f"{size} labels per class, {method}, seed {seed}: {told}", file=sys.stderr, flush=True)
                write(results, experiment, _title(experiment))
    console, (header, rows) = Console(), table_of(results)
    report.print_table(console, header, rows, title=f"{_title(experiment)}, test accuracy, %")
    for line in verdict(results):
        console.print(line, soft_wrap=True)
    console.print(f"report: {experiment.out / 'report.md'}", soft_wrap=True)
    return results


def settled(experiment: Experiment) -> Experiment:
    """Returns the experiment as it runs; refuses what can't be before anything is loaded."""
    transformer = experiment.model == VIT
    if not transformer and not experiment.model.removeprefix("resnet").isdigit():
        raise jt.InputError(f"--model is a CIFAR ResNet, resnet56 say, or {VIT}; got {experiment.model}")
    fitting = [method for method in METHODS if transformer or method != "vpt"]
    rank = (8 if transformer else 1) if experiment.rank is None else experiment.rank
    experiment = dataclasses.replace(experiment, methods=experiment.methods or tuple(fitting), rank=rank)
    if "vpt" in experiment.methods and not transformer:
        raise jt.InputError(f"vpt has prompts among a transformer's tokens: --model {VIT}; got {experiment.model}")
    if experiment.tiny:
        small = {"labels": (5,), "steps": (2,), "choose_steps": (1,), "batch_size": 4, "source_steps": 1, "rank": 1}
        experiment = dataclasses.replace(experiment, data="digits/noisy", weights=None, **small)
    elif experiment.weights is None:
        raise jt.InputError("--weights is the published file, resnet56-4bfd9763.th say; --tiny needs none")
    positive = ("seeds", "rank", "bottleneck", "batch_size", "patch", "source_steps")
    cells.check(experiment, *positive, methods=METHODS)
    if not experiment.labels or min(experiment.labels) < 2:
        raise jt.InputError(f"--labels are 2 or more per class, one of which is held out; got {experiment.labels}")
    for name in ("steps", "choose_steps"):
        values = getattr(experiment, name)
        if len(values) != len(experiment.labels) or min(values) < 1:
            option = f"--{name.replace('_', '-')}"
            raise jt.InputError(f"{option} has one positive number for each of --labels; got {values}")
    return experiment


class Held(NamedTuple):
    """The state of `falling`: numbers of the run, so that runs of other rates and lengths share a program."""

    rate: jax.Array
    steps: jax.Array
    step: jax.Array


def falling(rate: float, steps: int) -> optax.GradientTransformation:
    """Returns −η/2 · (1 + cos(π t / T)) times the updates, with η and T in its state.

    Args:
      rate: η.
      steps: T.
    """

    def init(params):
        return Held(jnp.float32(rate), jnp.float32(steps), jnp.float32(0))

    def update(updates, state, params=None):
        factor = -0.5 * state.rate * (1 + jnp.cos(jnp.pi * jnp.minimum(state.step / state.steps, 1)))
        return jax.tree.map(lambda leaf: factor * leaf, updates), state._replace(step=state.step + 1)

    return optax.GradientTransformation(init, update)


class Bench:
    """The data, the pretrained network, and how a cell is trained."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.shape = (8, 8, 3) if experiment.tiny else (32, 32, 3)
        self.train, test = (self._load(experiment.data, part) for part in ("train", "test"))
        self.test = test.take(40) if experiment.tiny else test
        self._probes: dict[Any, tuple[float, dict[str, Any]]] = {}

    def _load(self, name: str, part: str) -> jt.data.Dataset:
        return jt.data.load(name, part, data_dir=self.experiment.data_dir, image_shape=self.shape).decoded()

    def _network(self, classes: int) -> jt.Model:
        if self.experiment.model != VIT:
            depth = 8 if self.experiment.tiny else int(self.experiment.model.removeprefix("resnet"))
            return jt.models.cifar_resnet(depth, classes)
        if self.experiment.tiny:
            return jt.models.vit(8, 1, 2, classes, patch=4)
        return jt.models.vit_ti(classes, patch=self.experiment.patch)

    @functools.cached_property
    def source(self) -> tuple[jt.Model, dict[str, Any]]:
        """The pretrained network with a head for the new classes, and its weights."""
        experiment, network = self.experiment, self._network(self.train.classes)
        image = np.zeros((1, *self.shape), np.uint8)
        if experiment.model == VIT:
            model, learned = jt.models.normalize(network, 0.47, 0.25), self._transformer(image)
            head = dict(jax.jit(model.init)(jax.random.key(7), image))["params"][model.head]
            return model, {**learned, "params": {**learned["params"], model.head: head}}  # of the new classes
        if experiment.weights is None:
            model = jt.models.normalize(network, 0.5, 0.25)
            return model, dict(jax.jit(model.init)(jax.random.key(7), image))
        loaded = jt.load_pretrained(experiment.weights, network, inputs=image, reinit=network.head)
        return loaded.model, dict(loaded.variables)

    def _transformer(self, image: np.ndarray) -> dict[str, Any]:
        """Returns the transformer's weights: trained on CIFAR-10 in a folder of its own, or found there."""
        experiment = self.experiment
        data = self._load("digits/upright" if experiment.tiny else "cifar10", "train")
        net = jt.models.normalize(self._network(data.classes), 0.47, 0.25)
        objective = jt.classification(net)
        if experiment.weights is not None:
            known = jt.load_pretrained(experiment.weights, jt.models.resnet56(data.classes))
            teacher = jt.frozen(known.model.named("teacher"), dict(known.variables))
            objective = objective + jt.distillation(net, teacher, temperature=4.0)
        rate = optax.warmup_cosine_decay_schedule(0, 1e-3, experiment.source_steps // 10, experiment.source_steps)
        fitted = jt.fit(
            objective,
            optax.adamw(rate, weight_decay=0.05),
            jt.data.pipeline(data, 8 if experiment.tiny else 64, augment=_crop_flip()),
            steps=experiment.source_steps,
            save_every=min(100, experiment.source_steps),
            keep=1,
            out=experiment.out / f"{VIT}-source",
            config={name: getattr(experiment, name) for name in ("patch", "source_steps", "tiny")},
        )
        return {"params": fitted.state.params[net.name], **fitted.state.state.get(net.name, {})}

    def rows(self, size: int, seed: int) -> np.ndarray:
        """Returns the numbers of `size` examples of each class [K, size], drawn by the seed."""
        labels, chosen = self.train.labels, []
        for label in range(self.train.classes):
            members = np.flatnonzero(labels == label)
            if len(members) < size:
                raise jt.InputError(f"class {label} has {len(members)} examples, --labels asks for {size}")
            chosen.append(np.random.default_rng([seed, label]).permutation(members)[:size])
        return np.stack(chosen)

    def cell(self, method: str, size: int, seed: int) -> dict[str, Any]:
        """Returns what a run gives: trained, gone on with, or read from its folder."""
        folder, at = self._folder(method, size, f"seed{seed}"), self.experiment.labels.index(size)
        settings = {**self._settings(), "steps": self.experiment.steps[at]}
        settings["choose_steps"] = self.experiment.choose_steps[at]

        def train(folder: Path) -> dict[str, Any]:
            rows = self.rows(size, seed)
            if method == PROBE:
                accuracy, head = self.probe(rows, self.test)
                return {"accuracy": accuracy, **self._counts(head, head)}
            rate, seen = self.choose(method, size)
            found = self.fit(method, rows, self.test, rate, settings["steps"], seed, folder)
            return {**found, "rate": rate, "held out": seen}

        folder.mkdir(parents=True, exist_ok=True)
        return cells.cell(folder, settings, train)

    def choose(self, method: str, size: int) -> tuple[float, dict[str, float]]:
        """Returns the learning rate by which held-out labels are predicted best, and what each that was tried gave."""
        steps = self.experiment.choose_steps[self.experiment.labels.index(size)]
        rows = self.rows(size, 0)
        kept = size - max(1, size // 5)
        held = self.train.select(np.sort(rows[:, kept:].ravel()))

        def of_rate(place: int) -> float:
            folder = self._folder(method, size, f"rate-{GRID[place]:g}")
            folder.mkdir(parents=True, exist_ok=True)
            settings = {**self._settings(), "choose_steps": steps}

            def train(_: Path) -> dict[str, Any]:
                return self.fit(method, rows[:, :kept], held, GRID[place], steps, 0, None)

            return cells.cell(folder, settings, train)["accuracy"]

        middle = METHODS[method].place
        seen = {place: of_rate(place) for place in (middle, middle - 1, middle + 1)}  # the middle where they tie
        while (best := max(seen, key=lambda place: seen[place])) in (min(seen), max(seen)):
            place = best - 1 if best == min(seen) else best + 1
            if not 0 <= place < len(GRID):
                break
            seen[place] = of_rate(place)
        return GRID[best], {f"{GRID[place]:g}": seen[place] for place in sorted(seen)}

    def fit(self, method, rows, test, rate, steps, seed, out) -> dict[str, Any]:
        """Trains, in a run directory where there is one; returns the accuracy at its end, and how much trained."""
        (network, pretrained), experiment = self.source, self.experiment
        head = self.probe(rows, test)[1]
        variables = {**pretrained, "params": {**pretrained["params"], "head": head}}
        image = np.zeros((1, *self.shape), np.uint8)
        rank = experiment.rank or 1
        kit = Kit(network, variables, self.train.classes, rank, experiment.bottleneck, image)
        model, start = started(method, kit, seed)
        train = self.train.select(np.sort(rows.ravel()))
        fitted = jt.fit(
            jt.classification(model),
            optax.chain(optax.scale_by_adam(), falling(rate, steps)),
            jt.data.pipeline(train, experiment.batch_size, seed=seed, augment=_crop_flip()),
            steps=steps,
            key=seed,
            params={model.name: start["params"]},
            state={model.name: {kind: value for kind, value in start.items() if kind != "params"}},
            eval_data=jt.data.eval_batches(test, min(250, len(test))),
            eval_every=steps,
            save_every=min(100, steps),
            keep=1,
            out=out,
            progress=False,
        )
        return {"accuracy": 100 * fitted.history[-1]["eval/accuracy"], **self._counts(start["params"], head)}

    def probe(self, rows: np.ndarray, test: jt.data.Dataset) -> tuple[float, dict[str, Any]]:
        """Returns the accuracy of a linear classifier on frozen features, and its weights."""
        key = (rows.tobytes(), len(test))
        if key not in self._probes:
            columns = [self._features(part) for part in (self.train.select(np.sort(rows.ravel())), test)]
            linear = jt.models.mlp(self.train.classes, hidden=(), name="probe")
            objective = jt.classification(linear, view="features")
            objective = objective + jt.l2(strength=1e-3, only=f"{linear.name}/head/kernel")
            steps = 3 if self.experiment.tiny else 1000
            batches = jt.data.pipeline(columns[0], min(256, rows.size), cache="device")
            optimizer = optax.adam(optax.cosine_decay_schedule(0.01, steps))
            fitted = jt.fit(objective, optimizer, batches, steps=steps, progress=False)
            scored = jt.evaluate(
                jt.classification(linear, view="features"), fitted.state, jt.data.eval_batches(columns[1], 250)
            )
            self._probes[key] = 100 * float(scored["accuracy"]), fitted.state.params[linear.name]["head"]
        return self._probes[key]

    def _features(self, data: jt.data.Dataset) -> jt.data.Dataset:
        path = self.experiment.out / f"features-{self.experiment.model}-test" if data is self.test else None
        deep = jt.features(*self.source, data, batch_size=min(250, len(data)), path=path)
        return jt.data.Dataset.from_columns(features=deep.column("features"), label=deep.labels)

    def _counts(self, params: Any, head: Any) -> dict[str, Any]:
        trained, whole = jt.tree.count(params), jt.tree.count({**self.source[1]["params"], "head": head})
        return {"trained": trained, "share": 100 * trained / whole}

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self.experiment, name) for name in SETTINGS}

    def _folder(self, method: str, size: int, name: str) -> Path:
        return self.experiment.out / f"{self.experiment.model}-{size}-per-class" / method / name


def _crop_flip() -> Any:
    return augment.compose(augment.random_crop(4), augment.random_flip())


def _title(experiment: Experiment) -> str:
    return f"{experiment.model}: CIFAR-10 → {experiment.data}"


if __name__ == "__main__":
    run("deltas_cifar100", Experiment, main)
