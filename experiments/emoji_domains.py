"""Emoji of four vendors, one vendor left out: generalisation to a way of drawing that no training image shows.

1,599 emoji, each drawn by Twemoji, Noto, Fluent and OpenMoji (48×48 pixels, here brought to 24×24), in eight Unicode
groups. The same emoji are in all four domains: a model that has learned by heart that a certain emoji is food knows it
in a fourth hand, too, if it looks alike. So emoji are held out as well: a third of each group, drawn by the seed, are
test emoji, and no training image of any vendor shows them. Three accuracies of the last step are told, nothing is
chosen by any:

    new        test emoji of the vendor that is left out: an unseen domain and unseen things, what counts
    seen       training emoji of the vendor that is left out: an unseen domain, but the leak of leave-one-domain-out
    at home    test emoji of the three vendors of the training: unseen things of seen domains, a mark to reach for

The methods are those of `rotated_mnist`, all with the same network, steps, rate and batches. Two more adapt: `mcc`
and `dann` also see images, without labels, of the fourth vendor's training emoji; they are told apart by a star.

    TFDS_DATA_DIR=... nice python -m experiments.emoji_domains --out runs/emoji_domains

Measured, one seed, accuracy on new emoji of the vendor that is left out and the means, last weights, half a minute a
run (`--methods erm group_dro coral vrex mixstyle mcc`; irm, fishr and mldg were not run, dann with Twemoji left out
alone, 56.4):

                 Twemoji  Noto  Fluent  OpenMoji    new   seen  at home
    erm            54.1   54.3   52.8     38.9     50.0   55.0   62.7
    group_dro      52.1   52.8   52.3     37.4     48.6   53.9   62.4
    coral          53.4   54.7   50.2     37.2     48.9   54.9   62.3
    vrex           41.0   44.7   48.7     32.5     41.7   45.6   52.6
    mixstyle       52.8   52.1   51.9     34.4     47.8   52.2   58.7
    mcc *          51.5   53.6   54.5     39.7     49.8   55.1   61.6

No method is ahead of plain training here: of the thirteen points from home to a new vendor none is won back. There
were 16 filters before, as many as rotated digits then had: erm had 51.1 and 46.6 with Noto and Fluent left out.

The same command resumes what is unfinished, further methods and seeds add to what is there; report.md and the picture
are written anew after each run.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optax
from rich.console import Console

import jaxtransfer as jt
from experiments import rotated_mnist
from experiments.finetune_cifar100 import run
from experiments.rotated_mnist import Kit, Net
from jaxtransfer.data import augment
from jaxtransfer.errors import unknown
from jaxtransfer.runs import report

VENDORS = ("twemoji", "noto", "fluent", "openmoji")
CLASSES, SIDE = 8, 24
TARGET = "target"  # the entry of a batch with the images of the vendor left out, where a method adapts


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Learn groups of emoji from three vendors, test on the fourth, by several methods; writes a table and a plot."""

    out: Path = Path("runs/emoji_domains")
    """Folder for report.md, accuracy.png, results.json and one run directory per training."""
    methods: tuple[str, ...] = ("erm", "group_dro", "coral", "vrex", "irm", "fishr", "mldg", "mixstyle", "mcc", "dann")
    """Any of them, in the order in which they run."""
    vendors: tuple[str, ...] = VENDORS
    """The vendors to leave out, one training of each method for each."""
    epochs: float = 15.0
    """Passes over the training emoji."""
    batch_size: int = 16
    """Examples of each vendor per update."""
    rate: float = 2e-3
    """Peak learning rate of AdamW, falling to zero along a cosine."""
    decay: float = 1e-3
    """Weight decay."""
    width: int = 24
    """Filters of the first layer."""
    seeds: int = 1
    """Repetitions: each holds out other emoji, and has other weights and another order of batches."""
    data_dir: Path | None = None
    """Folder of prepared tfds data sets; by default $TFDS_DATA_DIR."""
    tiny: bool = False
    """Digits that come with scikit-learn under four shifts, two left out, two steps: shows that everything runs."""


def main(experiment: Experiment) -> dict[str, Any]:
    """Trains what is not trained yet; returns accuracies in per cent by method, vendor and seed."""
    if experiment.tiny:
        experiment = dataclasses.replace(experiment, vendors=experiment.vendors[:2], batch_size=4, width=4)
    for method in experiment.methods:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
    for vendor in experiment.vendors:
        if vendor not in VENDORS:
            raise unknown("vendor", vendor, VENDORS)
    for name in ("methods", "vendors"):
        if not getattr(experiment, name):
            raise jt.InputError(f"--{name} needs at least one value")
    for name in ("epochs", "batch_size", "rate", "width", "seeds"):
        if not getattr(experiment, name) > 0:
            raise jt.InputError(f"--{name.replace('_', '-')} must be positive; got {getattr(experiment, name)}")
    bench = Bench(experiment)
    for seed in range(experiment.seeds):
        for method in experiment.methods:
            for vendor in experiment.vendors:
                bench.train(method, vendor, seed)
                _write(bench.results, experiment)
    console, (header, rows) = Console(), table_of(bench.results)
    report.print_table(console, header, rows, title="Emoji, accuracy on the vendor left out, %", min_width=72)
    console.print(f"report: {experiment.out / 'report.md'}", soft_wrap=True)
    return bench.results


def _dann(kit: Kit) -> jt.Objective:
    """A discriminator between each source and the target; the features are to deceive all of them."""
    terms = [jt.adaptation.dann(kit.model, source=name, target=TARGET).named(f"dann_{name}") for name in kit.names]
    return kit.erm + rotated_mnist.mean_of(terms)


ADAPTING: dict[str, Callable[[Kit], jt.Objective]] = {
    "mcc": lambda kit: kit.erm + jt.adaptation.mcc(kit.model, target=TARGET),
    "dann": _dann,
}
METHODS = {**rotated_mnist.METHODS, **ADAPTING}
TOLD = {"new": "target_new", "seen": "target_seen", "at home": "home"}  # what is told, and the entry of a batch


class Bench:
    """The four vendors' emoji, and how a run is trained."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.results: dict[str, Any] = {"last": {}, "averaged": {}, "seconds": {}}
        self.emoji = {vendor: self._load(number) for number, vendor in enumerate(VENDORS)}

    def _load(self, number: int) -> jt.data.Dataset:
        """Returns a vendor's images with `label` and `emoji`, in memory, in the order of the emoji."""
        how: dict[str, Any] = {"data_dir": self.experiment.data_dir, "image_shape": (SIDE, SIDE, 3)}
        if self.experiment.tiny:
            name = ("digits/upright", "digits/rotated", "digits/inverted", "digits/noisy")[number]
            found = jt.data.load(name, "train", **how).decoded()
            few = found.select(np.flatnonzero(found.labels < CLASSES)[:60])
            return jt.data.Dataset.from_columns(image=few.column("image"), label=few.labels, emoji=np.arange(60))
        found = jt.data.load("emoji_domains", VENDORS[number], label=("label", "emoji"), **how).decoded()
        return found.select(np.argsort(found.column("emoji")))

    def held_out(self, seed: int) -> np.ndarray:
        """Returns which emoji are for the test: a third of each group, the same of all vendors."""
        first = self.emoji[VENDORS[0]]
        rng, held = np.random.default_rng(seed), np.zeros(len(first), bool)
        for group in range(CLASSES):
            own = rng.permutation(np.flatnonzero(first.labels == group))
            held[own[: round(len(own) / 3)]] = True
        return held

    def train(self, method: str, vendor: str, seed: int) -> None:
        """Trains one method with one vendor left out, or finds it done, and notes its accuracies."""
        experiment, begin = self.experiment, time.perf_counter()
        held = self.held_out(seed)
        names = tuple(name for name in VENDORS if name != vendor)
        known = {name: self.emoji[name].select(np.flatnonzero(~held)) for name in VENDORS}
        steps = 2 if experiment.tiny else max(1, round(experiment.epochs * np.sum(~held) / experiment.batch_size))
        net = jt.models.normalize(jt.models.linen(Net(experiment.width, CLASSES)), 0.5, 0.3)
        shown = jt.models.mixstyle(net, after=("stage1_norm", "stage2_norm")) if method == "mixstyle" else net
        objective = jt.together(METHODS[method](Kit(shown, names, steps, experiment.rate)))
        average = jt.adaptation.dense_average(shown, start=max(1, steps // 2))
        moves = augment.compose(augment.random_crop(2), augment.random_flip())

        def batches(name, number):
            return jt.data.pipeline(known[name], experiment.batch_size, seed=seed + 100 * number, augment=moves)

        parts = {name: batches(name, number) for number, name in enumerate(names)}
        if method in ADAPTING:
            parts[TARGET] = batches(vendor, len(names))  # no labels of it are read
        test = {name: self.emoji[name].select(np.flatnonzero(held)) for name in VENDORS}
        images, labels = (np.concatenate([test[name].column(c) for name in names]) for c in ("image", "label"))
        home = jt.data.Dataset.from_columns(image=images, label=labels)
        shown_to = {"target_new": test[vendor], "target_seen": known[vendor], "home": home}
        both = jt.classification(shown) + jt.classification(average).named("average")
        told = [both.on(entry) for entry in shown_to]
        fitted = jt.fit(
            objective + jt.averaged(average),
            optax.adamw(optax.cosine_decay_schedule(experiment.rate, steps), weight_decay=experiment.decay),
            jt.data.zipped(parts),
            steps=steps,
            key=seed,
            eval_data=jt.data.zipped({entry: jt.data.eval_batches(data, 512) for entry, data in shown_to.items()}),
            eval_objective=sum(told[1:], start=told[0]),
            eval_every=steps,
            save_every=max(1, steps // 2),
            log_every=max(1, steps // 10),
            keep=1,
            out=experiment.out / f"{method}-{vendor}-seed{seed}",
            config={
                "method": method,
                "left out": vendor,
                "epochs": experiment.epochs,
                "batch_size": experiment.batch_size,
                "rate": experiment.rate,
                "decay": experiment.decay,
                "width": experiment.width,
            },
            progress=False,
        )
        last = fitted.history[-1]
        for column, metric in (("last", "accuracy"), ("averaged", "average/accuracy")):
            by_vendor = self.results[column].setdefault(method, {}).setdefault(vendor, {})
            by_vendor[str(seed)] = {what: 100 * last[f"eval/{entry}/{metric}"] for what, entry in TOLD.items()}
        if fitted.timing:
            self.results["seconds"][f"{method}-{vendor}-seed{seed}"] = round(time.perf_counter() - begin)
        told = self.results["last"][method][vendor][str(seed)]
        shown = ", ".join(f"{what} {value:.1f}" for what, value in told.items())
        print(f"{method}, {vendor} left out, seed {seed}: {shown} %", file=sys.stderr, flush=True)


def table_of(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and rows: `new` by the vendor left out, its mean, and the means of `seen` and `at home`."""
    rows = []
    for method in results["last"]:
        for column in rotated_mnist.COLUMNS:
            by_vendor = results[column][method]

            def mean(vendors, what, by_vendor=by_vendor):
                values = [one[what] for vendor in vendors for one in by_vendor.get(vendor, {}).values()]
                return f"{np.mean(values):.1f}" if values else ""

            label = f"{method} *" if method in ADAPTING else method
            whole = VENDORS if all(vendor in by_vendor for vendor in VENDORS) else ()
            cells = [mean([vendor], "new") for vendor in VENDORS]
            cells += [mean(whole, what) for what in TOLD]
            rows.append([label if column == "last" else f"{label}, averaged", *cells])
    return ["method", *VENDORS, *(f"mean, {what}" for what in TOLD)], rows


def _write(results: dict[str, Any], experiment: Experiment) -> None:
    page = ["# Emoji, one vendor left out", "", "Accuracy on test emoji of the vendor left out, last step, %; then the"]
    page += ["means over vendors: of these, of its training emoji, and of the test emoji of the other vendors."]
    page += [f"{experiment.seeds} seed(s), {experiment.epochs:g} passes. * sees unlabelled images of that vendor."]
    page += ["", *report.table(*table_of(results)), "", "![accuracy by the vendor left out](accuracy.png)", ""]
    experiment.out.mkdir(parents=True, exist_ok=True)
    (experiment.out / "report.md").write_text("\n".join(page))
    settings = {name: str(value) for name, value in dataclasses.asdict(experiment).items()}
    (experiment.out / "results.json").write_text(json.dumps({**results, "settings": settings}, indent=1) + "\n")
    _plot(results, experiment.out / "accuracy.png")


def _plot(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis, methods = figure.subplots(), list(results["last"])
    width = 0.8 / len(VENDORS)
    for number, vendor in enumerate(VENDORS):
        found = [results["last"][method].get(vendor, {}).values() for method in methods]
        heights = [float(np.mean([one["new"] for one in values])) if values else 0.0 for values in found]
        axis.bar(np.arange(len(methods)) + (number - 1.5) * width, heights, width, label=vendor)
    axis.set_xticks(range(len(methods)), [f"{m} *" if m in ADAPTING else m for m in methods], rotation=30, ha="right")
    axis.set(ylabel="accuracy, %", title="test emoji of the vendor left out")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False, ncols=4, fontsize="small")
    report.save_figure(figure, path)


if __name__ == "__main__":
    run("emoji_domains", Experiment, main)
