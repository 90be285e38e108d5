"""From CIFAR-10 to CIFAR-100 with a few labels: pretrain once, then learn the target by several methods.

Any two data sets that `jt.data.load` can name will do, and any model of the zoo. The source is trained once; each
repetition (`--seeds`) draws other labels, another head and another order of batches. Weights that start afresh (the
source, scratch, every head) train at the preset's rate, pretrained ones at its smaller one, all with the same number
of steps. Accuracy is that of the last step on the whole test split of the target. Every run lies in its own folder
under `--out`: the same command resumes whatever is unfinished, and more seeds or methods add to what is there.

    TFDS_DATA_DIR=... python -m experiments.finetune_cifar --out runs/finetune_cifar

On two cores that other jobs used too: 18 minutes, half of them waiting for the cores (9.6 minutes of processor time);
CIFAR-10's first 20,000 training images, 10 labels per class of CIFAR-100, its first 5,000 test images. ResNet-20
reaches 50.9 % on the source in 300 steps; on the target, after 80 steps, mean of two seeds (and each):

    scratch        4.7 %  (4.1, 5.3)
    linear-probe   6.5 %  (6.1, 6.9)
    full           6.8 %  (6.2, 7.4)
    l2-sp          6.8 %  (6.1, 7.5)

The source helps by about two points; full and l2-sp do not differ, and all of it is far from what longer training
reaches. With the head at the smaller rate, too, full reached 3.4 % (one seed); the rate of the heads was
chosen on seeing that, and is the one choice that looked at the target.

Offline, in seconds: `--tiny --source digits/upright --target digits/noisy`. The preset `vgg16` is meant for a GPU
(about 8 times the work per step); its recipe is that of VGG-16 with batch norm on 32×32 images, not measured here.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
import tyro
from rich.console import Console

import jaxtransfer as jt
from jaxtransfer.data import augment
from jaxtransfer.devices import device_mesh
from jaxtransfer.errors import unknown
from jaxtransfer.methods import split_steps
from jaxtransfer.runs import checkpoints, report


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained: SGD with momentum 0.9 (Nesterov), cosine to zero, random crop and flip."""

    model: str
    source_steps: int
    steps: int
    rate: float
    """Of weights that start afresh."""
    finetune_rate: float
    """Of pretrained weights."""
    decay: float
    """Weight decay; L2-SP has its own penalty instead."""
    batch_size: int = 128
    """On the source."""
    target_batch_size: int = 64


PRESETS = {
    "resnet20": Recipe("resnet20", source_steps=300, steps=80, rate=0.1, finetune_rate=0.02, decay=1e-4),
    "vgg16": Recipe("vgg16-bn", source_steps=30_000, steps=4000, rate=0.05, finetune_rate=0.01, decay=5e-4),
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Pretrain on one data set and learn another from a few labels, by several methods; writes a table and a plot."""

    out: Path = Path("runs/finetune_cifar")
    """Folder for report.md, results.png, results.json and one run directory per training."""
    preset: str = "resnet20"
    """resnet20 (minutes on a CPU) or vgg16 (for a GPU)."""
    model: str | None = None
    """Another model of `jaxtransfer models`, trained by the preset's recipe."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type that the network computes in; weights, statistics and losses stay float32."""
    source: str = "cifar10"
    """Data set to pretrain on."""
    target: str = "cifar100"
    """Data set to learn from a few labels."""
    image_size: int | None = None
    """Side to which images are brought (RGB); by default all images have the source's shape."""
    shots: int | None = 10
    """Labels per class of the target; `None` takes all."""
    methods: tuple[str, ...] = ("scratch", "linear-probe", "full", "l2-sp")
    """Any of scratch, linear-probe, full, l2-sp, lp-ft, layerwise-decay."""
    strength: float = 0.1
    """Of the penalty of l2-sp."""
    source_steps: int | None = None
    """Updates on the source; the preset's by default."""
    steps: int | None = None
    """Updates on the target, the same for every method; the preset's by default."""
    seeds: int = 2
    """Repetitions on the target."""
    data_dir: Path | None = None
    """Folder of prepared tfds data sets; by default $TFDS_DATA_DIR."""
    tiny: bool = False
    """A small net, few steps, two labels per class: shows that everything runs, not what comes out."""


def main(experiment: Experiment) -> dict[str, Any]:
    """Trains what is not trained yet and returns the accuracies by method, in per cent."""
    recipe, experiment = _settle(experiment)
    begin, console = time.perf_counter(), Console()
    bench = Bench(experiment, recipe)
    source_accuracy, source = bench.pretrain()
    accuracies = {
        method: [bench.finetune(method, source, seed) for seed in range(experiment.seeds)]
        for method in experiment.methods
    }
    results = {
        "source": {"data": experiment.source, "accuracy": source_accuracy},
        "target": {"data": experiment.target, "shots": experiment.shots, "accuracy": accuracies},
        "recipe": dataclasses.asdict(recipe),
        "runs": bench.log,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    _show(results, experiment, console)
    return results


def _settle(experiment: Experiment) -> tuple[Recipe, Experiment]:
    """Returns the recipe with its overrides, and the experiment; refuses what can't be before anything is loaded."""
    if experiment.preset not in PRESETS:
        raise unknown("preset", experiment.preset, PRESETS)
    if experiment.tiny:
        few = {"shots": 2, "source_steps": 10, "steps": 4}
        experiment = dataclasses.replace(experiment, model=experiment.model or "small-cnn", **few)
    for method in experiment.methods:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
    if not experiment.methods:
        raise jt.InputError(f"--methods needs at least one of {', '.join(METHODS)}")
    recipe = PRESETS[experiment.preset]
    given = {name: getattr(experiment, name) for name in ("model", "source_steps", "steps")}
    recipe = dataclasses.replace(recipe, **{name: value for name, value in given.items() if value is not None})
    if recipe.model not in jt.models.ZOO:
        raise unknown("model", recipe.model, jt.models.ZOO)
    if experiment.tiny:
        recipe = dataclasses.replace(recipe, batch_size=16, target_batch_size=16)
    least = {"source_steps": 1, "steps": 2, "seeds": 1, "shots": 1, "image_size": 1}
    for name, smallest in least.items():
        value = getattr(recipe, name, getattr(experiment, name, None))
        if value is not None and value < smallest:
            raise jt.InputError(f"--{name.replace('_', '-')} must be at least {smallest}; got {value}")
    return recipe, experiment


class Bench:
    """The data, the recipe, and how a run is trained."""

    def __init__(self, experiment: Experiment, recipe: Recipe):
        self.experiment, self.recipe = experiment, recipe
        self.log: dict[str, str] = {}
        size = experiment.image_size
        self.source = self.load(experiment.source, None if size is None else (size, size, 3))
        self.target = self.load(experiment.target, self.source[0].image_shape)
        self.mean, self.std = jt.data.statistics(self.source[0], most=5000)

    def load(self, name: str, shape: tuple[int, int, int] | None) -> tuple[jt.data.Dataset, jt.data.Dataset]:
        """Returns the training and the test split; small parts of them in a tiny run."""
        parts = ("train", "test")
        train, test = (jt.data.load(name, p, data_dir=self.experiment.data_dir, image_shape=shape) for p in parts)
        return (train, test.take(256)) if self.experiment.tiny else (train, test)

    def config(self, data: jt.data.Dataset, **more: Any) -> dict[str, Any]:
        """Returns what is noted of a run; `jaxtransfer evaluate` and `predict` read it, too."""
        return {
            "experiment": "finetune_cifar",
            "tiny": self.experiment.tiny,
            "data": data.name,
            "split": data.split,
            "class_names": list(data.class_names),
            "image_shape": list(data.image_shape),
            "resize": True,
            "mean": self.mean,
            "std": self.std,
            **dataclasses.asdict(self.recipe),
            **({} if self.experiment.dtype == "float32" else {"model_options": {"dtype": self.experiment.dtype}}),
            **more,
        }

    def pretrain(self) -> tuple[float, dict[str, Any]]:
        """Returns the accuracy on the source's test split and the trained variables."""
        train, test = self.source
        train = train.take(2000) if self.experiment.tiny else train
        config = self.config(train, method="pretrain")
        kit = Kit(jt.models.rebuild(config), self.recipe)
        stages = jt.methods.full(kit.model, kit.fresh(self.recipe.source_steps))
        return self.fit("source", stages, train, test, self.recipe.source_steps, self.recipe.batch_size, config, 0)

    def finetune(self, method: str, source: dict[str, Any], seed: int) -> float:
        """Returns the accuracy on the target's test split."""
        train, test = self.target
        if self.experiment.shots is not None:
            train = train.subset(per_class=self.experiment.shots, seed=seed)
        more = {"method": method, "shots": self.experiment.shots, "seed": seed, "source": self.experiment.source}
        config = self.config(train, **more, strength=self.experiment.strength if method == "l2-sp" else None)
        kit = Kit(jt.models.rebuild(config), self.recipe, source["params"], self.experiment.strength)
        start = kit.model.init(jax.random.key(seed), train.read([0])["image"])
        if method != "scratch":
            moved = jt.transfer(source["params"], start["params"], reinit=kit.model.head)
            start = {**source, "params": moved.params}
        steps, size = self.recipe.steps, self.recipe.target_batch_size
        name = f"{method}-seed{seed}"
        accuracy, _ = self.fit(name, METHODS[method](kit), train, test, steps, size, config, seed, start)
        return accuracy

    def fit(self, name, stages, train, test, steps, batch_size, config, seed, start=None) -> tuple[float, Any]:
        """Trains the stages, each in its run directory, and returns the last accuracy and the variables."""
        evaluated = jt.models.rebuild(config)
        params = state = fitted = None
        if start is not None:
            params = {evaluated.name: start["params"]}
            state = {evaluated.name: {k: v for k, v in start.items() if k != "params"}}
        crop_flip = augment.compose(augment.random_crop(4), augment.random_flip())
        batches = jt.data.pipeline(train, batch_size, seed=seed, augment=crop_flip)
        begun = False
        for number, (stage, part) in enumerate(zip(stages, split_steps(steps, [s.share for s in stages]), strict=True)):
            last = number == len(stages) - 1
            out = self.experiment.out / (name if last else f"{name}-stage-{number + 1}")
            begun = begun or bool(checkpoints.steps(out / "checkpoints"))
            fitted = jt.fit(
                stage.objective,
                stage.optimizer,
                batches,
                steps=part,
                key=seed,
                params=params,
                state=state,
                eval_data=jt.data.eval_batches(test, 256) if last else None,
                eval_objective=jt.classification(evaluated),
                eval_every=part,
                save_every=max(1, part // 5),
                out=out,
                config=config,
                keep=1,
                mesh=device_mesh(),
            )
            params, state = fitted.state.params, fitted.state.state
        assert fitted is not None
        accuracy = 100 * fitted.history[-1]["eval/accuracy"]
        self.log[name] = "already done" if not fitted.timing else "resumed" if begun else "trained"
        print(f"{name}: accuracy {accuracy:.2f} % ({self.log[name]})", file=sys.stderr)
        last = fitted.state
        return accuracy, {"params": last.params[evaluated.name], **last.state[evaluated.name]}


@dataclasses.dataclass(frozen=True)
class Kit:
    """What a method is made of: the model, its recipe, the source's weights."""

    model: jt.Model
    recipe: Recipe
    anchor: Any = None
    strength: float = 0.0

    def sgd(self, rate: float, steps: int, decay: float) -> optax.GradientTransformation:
        """Returns SGD with momentum and a cosine schedule over the steps."""
        schedule = optax.cosine_decay_schedule(rate, steps)
        return optax.chain(optax.add_decayed_weights(decay), optax.sgd(schedule, momentum=0.9, nesterov=True))

    def fresh(self, steps: int) -> optax.GradientTransformation:
        """Returns the optimiser of weights that start afresh."""
        return self.sgd(self.recipe.rate, steps, self.recipe.decay)

    def finetune(self, steps: int, decay: float | None = None) -> optax.GradientTransformation:
        """Returns the optimiser of pretrained weights under a head that starts afresh."""
        decay = self.recipe.decay if decay is None else decay
        head, rest = (self.sgd(rate, steps, decay) for rate in (self.recipe.rate, self.recipe.finetune_rate))
        return jt.optim.by_path({f"{self.model.name}/{self.model.head}": head, ".*": rest})


def _l2_sp(kit: Kit) -> tuple[jt.methods.Stage, ...]:
    optimizer = kit.finetune(kit.recipe.steps, decay=0.0)
    return jt.methods.anchored(kit.model, optimizer, {kit.model.name: kit.anchor}, strength=kit.strength)


def _lp_ft(kit: Kit) -> tuple[jt.methods.Stage, ...]:
    probe, rest = split_steps(kit.recipe.steps, [0.5, 0.5])
    return jt.methods.lp_ft(kit.model, kit.finetune(rest), probe_optimizer=kit.fresh(probe))


METHODS: dict[str, Callable[[Kit], tuple[jt.methods.Stage, ...]]] = {
    "scratch": lambda kit: jt.methods.full(kit.model, kit.fresh(kit.recipe.steps)),
    "linear-probe": lambda kit: jt.methods.linear_probe(kit.model, kit.fresh(kit.recipe.steps)),
    "full": lambda kit: jt.methods.full(kit.model, kit.finetune(kit.recipe.steps)),
    "l2-sp": _l2_sp,
    "lp-ft": _lp_ft,
    "layerwise-decay": lambda kit: jt.methods.discriminative(kit.model, kit.finetune(kit.recipe.steps)),
}


def _show(results: dict[str, Any], experiment: Experiment, console: Console) -> None:
    target, recipe, out = results["target"], results["recipe"], experiment.out
    labels = "all labels" if target["shots"] is None else f"{target['shots']} labels per class"
    title = f"{recipe['model']}: {experiment.source} → {experiment.target}, {labels}"
    caption = (
        f"test accuracy in % after {recipe['steps']} steps; on the source {results['source']['accuracy']:.2f} after "
        f"{recipe['source_steps']} steps"
    )
    header = ["method", "mean", *(f"seed {seed}" for seed in range(experiment.seeds))]
    rows = [
        [method, f"{np.mean(values):.2f}", *(f"{value:.2f}" for value in values)]
        for method, values in target["accuracy"].items()
    ]
    report.print_table(console, header, rows, title=title, caption=caption, min_width=72)
    _plot(target["accuracy"], title, out / "results.png")
    page = [f"# {title}", "", caption, "", *report.table(header, rows), "", "![accuracy by method](results.png)", ""]
    page += ["## Recipe", "", *report.table(("", ""), list(recipe.items()))]
    (out / "report.md").write_text("\n".join(page) + "\n")
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    done = sum(state == "already done" for state in results["runs"].values())
    console.print(
        f"{results['seconds']} s; {done} of {len(results['runs'])} runs were already done; report: {out / 'report.md'}",
        soft_wrap=True,
    )


def _plot(accuracies: dict[str, list[float]], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(accuracies))
    axis.bar(places, [np.mean(values) for values in accuracies.values()], 0.6, color="tab:blue", alpha=0.6)
    for place, values in zip(places, accuracies.values(), strict=True):
        axis.plot([place] * len(values), values, "k.", markersize=5)
    axis.set_xticks(places, list(accuracies), rotation=20, ha="right")
    axis.set(title=title, ylabel="test accuracy, % (dots: seeds)")
    axis.grid(axis="y", alpha=0.3)
    report.save_figure(figure, path)


if __name__ == "__main__":
    # The anchor is an argument of the compiled step, so each program is compiled once for all seeds.
    with tempfile.TemporaryDirectory() as programs:
        jax.config.update("jax_compilation_cache_dir", programs)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        try:
            main(tyro.cli(Experiment))
        except jt.InputError as error:
            print(f"finetune_cifar: error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
