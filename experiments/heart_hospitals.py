"""Heart disease in four hospitals: a perceptron learns one hospital's table and is tested on the three others.

The UCI table (Cleveland, Hungary, Switzerland, the VA of Long Beach: columns `domain`, 13 of what a physician notes,
`label` 0 or 1), empty fields and a cholesterol of 0 are missing values. Hospitals differ in three ways at once: in who
comes (46, 36, 93 and 74 % are ill), in what they are like, and in what was measured. Statistics and categories are the
source hospital's, a value that it always or never has is no feature; see `jt.data.from_frame`. The target's rows are
seen in training, without labels, and are those that are tested, as is usual for unsupervised adaptation. Weights of the
methods are plain (1, of `afn` 0.05) and were chosen by no label; `logistic` is scikit-learn's regression on the same
features of the source.

    python -m experiments.heart_hospitals --table heart_disease_4_hospitals.tsv --out runs/heart_hospitals

Measured, mean of 12 pairs ± standard deviation over 5 seeds, 29 minutes on two cores that many others used: source only
67.7 ± 0.6 % (logistic 69.0), afn 69.7 ± 1.5, mcc 69.4 ± 1.1, coral 66.4 ± 0.8, dann 63.8 ± 0.8, jan 57.6 ± 0.5 and dan
57.5 ± 0.4 %; areas under the ROC curve 75.5 (78.5), 78.2, 78.8, 75.3, 74.8, 76.5 and 76.5 %. Making the hospitals'
features alike does harm where the shares of the ill are so unlike: dan and jan rank patients no worse than source only,
and lose ten points of accuracy by the threshold. From Switzerland (8 healthy of 123) all but mcc, 74.3 %, are where
calling everybody ill is, 52 %.

The same command resumes what is unfinished, and more methods or seeds add to what is there. Offline, in seconds, on a
table that it draws: `--tiny`.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
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

NUMBERS = ("age", "trestbps", "chol", "thalach", "oldpeak")
CATEGORIES = ("sex", "cp", "fbs", "restecg", "exang", "slope", "ca", "thal")
A, VIEW = jt.adaptation, "features"

LOGISTIC, SOURCE_ONLY = "logistic", "source only"
METHODS: dict[str, Callable[[jt.Model], jt.Objective] | None] = {
    LOGISTIC: None,
    SOURCE_ONLY: None,
    "dan": lambda net: A.dan(net, view=VIEW),
    "jan": lambda net: A.jan(net, view=VIEW),
    "coral": lambda net: A.deep_coral(net, view=VIEW),
    "afn": lambda net: 0.05 * A.afn(net, view=VIEW),
    "dann": lambda net: A.dann(net, discriminator=A.discriminator(hidden=(32,)), view=VIEW),
    "mcc": lambda net: A.mcc(net, view=VIEW),
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Train on one hospital, test on three, with and without adaptation; writes a table."""

    table: Path | None = None
    """TSV with the columns domain, label and the 13 others."""
    out: Path = Path("runs/heart_hospitals")
    """Folder for report.md and results.json."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Any of logistic, source only, dan, jan, coral, afn, dann, mcc."""
    seeds: int = 5
    """Repetitions: other weights, another order."""
    steps: int = 400
    """Updates."""
    batch_size: int = 48
    """Rows of each hospital per update."""
    rate: float = 1e-3
    """Learning rate of AdamW."""
    decay: float = 1e-2
    """Its weight decay."""
    tiny: bool = False
    """A small table that is drawn, three steps: shows that everything runs."""


def main(experiment: Experiment) -> dict[str, Any]:
    """Trains what is not trained yet; returns accuracy and AUROC in per cent by method, pair and seed."""
    e = dataclasses.replace(experiment, steps=3, batch_size=8) if experiment.tiny else experiment
    for method in e.methods:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
    for name in ("seeds", "steps", "batch_size", "rate"):
        if not getattr(e, name) > 0:
            raise jt.InputError(f"--{name.replace('_', '-')} must be positive; got {getattr(e, name)}")
    frame = drawn() if e.tiny else read(e.table)
    results = earlier(e)
    for method in e.methods:
        for source in frame["domain"].unique():
            for pair, seed, accuracy, auroc in missing(e, method, source, frame, results.get(method, {})):
                results.setdefault(method, {}).setdefault(pair, {})[str(seed)] = [accuracy, auroc]
            _write(e, results)
        print(f"{method}: {_means(results[method], e)[0].mean():.1f} %", file=sys.stderr, flush=True)
    _show(e, results)
    return results


def read(path: Path | None) -> Any:
    """Returns the table as a frame; a cholesterol of 0, which nobody has, is missing."""
    import pandas

    if path is None or not path.is_file():
        raise jt.InputError(f"--table names the hospitals' TSV file; got {path}")
    frame = pandas.read_csv(path, sep="\t")
    if absent := sorted({"domain", "label", *NUMBERS, *CATEGORIES} - set(frame.columns)):
        raise jt.InputError(f"{path} has no column {absent[0]!r}; its columns: {', '.join(frame.columns)}")
    frame.loc[frame["chol"] == 0, "chol"] = np.nan
    return frame[["domain", "label", *NUMBERS, *CATEGORIES]]


def drawn() -> Any:
    """Returns a small table of two hospitals."""
    import pandas

    rng, rows = np.random.default_rng(0), 40
    label = rng.integers(0, 2, rows)
    columns = {name: rng.normal(size=rows) + label for name in NUMBERS}
    columns |= {name: np.float64(rng.integers(0, 3, rows)) for name in CATEGORIES}
    return pandas.DataFrame({"domain": np.repeat(["north", "south"], rows // 2), "label": label, **columns})


def missing(experiment: Experiment, method: str, source: str, frame: Any, known: dict[str, Any]):
    """Yields (pair, seed, accuracy, AUROC) of the runs from one hospital that are not known yet.

    A program is compiled once for all targets and seeds.
    """
    e = experiment
    parts = dict(list(frame.groupby("domain", sort=False)))
    options = {"label": "label", "categorical": CATEGORIES, "drop": ("domain",)}
    labelled = jt.data.from_frame(parts[source], **options, name=source)
    seeds = range(1 if method == LOGISTIC else e.seeds)  # a regression is the same for every seed
    kit = None
    for target, own in parts.items():
        pair = f"{source} → {target}"
        todo = [seed for seed in seeds if str(seed) not in known.get(pair, {})]
        if target == source or not todo:
            continue
        test = jt.data.from_frame(own, like=labelled, name=target)
        kit = kit or prepared(e, method)
        for seed in todo:
            scores = regression(labelled, test) if method == LOGISTIC else trained(e, kit, labelled, test, seed)
            accuracy = float(np.mean((scores > 0) == test.labels))
            yield pair, seed, 100 * accuracy, 100 * jt.measures.auroc(scores, test.labels)


def regression(labelled: jt.data.Dataset, test: jt.data.Dataset) -> np.ndarray:
    """Returns the scores of a logistic regression, above 0 for ill."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=1000).fit(labelled.column("features"), labelled.labels)
    return fitted.decision_function(test.column("features"))


def prepared(experiment: Experiment, method: str):
    """Returns the objective, its optimiser, the compiled step and the compiled network."""
    e, term = experiment, METHODS[method]
    net = jt.models.mlp(2, hidden=(64, 32))
    objective = jt.classification(net, view=VIEW).on("source")
    if term is not None:
        objective = jt.together(objective + term(net))
    optimizer = optax.adamw(optax.cosine_decay_schedule(e.rate, e.steps), weight_decay=e.decay)

    @jax.jit
    def predict(variables, features):
        logits = net.apply(variables, features, train=False, key=None)[0]["logits"]
        return logits[:, 1] - logits[:, 0]

    return objective, optimizer, jt.train_step(objective, optimizer), predict


def trained(experiment: Experiment, kit, labelled: jt.data.Dataset, test: jt.data.Dataset, seed: int) -> np.ndarray:
    """Returns the scores that one run gives the target's rows, above 0 for ill."""
    objective, optimizer, step, predict = kit
    sizes = {"source": labelled, "target": test}
    data = jt.data.zipped(
        {name: jt.data.pipeline(one, experiment.batch_size, seed=seed, threads=0) for name, one in sizes.items()}
    )
    state = jt.init(objective, optimizer, jax.random.key(seed), data.batch(0))
    for number in range(experiment.steps):
        state, _ = step(state, data.batch(number))
    return np.asarray(predict({"params": state.params["model"], **state.state["model"]}, test.column("features")))


def earlier(experiment: Experiment) -> dict[str, Any]:
    """Returns what was measured before with the same settings."""
    path = experiment.out / "results.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if found["settings"] != _settings(experiment):
        raise jt.InputError(f"{path} was made with other settings, {found['settings']}; choose another --out")
    return found["results"]


def _settings(experiment: Experiment) -> dict[str, Any]:
    return {name: getattr(experiment, name) for name in ("steps", "batch_size", "rate", "decay", "tiny")}


def _write(experiment: Experiment, results: dict[str, Any]) -> None:
    experiment.out.mkdir(parents=True, exist_ok=True)
    path = experiment.out / "results.json"
    told = {"settings": _settings(experiment), "results": results}
    path.with_suffix(".tmp").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    path.with_suffix(".tmp").replace(path)


def _means(by_pair: dict[str, Any], experiment: Experiment) -> np.ndarray:
    """Returns [accuracy or AUROC, seed]: means over the pairs."""
    values = [[one for seed, one in by_seed.items() if int(seed) < experiment.seeds] for by_seed in by_pair.values()]
    return np.array(values).mean(axis=0).T


def _show(experiment: Experiment, results: dict[str, Any]) -> None:
    e, console = experiment, Console()
    sources = list(dict.fromkeys(pair.split(" → ")[0] for pair in next(iter(results.values()))))
    header = ["method", *(f"from {source}" for source in sources), "accuracy", "worst seed", "AUROC"]
    rows = []
    for method in (name for name in METHODS if name in results and name in e.methods):
        own = [
            _means({pair: one for pair, one in results[method].items() if pair.startswith(f"{source} →")}, e)[0].mean()
            for source in sources
        ]
        accuracy, auroc = _means(results[method], e)
        spread = "" if len(accuracy) < 2 else f" ± {accuracy.std(ddof=1):.1f}"
        shown = [f"{value:.1f}" for value in own]
        rows.append([method, *shown, f"{accuracy.mean():.1f}{spread}", f"{accuracy.min():.1f}", f"{auroc.mean():.1f}"])
    title = "heart disease, learned in one hospital and tested in the others, per cent"
    report.print_table(console, header, rows, title=title, min_width=72)
    by_pair = []
    for pair in next(iter(results.values())):
        cells = [f"{np.mean([one[0] for one in results[row[0]][pair].values()]):.1f}" for row in rows]
        by_pair.append([pair, *cells])
    page = [f"# {title}", "", *report.table(header, rows), ""]
    page += ["Accuracy by pair:", "", *report.table(["pair", *(row[0] for row in rows)], by_pair)]
    (e.out / "report.md").write_text("\n".join(page) + "\n")
    console.print(f"report: {e.out / 'report.md'}", soft_wrap=True)


if __name__ == "__main__":
    begin = time.perf_counter()
    run("heart_hospitals", Experiment, main)
    print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr)
