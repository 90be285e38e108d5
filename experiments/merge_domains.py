"""Four experts, each fine-tuned on one domain of digits from one base, merged into one network for all four.

The base learns upright digits; an expert goes on from it on one of the four domains (upright, rotated, inverted,
noisy); the joint net goes on from it on all of them together. Then `jt.fusion` merges the experts' weights, and each
network is tested on the test images of every domain: what counts is the mean of the four accuracies. A merged net is
shown twice, with the mean of the experts' batch statistics and with its own (`jt.fusion.renewed`, on training images of
all domains without their labels).

A tenth of the training images is held out of every training. Its labels choose the scale of task arithmetic, TIES and
DARE and, for `learned`, fit the coefficients that AdaMerging learns without labels: w₀ + Σᵢ λᵢ (wᵢ − w₀), a λ for each
leaf and expert. No label of a test image chooses anything.

    python -m experiments.merge_domains

Measured with one seed, 300 updates of each net, test accuracy in %:

                           upright  rotated  inverted  noisy    mean    not renewed
    base                      98.2      6.5      24.3   64.3    48.3
    each expert at home       99.2     98.5      98.3   86.1    95.5
    joint                     97.3     96.0      95.8   80.7    92.4
    uniform average           95.1     17.8      26.8   60.2    50.0    47.1
    task arithmetic, 0.3      94.6     22.3      27.5   56.7    50.3    47.8
    learned                   93.5     75.8      24.8   55.5    62.4    61.8
    learned++                 94.1     44.5      25.0   55.9    54.9    54.6

So statistics of its own are worth 3 points to the average, coefficients that 480 held-out labels fit 12 points more; no
merged net is near the joint one: inverted digits, whose expert moved farthest, are learned by none. With trained nets
at hand the last two and the average took 247 s on two cores that twenty others shared. The other rows of `METHODS` were
not measured.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

import jaxtransfer as jt
from experiments.finetune_cifar100 import run
from jaxtransfer.errors import unknown
from jaxtransfer.runs import report

DOMAINS = ("digits/upright", "digits/rotated", "digits/inverted", "digits/noisy")
SCALES = (0.3, 0.5, 0.7)  # among which held-out labels choose
HELD_OUT = 0.1


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Merge experts of several domains into one network; writes a table and a picture."""

    out: Path = Path("runs/merge_domains")
    """Folder for report.md, results.json, accuracy.png and one run directory per training."""
    domains: tuple[str, ...] = DOMAINS
    """Data sets of the same classes and images; the base learns the first one."""
    methods: tuple[str, ...] = ()
    """Any of them, in the order in which they run; all by default."""
    base_steps: int = 300
    """Updates of the base."""
    steps: int = 300
    """Updates of each expert; the joint net has as many as all experts together."""
    merge_steps: int = 120
    """Updates of merging coefficients."""
    batch_size: int = 64
    """Examples per update."""
    rate: float = 1e-3
    """Peak learning rate of Adam, falling to zero along a cosine."""
    merge_rate: float = 0.02
    """Learning rate of merging coefficients that labels fit."""
    width: int = 16
    """Filters of the first layer."""
    seed: int = 0
    """Of weights, batches and what is held out."""
    data_dir: Path | None = None
    """Folder of prepared tfds data sets; by default $TFDS_DATA_DIR."""
    tiny: bool = False
    """Two domains, few filters and updates: shows that everything runs."""


def main(experiment: Experiment) -> dict[str, Any]:
    """Trains what is not trained yet, merges, and returns accuracies in per cent by network and domain."""
    if experiment.tiny:
        few = {"base_steps": 2, "steps": 2, "merge_steps": 2, "width": 2, "batch_size": 8}
        experiment = dataclasses.replace(experiment, domains=experiment.domains[:2], **few)
    methods = experiment.methods or tuple(METHODS)
    for method in methods:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
    if len(set(experiment.domains)) < 2 or len(set(experiment.domains)) < len(experiment.domains):
        raise jt.InputError(f"--domains are two or more, each once; got {' '.join(experiment.domains)}")
    for name in ("base_steps", "steps", "merge_steps", "batch_size", "rate", "merge_rate", "width"):
        if not getattr(experiment, name) > 0:
            raise jt.InputError(f"--{name.replace('_', '-')} must be positive; got {getattr(experiment, name)}")
    begin = time.perf_counter()
    bench = Bench(experiment)
    results = bench.trained()
    for method in methods:
        results |= bench.merged(method)
        _write(results, experiment)
    console, (header, rows) = Console(), table_of(results)
    report.print_table(console, header, rows, title="Test accuracy by domain, %", min_width=72)
    console.print(f"{time.perf_counter() - begin:.0f} s; report: {experiment.out / 'report.md'}", soft_wrap=True)
    return results


class Bench:
    """The domains, the networks trained on them, and how they are merged."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        load = functools.partial(jt.data.load, data_dir=experiment.data_dir)
        pairs = {n: jt.data.hold_out(load(n, "train"), HELD_OUT, seed=experiment.seed) for n in experiment.domains}
        self.train = {name: pair[0] for name, pair in pairs.items()}
        self.held = {name: pair[1] for name, pair in pairs.items()}
        self.test = {name: load(name, "test") for name in experiment.domains}
        first = self.train[experiment.domains[0]]
        net = jt.models.small_cnn(first.classes, width=experiment.width)
        self.model = jt.models.normalize(net, *jt.data.statistics(first))
        self.objective = jt.classification(self.model)
        self._evaluate = jt.eval_step(self.objective)
        size = min(256, *(len(one) for one in (*self.test.values(), *self.held.values())))
        self._tests = {name: jt.data.eval_batches(one, size) for name, one in self.test.items()}
        self._helds = {name: jt.data.eval_batches(one, size) for name, one in self.held.items()}
        self.base: Any = None
        self.experts: list[Any] = []

    def trained(self) -> dict[str, Any]:
        """Trains the base, the experts and the joint net, or finds them done; returns their accuracies."""
        e = self.experiment
        self.base = self._fit("base", [self.train[e.domains[0]]], e.base_steps, None)
        self.experts = [self._fit(_short(name), [self.train[name]], e.steps, self.base) for name in e.domains]
        joint = self._fit("joint", list(self.train.values()), e.steps * len(e.domains), self.base)
        own = [self.accuracies(expert)[name] for expert, name in zip(self.experts, e.domains, strict=True)]
        named = zip(e.domains, self.experts, strict=True)
        return {
            "base": self.accuracies(self.base),
            **{f"expert of {_short(name)}": self.accuracies(expert) for name, expert in named},
            "each expert at home": {**dict(zip(e.domains, own, strict=True)), "mean": float(np.mean(own))},
            "joint": self.accuracies(joint),
        }

    def merged(self, method: str) -> dict[str, Any]:
        """Merges by a method; returns its accuracies with the mean of the statistics, and with its own."""
        variables, told = METHODS[method](self)
        found = {f"{method}{told}": self.accuracies(self.renewed(variables))}
        found[f"{method}{told}"]["not renewed"] = self.accuracies(variables)["mean"]
        print(f"{method}{told}: {found[f'{method}{told}']['mean']:.1f} %", file=sys.stderr, flush=True)
        return found

    def renewed(self, variables: Any) -> Any:
        """Returns variables with batch statistics of their own, of training images of all domains."""
        images = np.concatenate([one.column("image") for one in self.train.values()])
        order = np.random.default_rng(self.experiment.seed).permutation(len(images))
        batches = [{"image": images[rows]} for rows in np.array_split(order, max(1, len(order) // 400))]
        return jt.fusion.renewed(self.model, variables, batches)

    def accuracies(self, variables: Any) -> dict[str, float]:
        """Returns the test accuracy in each domain, and their mean."""
        found = {name: self._accuracy(variables, batches) for name, batches in self._tests.items()}
        return {**found, "mean": float(np.mean(list(found.values())))}

    def chosen(self, merge: Callable[[float], Any]) -> tuple[Any, str]:
        """Returns the merged net of the scale that is best on held-out images, and which one it is."""
        merged = {scale: merge(scale) for scale in SCALES}
        scores = {
            scale: np.mean([self._accuracy(self.renewed(one), batches) for batches in self._helds.values()])
            for scale, one in merged.items()
        }
        best = max(SCALES, key=lambda scale: (scores[scale], -scale))
        return merged[best], f", scale {best:g}"

    def adapted(self, term: Callable[[jt.Model], jt.Objective], experts: Sequence[Any], data: Any, rate: float) -> Any:
        """Returns the net whose merging coefficients a term learns over all domains together."""
        e = self.experiment
        merger = jt.fusion.merger(self.model, self.base, experts, start=0.3)
        keys = {name: f"domain{number}" for number, name in enumerate(e.domains)}
        terms = [term(merger.model).on(key) for key in keys.values()]
        rows = max(2, e.batch_size // 2)
        streams = {key: jt.data.pipeline(data[name], rows, seed=e.seed) for name, key in keys.items()}
        fitted = jt.fit(
            jt.together(sum(terms[1:], start=terms[0])),
            optax.adam(rate),
            jt.data.zipped(streams),
            steps=e.merge_steps,
            key=e.seed,
            progress=False,
        )
        return jax.device_get(merger.variables(fitted.state))

    @property
    def unlabelled(self) -> dict[str, jt.data.Dataset]:
        """The training images of each domain."""
        return {name: one.without("label") for name, one in self.train.items()}

    def _accuracy(self, variables: Any, batches: Any) -> float:
        state = {kind: value for kind, value in variables.items() if kind != "params"}
        state = jt.TrainState.of({self.model.name: variables["params"]}, {self.model.name: state})
        return 100 * float(self._evaluate(state, batches)["accuracy"])

    def _fit(self, name: str, sets: Sequence[jt.data.Dataset], steps: int, start: Any) -> Any:
        """Returns the variables of a network after training, or of one that was trained before."""
        e, model = self.experiment, self.model.name
        data = sets[0]
        if len(sets) > 1:
            images, labels = (np.concatenate([one.column(c) for one in sets]) for c in ("image", "label"))
            data = jt.data.Dataset.from_columns(image=images, label=labels)
        begin = {}
        if start is not None:
            state = {kind: value for kind, value in start.items() if kind != "params"}
            begin = {"params": {model: start["params"]}, "state": {model: state}}
        fitted = jt.fit(
            self.objective,
            optax.adam(optax.cosine_decay_schedule(e.rate, steps)),
            jt.data.pipeline(data, e.batch_size, seed=e.seed),
            steps=steps,
            key=e.seed,
            keep=1,
            out=e.out / name,
            config={"domains": list(e.domains), "rate": e.rate, "width": e.width, "batch_size": e.batch_size},
            progress=False,
            **begin,
        )
        return jax.device_get({"params": fitted.state.params[model], **fitted.state.state[model]})


def _fisher(bench: Bench) -> tuple[Any, str]:
    """The experts' Fisher information, each on training images of its own domain."""
    found, name = [], bench.model.name
    for domain, expert in zip(bench.experiment.domains, bench.experts, strict=True):
        state = {kind: value for kind, value in expert.items() if kind != "params"}
        batches = jt.data.eval_batches(bench.train[domain], min(200, len(bench.train[domain])))
        own = jt.fisher_diagonal(bench.objective, {name: expert["params"]}, {name: state}, batches)
        found.append(own[name])
    return jt.fusion.fisher(bench.experts, found), ""


def _regmean(bench: Bench) -> tuple[Any, str]:
    """Gram matrices of what every linear layer of an expert sees of its own domain."""
    seen = jt.models.linear_inputs(bench.model)
    layers = {f"{layer}/kernel": f"{layer}/kernel" for layer in ("stem_conv", "stage1_conv", "stage2_conv", "head")}
    grams = [
        jt.fusion.gram_matrices(seen, expert, jt.data.eval_batches(data, min(200, len(data))), layers)
        for expert, data in zip(bench.experts, bench.train.values(), strict=True)
    ]
    return jt.fusion.regmean(bench.experts, grams), ""


def _agreeing(bench: Bench) -> list[Any]:
    return jt.fusion.agreeing(bench.base, bench.experts)


METHODS: dict[str, Callable[[Bench], tuple[Any, str]]] = {
    "uniform average": lambda b: (jt.fusion.average(b.experts), ""),
    "task arithmetic": lambda b: b.chosen(lambda s: jt.fusion.task_arithmetic(b.base, b.experts, scale=s)),
    "ties": lambda b: b.chosen(lambda s: jt.fusion.ties(b.base, b.experts, scale=s)),
    "dare": lambda b: b.chosen(lambda s: jt.fusion.dare(b.base, b.experts, key=b.experiment.seed, scale=s)),
    "model stock": lambda b: (jt.fusion.model_stock(b.base, b.experts), ""),
    "fisher": _fisher,
    "regmean": _regmean,
    "ada_merging": lambda b: (b.adapted(jt.fusion.ada_merging, b.experts, b.unlabelled, 1e-3), ""),
    "ada_merging++": lambda b: (b.adapted(jt.fusion.ada_merging, _agreeing(b), b.unlabelled, 1e-3), ""),
    "learned": lambda b: (b.adapted(jt.classification, b.experts, b.held, b.experiment.merge_rate), ""),
    "learned++": lambda b: (b.adapted(jt.classification, _agreeing(b), b.held, b.experiment.merge_rate), ""),
}


def table_of(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows: the accuracy of each network in each domain."""
    domains = [name for name in next(iter(results.values())) if name != "mean"]
    columns = [*domains, "mean", "not renewed"]
    rows = [[name, *(f"{own[c]:.1f}" if c in own else "" for c in columns)] for name, own in results.items()]
    return ["network", *(_short(name) for name in domains), "mean", "mean, statistics not renewed"], rows


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _write(results: dict[str, Any], experiment: Experiment) -> None:
    page = ["# Experts of several domains, merged into one network", "", "Accuracy on test images by domain, %.", ""]
    page += [*report.table(*table_of(results)), "", "![mean accuracy](accuracy.png)", ""]
    experiment.out.mkdir(parents=True, exist_ok=True)
    (experiment.out / "report.md").write_text("\n".join(page))
    settings = {name: str(value) for name, value in dataclasses.asdict(experiment).items()}
    (experiment.out / "results.json").write_text(
        json.dumps({"results": results, "settings": settings}, indent=1) + "\n"
    )
    _plot(results, experiment.out / "accuracy.png")


def _plot(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.3 * len(results) + 1.2), layout="constrained")
    axis, names = figure.subplots(), list(results)[::-1]
    axis.barh(names, [results[name]["mean"] for name in names], color="tab:blue", label="statistics of its own")
    known = [name for name in names if "not renewed" in results[name]]
    axis.plot([results[n]["not renewed"] for n in known], known, "k|", markersize=12, label="mean of the experts'")
    axis.set(xlabel="accuracy, mean over domains, %")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(frameon=False, fontsize="small")
    report.save_figure(figure, path)


if __name__ == "__main__":
    run("merge_domains", Experiment, main)
