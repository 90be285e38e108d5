"""Two towers for two domains: find the handwritten digits of one data set by those of another.

φ sees MNIST (28×28), ψ sees USPS (16×16); pairs share nothing but their label. InfoNCE over the batch draws the towers
together: −log exp(φ(x)ᵀψ(y)/τ) / Σ_z exp(φ(x)ᵀψ(z)/τ), both directions, τ learned. Other pairs of the same digit stand
among the negatives and bound how small the loss can get; they don't keep the digits from gathering. Afterwards every
image of one test split asks for its nearest neighbours among those of the other, which no training saw: recall@k is how
often a digit of the same kind is among the first k.

    TFDS_DATA_DIR=... python -m experiments.cross_domain_retrieval

Two cores, 98 s: MNIST asks USPS with recall@1 of 95.33 %, USPS asks MNIST with 95.67 % (recall@10 98.73 and 98.41 %),
10,000 and 2,007 test images.

Offline, in seconds: `--tiny --first digits/upright --second digits/noisy`.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console

import jaxtransfer as jt
from jaxtransfer.representation import Embedded, alignment, embed, plot_embedding, recall_at_k
from jaxtransfer.runs import report


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Train two towers on pairs by label and retrieve one domain's test images by the other's."""

    out: Path = Path("runs/cross_domain_retrieval")
    """Folder for report.md, embedding.png, results.json and the run."""
    first: str = "mnist"
    """Data set of φ."""
    second: str = "usps"
    """Data set of ψ, with the same classes."""
    steps: int = 600
    """Updates."""
    batch_size: int = 128
    """Pairs per update."""
    dimension: int = 32
    """Of the embeddings."""
    rate: float = 2e-3
    """Peak learning rate of Adam; it falls to zero along a cosine."""
    seed: int = 0
    """Of weights and pairs."""
    data_dir: Path | None = None
    """Folder of prepared tfds data sets; by default $TFDS_DATA_DIR."""
    tiny: bool = False
    """Few steps on few images: shows that everything runs, not what comes out."""


def main(experiment: Experiment) -> dict[str, Any]:
    """Trains, or resumes, and returns recall@k in both directions, in per cent."""
    e = dataclasses.replace(experiment, steps=4, batch_size=16) if experiment.tiny else experiment
    if min(e.steps, e.batch_size, e.dimension) < 1:
        raise jt.InputError("--steps, --batch-size and --dimension must be at least 1")
    begin = time.perf_counter()
    sets = {name: [jt.data.load(name, split, data_dir=e.data_dir) for split in ("train", "test")]
            for name in (e.first, e.second)}  # fmt: skip
    train, test = (
        [(pair[k].take(64) if e.tiny and k else pair[k]).decoded() for pair in sets.values()] for k in (0, 1)
    )
    if train[0].classes != train[1].classes:
        raise jt.InputError(
            f"{e.first} has {train[0].classes} classes, {e.second} {train[1].classes}; expected the same"
        )
    towers = [tower(name, data, e.dimension) for name, data in zip(("phi", "psi"), train, strict=True)]
    objective = jt.info_nce(*towers, learn_temperature=True, temperature=0.1, views=("first", "second"))
    fitted = jt.fit(
        objective,
        optax.adam(optax.cosine_decay_schedule(e.rate, e.steps)),
        {name: by_class(data) for name, data in zip(("first", "second"), train, strict=True)},
        sample=lambda key, data: pairs(key, data, e.batch_size),
        steps=e.steps,
        key=e.seed,
        out=e.out / "run",
        config={k: str(v) for k, v in dataclasses.asdict(e).items() if k not in ("out", "data_dir")},
    )
    found = [embed(model, variables_of(fitted, model), jt.data.eval_batches(data, 256), tap="projection")
             for model, data in zip(towers, test, strict=True)]  # fmt: skip
    results = {**measured(e, found), "seconds": round(time.perf_counter() - begin, 1)}
    _show(e, results, found, test[0].class_names)
    return results


def tower(name: str, data: jt.data.Dataset, dimension: int) -> jt.Model:
    """Returns an encoder of one domain's images with a projection to the common space."""
    net = jt.models.normalize(jt.models.small_cnn(data.classes, name=name), *jt.data.statistics(data))
    return jt.models.with_heads(net, projection=jt.models.head(128, dimension))


def by_class(data: jt.data.Dataset) -> dict[str, np.ndarray]:
    """Returns the images in the order of their classes, where each class begins, and how many it has."""
    order = np.argsort(data.labels, kind="stable")
    count = np.bincount(data.labels, minlength=data.classes)
    return {"image": data.read(order)["image"], "start": np.cumsum(count) - count, "count": count}


def pairs(key: jax.Array, data: dict[str, Any], size: int) -> dict[str, jax.Array]:
    """Draws images of both domains, row by row of the same class; every class is as likely as another."""
    keys = jax.random.split(key, 3)
    label = jax.random.randint(keys[0], (size,), 0, data["first"]["count"].shape[0])

    def draw(key, domain):
        place = jax.random.uniform(key, (size,)) * domain["count"][label]
        return domain["image"][domain["start"][label] + jnp.minimum(place.astype(int), domain["count"][label] - 1)]

    return {name: draw(k, data[name]) for name, k in zip(("first", "second"), keys[1:], strict=True)} | {"label": label}


def variables_of(fitted: jt.Fitted, model: jt.Model) -> dict[str, Any]:
    """Returns what a tower was trained to."""
    return {"params": fitted.state.params[model.name], **fitted.state.state[model.name]}


def measured(experiment: Experiment, found: list[Embedded]) -> dict[str, Any]:
    """Returns recall@k, in per cent, of each domain asking the other, and how far pairs of a class are apart."""
    names, recalls = (experiment.first, experiment.second), {}
    for ask, answer in ((0, 1), (1, 0)):
        relevant = found[ask].labels[:, None] == found[answer].labels[None]
        recall = recall_at_k(found[ask].features, found[answer].features, relevant, ks=(1, 5, 10))
        recalls[f"{names[ask]} → {names[answer]}"] = {k: round(100 * value, 2) for k, value in recall.items()}
    shared = [c for c in np.unique(found[0].labels) if np.any(found[1].labels == c)]
    means = [np.stack([one.features[one.labels == c].mean(0) for c in shared]) for one in found]
    return {"recall": recalls, "alignment of the classes' means": round(alignment(*means), 4)}


def _show(experiment: Experiment, results: dict[str, Any], found: list[Embedded], names) -> None:
    out, console = experiment.out, Console()
    title = f"retrieval between {experiment.first} and {experiment.second}, test images"
    header = ["query → gallery", "recall@1", "recall@5", "recall@10"]
    rows = [[way, *(f"{value:.2f} %" for value in recall.values())] for way, recall in results["recall"].items()]
    report.print_table(console, header, rows, title=title, min_width=72)
    some = [np.linspace(0, len(one.labels) - 1, min(1000, len(one.labels))).astype(int) for one in found]
    both = Embedded(*(np.concatenate([getattr(one, part)[rows] for one, rows in zip(found, some, strict=True)])
                      for part in ("features", "labels")))  # fmt: skip
    plot_embedding(both, out / "embedding.png", names=names)
    page = [f"# {title}", "", *report.table(header, rows), "", "![both domains in one plane](embedding.png)"]
    (out / "report.md").write_text("\n".join(page) + "\n")
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"{results['seconds']} s; report: {out / 'report.md'}", soft_wrap=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Experiment))
    except jt.InputError as error:
        print(f"cross_domain_retrieval: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
