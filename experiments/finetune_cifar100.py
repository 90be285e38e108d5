"""From CIFAR-10's published ResNet to CIFAR-100: what pretrained weights are worth, with many labels and with few.

Methods: `scratch`; `linear-probe`, a new head on frozen features, computed once and kept; `full`, all weights from the
pretrained ones; `l2-sp`, full under α · ½‖w − w₀‖² (Li et al. 2018); `lp-ft`, the probe's head first, then all weights
(Kumar et al. 2022). Scratch, full, l2-sp and the second half of lp-ft have the same number of steps: SGD with Nesterov
momentum 0.9, cosine to zero, random crop and flip; weights that start afresh (scratch, a new head) at `--rate`,
pretrained ones at `--finetune-rate`. The strength α of l2-sp is chosen on labels held out of the training set, a fifth
of each class; the test set is looked at once, at the end of a run.

    TFDS_DATA_DIR=... python -m experiments.finetune_cifar100 --weights resnet56-4bfd9763.th --out runs/cifar100

Measured with ResNet-20 (`--model resnet20 --weights resnet20-12fca82f.th --strengths 0.01`), seed 0, on two cores that
other processes used. Test accuracy in %:

                    10,000 images, 25 epochs   15 epochs   10 per class, 40 epochs
    scratch         39.66                      30.88        9.44
    linear-probe    26.84                      26.84       19.00
    full            -                          -           23.96
    l2-sp           -                          -           24.06
    lp-ft           51.04                      49.70       26.02

So pretrained weights are worth 11 points with 100 labels per class, after as many passes, and 17 with 10; scratch
still gains by longer training. After 15 passes over 10 per class lp-ft has 25.72, after 2 over 10,000 images 39.50. In
bfloat16 the probe of 10 per class has 19.02 and lp-ft 26.10. The strength of l2-sp was given, not chosen; ResNet-56 was
not run.

Every run has its own folder under `--out`: the same command resumes what is unfinished, and more sizes, methods or
seeds add to what is there. The table (report.md) and the plot are written anew after each run.
"""

import dataclasses
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
import tyro
from rich.console import Console

import jaxtransfer as jt
from jaxtransfer.data import augment
from jaxtransfer.devices import device_mesh
from jaxtransfer.errors import unknown
from jaxtransfer.runs import report

CHOOSE = "l2-sp"  # the method whose strength is chosen


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Learn CIFAR-100 from the published CIFAR-10 weights by several methods; writes a table and a plot."""

    out: Path = Path("runs/finetune_cifar100")
    """Folder for report.md, results.json, strength.png and one run directory per training."""
    weights: Path | None = None
    """The published file, resnet56-4bfd9763.th or that of another depth (see --model)."""
    model: str = "resnet56"
    """resnet20, resnet32, resnet44 or resnet56."""
    data: str = "cifar100"
    """Data set to learn, any that `jt.data.load` can name."""
    per_class: tuple[int, ...] = (100, 10, 50)
    """Labels per class, one table row of each method for each."""
    epochs: tuple[int, ...] = (15, 40, 20)
    """Passes over the images, one number for each of --per-class."""
    methods: tuple[str, ...] = ("linear-probe", "scratch", "full", "lp-ft", "l2-sp")
    """Any of them, in the order in which they run."""
    strengths: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0)
    """Of l2-sp's penalty, α, among which held-out labels choose; a single one is taken as it is."""
    choose_at: int | None = None
    """Labels per class at which the strength is chosen for all sizes; at each size by default."""
    rate: float = 0.1
    """Peak learning rate of weights that start afresh."""
    finetune_rate: float = 0.02
    """Peak learning rate of pretrained weights."""
    decay: float = 5e-4
    """Weight decay; l2-sp has its own penalty instead."""
    batch_size: int = 64
    """Examples per update."""
    seeds: int = 1
    """Repetitions: each draws other labels, another head, another order of batches."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the network computes in; weights, statistics and losses stay float32."""
    data_dir: Path | None = None
    """Folder of prepared tfds data sets; by default $TFDS_DATA_DIR."""
    tiny: bool = False
    """Digits, a small net with weights that nobody trained, few steps: shows that everything runs."""


def main(experiment: Experiment) -> dict[str, Any]:
    """Trains what is not trained yet and returns the test accuracies by labels per class and method, in per cent."""
    return compare(settled(experiment, METHODS), METHODS)


def compare(experiment: Experiment, methods: "Methods") -> dict[str, Any]:
    """Runs the experiment's methods, each by its row of `methods`; returns the results and shows the table."""
    bench = Bench(experiment, methods)
    for size in experiment.per_class:
        for seed in range(experiment.seeds):
            for method in experiment.methods:
                bench.train(method, size, seed)
                _write(bench.results, experiment)
    _show(bench.results, experiment)
    return bench.results


def settled(experiment: Experiment, methods: Mapping[str, Any]) -> Experiment:
    """Returns the experiment as it runs; refuses what can't be before anything is loaded."""
    if experiment.tiny:
        experiment = dataclasses.replace(
            experiment, model="resnet8", data="digits/noisy", weights=None, per_class=(5,), epochs=(1,), batch_size=16
        )
    elif experiment.weights is None:
        raise jt.InputError("--weights is the published file, resnet56-4bfd9763.th say; --tiny needs none")
    for method in experiment.methods:
        if method not in methods:
            raise unknown("method", method, methods)
    if not experiment.model.removeprefix("resnet").isdigit():
        raise jt.InputError(f"--model is a CIFAR ResNet, resnet56 or resnet20 say; got {experiment.model}")
    for name in ("methods", "strengths", "per_class"):
        if not getattr(experiment, name):
            raise jt.InputError(f"--{name.replace('_', '-')} needs at least one value")
    if len(experiment.epochs) != len(experiment.per_class):
        raise jt.InputError(
            f"--epochs has one number for each of --per-class {experiment.per_class}; got {experiment.epochs}"
        )
    least = {"epochs": 1, "per_class": 2, "seeds": 1, "batch_size": 1}
    for name, smallest in least.items():
        value = getattr(experiment, name)
        if np.min(value) < smallest:
            raise jt.InputError(f"--{name.replace('_', '-')} must be at least {smallest}; got {value}")
    for name in ("rate", "finetune_rate"):
        if not getattr(experiment, name) > 0:
            raise jt.InputError(f"--{name.replace('_', '-')} must be positive; got {getattr(experiment, name)}")
    if min(experiment.strengths) < 0 or experiment.decay < 0:
        raise jt.InputError("--strengths and --decay can't be negative")
    if experiment.choose_at not in (None, *experiment.per_class):
        raise jt.InputError(f"--choose-at is one of --per-class {experiment.per_class}; got {experiment.choose_at}")
    return experiment


@dataclasses.dataclass(frozen=True)
class Kit:
    """What a method is made of: the model, the weights that it starts from, the recipe, the number of steps."""

    model: jt.Model
    pretrained: dict[str, Any]
    experiment: Experiment
    steps: int
    seed: int = 0
    strength: float = 0.0
    bench: Any = None
    """The bench that trains it: the data, frozen features, the source's head and Fisher weights."""
    rows: Any = None
    """Numbers of the training examples."""
    probe: Callable[[], dict[str, Any]] = dict
    """The head of the linear probe, its parameters."""

    @property
    def anchor(self) -> dict[str, Any]:
        """The pretrained weights by model name."""
        return {self.model.name: self.pretrained["params"]}

    def sgd(self, rate: float, decay: float) -> optax.GradientTransformation:
        """Returns SGD with momentum and a cosine schedule over the steps."""
        schedule = optax.cosine_decay_schedule(rate, self.steps)
        return optax.chain(optax.add_decayed_weights(decay), optax.sgd(schedule, momentum=0.9, nesterov=True))

    def finetune(self, decay: float | None = None) -> optax.GradientTransformation:
        """Returns the optimiser of pretrained weights under a head that starts afresh."""
        decay = self.experiment.decay if decay is None else decay
        head, rest = (self.sgd(rate, decay) for rate in (self.experiment.rate, self.experiment.finetune_rate))
        return jt.optim.by_path({f"{self.model.name}/{self.model.head}": head, ".*": rest})

    def start(self, head: dict[str, Any] | None = None) -> dict[str, Any]:
        """Returns the pretrained variables under a fresh head, or under the given one."""
        fresh = self.fresh()
        return {**self.pretrained, "params": {**self.pretrained["params"], "head": head or fresh["params"]["head"]}}

    def fresh(self) -> dict[str, Any]:
        """Returns variables that nothing trained."""
        return dict(self.model.init(jax.random.key(self.seed), np.zeros((1, *self.image_shape), np.uint8)))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of the images that the network sees."""
        return (8, 8, 3) if self.experiment.tiny else (32, 32, 3)


class Method(NamedTuple):
    """What a method trains, how, and from where.

    Attributes:
      objective: what is minimised.
      optimizer: what it is minimised with.
      start: the variables to start from.
      model: the model that is trained and evaluated, where it isn't the kit's: of the same name.
      two_views: whether it sees a second augmentation of each image, `image2`.
    """

    objective: jt.Objective
    optimizer: optax.GradientTransformation
    start: dict[str, Any]
    model: jt.Model | None = None
    two_views: bool = False


Methods = Mapping[str, Callable[["Kit"], Method]]


def of_phase(phase: jt.methods.Phase, kit: "Kit") -> Method:
    """Returns what a method of one phase trains, from the pretrained weights."""
    return Method(phase.objective_after(None, None), phase.optimizer, kit.start())


def _scratch(kit: Kit) -> Method:
    optimizer = kit.sgd(kit.experiment.rate, kit.experiment.decay)
    return Method(jt.classification(kit.model), optimizer, kit.fresh())


def _full(kit: Kit) -> Method:
    return Method(jt.classification(kit.model), kit.finetune(), kit.start())


def _l2_sp(kit: Kit) -> Method:
    (phase,) = jt.methods.anchored(kit.model, kit.finetune(decay=0.0), kit.anchor, strength=kit.strength)
    return of_phase(phase, kit)


def _lp_ft(kit: Kit) -> Method:
    optimizer = kit.sgd(kit.experiment.finetune_rate, kit.experiment.decay)
    return Method(jt.classification(kit.model), optimizer, kit.start(kit.probe()))


METHODS: Methods = {
    "scratch": _scratch,
    "linear-probe": _full,  # trained on cached features, see `Bench.probe`
    "full": _full,
    "l2-sp": _l2_sp,
    "lp-ft": _lp_ft,
}


def _twice(transform: Any) -> Callable[..., dict[str, Any]]:
    """Returns the transform to two views of each image, `image` and `image2`, drawn apart from each other."""

    def both(batch, rng, rows=None):
        return {**transform(batch, rng, rows), "image2": transform(batch, rng, rows)["image"]}

    both.per_example = True  # pyright: ignore[reportFunctionMemberAccess]
    return both


class Bench:
    """The data, the pretrained weights and how a run is trained; `results` are the accuracies so far."""

    def __init__(self, experiment: Experiment, methods: Methods | None = None):
        self.experiment, self.methods = experiment, METHODS if methods is None else methods
        shape = (8, 8, 3) if experiment.tiny else (32, 32, 3)
        train, test = (
            jt.data.load(experiment.data, part, data_dir=experiment.data_dir, image_shape=shape).decoded()
            for part in ("train", "test")
        )
        self.train_data, self.test_data = train, test.take(100) if experiment.tiny else test
        depth, self.dtype = int(experiment.model.removeprefix("resnet")), jax.numpy.dtype(experiment.dtype)
        network = jt.models.cifar_resnet(depth, train.classes, dtype=self.dtype)
        image = jax.ShapeDtypeStruct((1, *shape), np.uint8)
        if experiment.weights is None:
            self.model = jt.models.normalize(network, 0.5, 0.25)
            self.pretrained = dict(self.model.init(jax.random.key(7), np.zeros(image.shape, np.uint8)))
        else:
            loaded = jt.load_pretrained(experiment.weights, network, inputs=image, reinit=network.head)
            self.model, self.pretrained = loaded.model, dict(loaded.variables)
        self.results: dict[str, Any] = {"accuracy": {}, "held out": {}, "strength": {}, "seconds": {}}
        self._features: dict[str, jt.data.Dataset] = {}

    def train(self, method: str, size: int, seed: int) -> float:
        """Returns the test accuracy, in per cent, of a method with `size` labels per class."""
        strength = self.choose(size, seed) if method == CHOOSE else 0.0
        name = f"{method}-seed{seed}"
        rows = self.rows(size, seed)
        if method == "linear-probe":
            accuracy, _ = self.probe(rows, size, seed)
        else:
            accuracy = self.fit(name, method, rows, self.test_data, size, seed, strength)
        by_method = self.results["accuracy"].setdefault(str(size), {})
        by_method.setdefault(method, {})[str(seed)] = accuracy
        print(f"{size} per class, {name}: {accuracy:.2f} %", file=sys.stderr, flush=True)
        return accuracy

    def rows(self, size: int, seed: int) -> np.ndarray:
        """Returns the numbers of `size` examples of each class, drawn by the seed, class by class."""
        labels, chosen = self.train_data.labels, []
        for label in range(self.train_data.classes):
            members = np.flatnonzero(labels == label)
            if len(members) < size:
                raise jt.InputError(f"class {label} has {len(members)} examples, --per-class asks for {size}")
            chosen.append(np.random.default_rng([seed, label]).permutation(members)[:size])
        return np.concatenate(chosen)

    def choose(self, size: int, seed: int) -> float:
        """Returns the strength by which a fifth of the labels, held out, is predicted best."""
        strengths, at = self.experiment.strengths, self.experiment.choose_at or size
        if len(strengths) == 1:
            return strengths[0]
        rows = self.rows(at, seed).reshape(-1, at)
        kept = at - max(1, at // 5)
        held = self.train_data.select(np.sort(rows[:, kept:].ravel()))
        accuracies = {
            strength: self.fit(
                f"held-out-{strength:g}-seed{seed}", CHOOSE, rows[:, :kept].ravel(), held, at, seed, strength
            )
            for strength in strengths
        }
        best = max(strengths, key=lambda strength: accuracies[strength])
        self.results["held out"][f"{at}, seed {seed}"] = {f"{k:g}": v for k, v in accuracies.items()}
        self.results["strength"][f"{size}, seed {seed}"] = best
        return best

    def fit(self, name, method, rows, test, size, seed, strength) -> float:
        """Trains in a run directory, or resumes, or finds it done; returns the accuracy at its end, in per cent."""
        experiment, begin = self.experiment, time.perf_counter()
        epochs = dict(zip(experiment.per_class, experiment.epochs, strict=True))[size]
        steps = -(-epochs * len(rows) // experiment.batch_size)
        kit = Kit(
            *(self.model, self.pretrained, experiment, steps, seed, strength, self, rows),
            probe=lambda: self.probe(rows, size, seed)[1],
        )
        objective, optimizer, start, own, two_views = self.methods[method](kit)
        model = self.model if own is None else own
        crop_flip = augment.compose(augment.random_crop(4), augment.random_flip())
        train = self.train_data.select(np.sort(rows))
        fitted = jt.fit(
            objective,
            optimizer,
            jt.data.pipeline(
                train, experiment.batch_size, seed=seed, augment=_twice(crop_flip) if two_views else crop_flip
            ),
            steps=steps,
            key=seed,
            params={model.name: start["params"]},
            state={model.name: {kind: value for kind, value in start.items() if kind != "params"}},
            eval_data=jt.data.eval_batches(test, 256),
            eval_objective=jt.classification(model),
            eval_every=steps,
            save_every=max(1, min(50, steps)),
            out=experiment.out / f"{size}-per-class" / name,
            config=self.config(method, strength, epochs),
            keep=1,
            mesh=device_mesh(),
        )
        if fitted.timing:
            self.results["seconds"][f"{size}, {name}"] = round(time.perf_counter() - begin)
        return 100 * fitted.history[-1]["eval/accuracy"]

    @functools.cached_property
    def source(self) -> tuple[jt.Model, dict[str, Any]]:
        """The pretrained network with its own head, for CIFAR-10's ten classes."""
        network = jt.models.cifar_resnet(int(self.experiment.model.removeprefix("resnet")), 10, dtype=self.dtype)
        if self.experiment.weights is None:
            model = jt.models.normalize(network, 0.5, 0.25)
            fresh = model.init(jax.random.key(8), np.zeros((1, *self.train_data.image_shape), np.uint8))
            head = dict(fresh)["params"]["head"]
            return model, {**self.pretrained, "params": {**self.pretrained["params"], "head": head}}
        loaded = jt.load_pretrained(self.experiment.weights, network)
        return loaded.model, dict(loaded.variables)

    def fisher(self, examples: int = 500) -> dict[str, Any]:
        """Returns the Fisher diagonal of the pretrained weights on CIFAR-10, divided by its mean, by model name."""
        model, variables = self.source
        name = "digits/upright" if self.experiment.tiny else "cifar10"
        shape = self.train_data.image_shape
        data = jt.data.load(name, "train", data_dir=self.experiment.data_dir, image_shape=shape)
        batches = jt.data.eval_batches(data.take(20 if self.experiment.tiny else examples), 20)
        state = {model.name: {kind: value for kind, value in variables.items() if kind != "params"}}
        found = jt.fisher_diagonal(jt.classification(model), {model.name: variables["params"]}, state, batches)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(found)]
        mean = sum(float(leaf.sum(dtype=np.float64)) for leaf in leaves) / sum(leaf.size for leaf in leaves)
        return jax.tree.map(lambda leaf: np.asarray(leaf) / np.float32(mean), found)

    def config(self, method: str, strength: float, epochs: int) -> dict[str, Any]:
        """Returns what is noted of a run, and must be the same for it to go on."""
        names = ("model", "data", "rate", "finetune_rate", "decay", "dtype")
        recipe = {name: getattr(self.experiment, name) for name in names}
        return {
            "method": method,
            "strength": strength,
            "weights": str(self.experiment.weights),
            "epochs": epochs,
            **recipe,
        }

    def probe(self, rows: np.ndarray, size: int, seed: int) -> tuple[float, dict[str, Any]]:
        """Returns the test accuracy of a linear classifier on the frozen features, and its weights."""
        columns = {part: self.features(part) for part in ("train", "test")}
        linear = jt.models.mlp(self.train_data.classes, hidden=(), name=self.model.name)
        objective = jt.classification(linear, view="features") + jt.l2(strength=1e-3, only=f"{linear.name}/head/kernel")
        steps = 30 if self.experiment.tiny else 1500
        batches = jt.data.pipeline(columns["train"].select(np.sort(rows)), 256, seed=seed, cache="device")
        fitted = jt.fit(objective, optax.adam(optax.cosine_decay_schedule(0.01, steps)), batches, steps=steps, key=seed)
        test = jt.data.eval_batches(columns["test"], 500)
        scores = jt.evaluate(jt.classification(linear, view="features"), fitted.state, test)
        return 100 * float(scores["accuracy"]), fitted.state.params[linear.name]["head"]

    def features(self, part: str) -> jt.data.Dataset:
        """Returns the frozen features of a split, computed once and kept beside the runs."""
        if part not in self._features:
            data = self.train_data if part == "train" else self.test_data
            name = f"features-{part}" if self.dtype == np.float32 else f"features-{part}-{self.dtype}"
            deep = jt.features(self.model, self.pretrained, data, path=self.experiment.out / name)
            columns = {"features": deep.column("features"), "label": deep.labels}
            self._features[part] = jt.data.Dataset.from_columns(**columns)
        return self._features[part]


def table_of(results: dict[str, Any], experiment: Experiment) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of the table: methods, and the accuracies by labels per class."""
    accuracy = results["accuracy"]
    rows = []
    for method in dict.fromkeys(method for by_method in accuracy.values() for method in by_method):
        cells = []
        for by_method in accuracy.values():
            values = list(by_method.get(method, {}).values())
            own = f" ({', '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.2f}{own}" if values else "")
        rows.append([method, *cells])
    epochs = dict(zip(experiment.per_class, experiment.epochs, strict=True))
    return ["method", *(f"{size} per class, {epochs[int(size)]} epochs" for size in accuracy)], rows


def _write(results: dict[str, Any], experiment: Experiment) -> None:
    title = f"{experiment.model}: CIFAR-10 → {experiment.data}"
    page = [f"# {title}", "", "Test accuracy, %.", "", *report.table(*table_of(results, experiment)), ""]
    if results["held out"]:
        _plot(results["held out"], title, experiment.out / "strength.png")
        page += [f"Strength of {CHOOSE}, as held-out labels chose it: {results['strength']}", ""]
        page += ["![held-out accuracy by strength](strength.png)", ""]
    experiment.out.mkdir(parents=True, exist_ok=True)
    (experiment.out / "report.md").write_text("\n".join(page))
    settings = {name: str(value) for name, value in dataclasses.asdict(experiment).items()}
    (experiment.out / "results.json").write_text(json.dumps({**results, "settings": settings}, indent=1) + "\n")


def _show(results: dict[str, Any], experiment: Experiment) -> None:
    console, (header, rows) = Console(), table_of(results, experiment)
    title = f"{experiment.model}: CIFAR-10 → {experiment.data}, test accuracy in %"
    report.print_table(console, header, rows, title=title, min_width=72)
    console.print(f"report: {experiment.out / 'report.md'}", soft_wrap=True)


def _plot(held_out: dict[str, dict[str, float]], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for name, accuracies in held_out.items():
        axis.plot([float(strength) for strength in accuracies], list(accuracies.values()), "o-", label=name)
    axis.set_xscale("symlog", linthresh=1e-4)
    axis.set(title=title, xlabel=f"strength of {CHOOSE}", ylabel="accuracy on held-out labels, %")
    axis.grid(alpha=0.3)
    axis.legend(title="labels per class")
    report.save_figure(figure, path)


def run(name: str, options: type[Any], start: Callable[[Any], Any]) -> None:
    """Reads the options of a command, and runs it; compiles each program once for all seeds."""
    with tempfile.TemporaryDirectory() as programs:
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            jax.config.update("jax_compilation_cache_dir", programs)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        try:
            start(tyro.cli(options))
        except jt.InputError as error:
            print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    run("finetune_cifar100", Experiment, main)
