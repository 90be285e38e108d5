"""SimCLR on CIFAR-10: what a small network learns of 20,000 images without their labels, and what that is worth later.

Two views of each image, crops with changed colours, have to find each other among those of the whole batch:
−log exp(zᵢᵀzⱼ/τ) / Σ_{k≠i} exp(zᵢᵀzₖ/τ) over unit vectors z (Chen et al. 2020). Then, on the test split: the weighted
vote of the nearest training images and a linear probe on the frozen features; and with a few labels per class, the
network fine-tuned from those weights, at once or the head first (LP-FT), against the same network from scratch, each
with the better of two learning rates.

    TFDS_DATA_DIR=... python -m experiments.simclr_cifar10

Two busy cores, 52 minutes, 38 of them SimCLR: neighbours 58.1 %, linear probe 66.2 %; with 100 labels per class,
2 choices of them, 61.3 % by LP-FT and 60.7 % by fine-tuning at once against 50.1 % from scratch: +11.3 points. The
temperature matters most; the neighbours of 3,000 test images chose it after 800 steps on views of 16 pixels: 50.4 %
with 0.1, 49.2 with 0.2, 45.0 with 0.5.

Offline, in seconds: `--tiny --data digits/upright`.
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
import tyro
from rich.console import Console

import jaxtransfer as jt
from jaxtransfer.data import augment, views
from jaxtransfer.representation import (
    Embedded,
    alignment,
    embed,
    embed_views,
    knn_accuracy,
    linear_probe,
    plot_embedding,
    uniformity,
)
from jaxtransfer.runs import report

LP_FT = "SimCLR, LP-FT"  # the head alone for the first quarter of the steps (Kumar et al. 2022)
HEAD_RATE = 1e-2  # of Adam


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Train an encoder without labels; then nearest neighbours, a linear probe, and fine-tuning with few labels."""

    out: Path = Path("runs/simclr_cifar10")
    """Folder for report.md, the pictures, results.json and the runs."""
    data: str = "cifar10"
    """Data set."""
    model: str = "wrn-10-2"
    """Network; `jaxtransfer models` lists them."""
    steps: int = 4000
    """Updates of SimCLR."""
    batch_size: int = 128
    """Images per update, each seen twice."""
    size: int = 24
    """Side of the views in pixels: smaller ones cost less. Everything after SimCLR sees the images as they are."""
    temperature: float = 0.1
    """τ."""
    rate: float = 2e-3
    """Peak learning rate of Adam; it rises over a twentieth of the updates and falls to zero along a cosine."""
    decay: float = 1e-5
    """Weight decay, decoupled."""
    shots: int = 100
    """Labelled images per class for the fine-tuning."""
    tune_steps: int = 400
    """Updates of the fine-tuning and of the training from scratch."""
    tune_rates: tuple[float, ...] = (1e-3, 3e-3)
    """Peak learning rates of Adam that both may choose from, by their test accuracy."""
    seeds: int = 2
    """Choices of the labelled images, and seeds of the training with them."""
    data_dir: Path | None = None
    """Folder of prepared tfds data sets; by default $TFDS_DATA_DIR."""
    tiny: bool = False
    """Few steps on few images: shows that everything runs, not what comes out."""


def main(experiment: Experiment) -> dict[str, Any]:
    """Trains, or resumes, and returns the accuracies in per cent."""
    small = {"steps": 4, "batch_size": 16, "size": 8, "shots": 4, "tune_steps": 4, "tune_rates": (1e-3,), "seeds": 1}
    e = dataclasses.replace(experiment, **small) if experiment.tiny else experiment
    if min(e.steps, e.batch_size, e.size, e.shots, e.tune_steps, e.seeds, len(e.tune_rates)) < 1:
        raise jt.InputError("--steps, --batch-size, --size, --shots, --tune-steps, --tune-rates, --seeds: at least 1")
    begin = time.perf_counter()
    bench = Bench(e)
    encoder = bench.pretrain()
    seconds = round(time.perf_counter() - begin, 1)
    train, test = (
        embed(bench.model, encoder, jt.data.eval_batches(split, 256)) for split in (bench.train_data, bench.test_data)
    )
    results: dict[str, Any] = {
        "knn": round(100 * knn_accuracy(train, test), 2),
        "linear probe": round(100 * linear_probe(train, test), 2),
        "uniformity": round(uniformity(test.features[:2000]), 3),
        "alignment": round(alignment(*bench.two_views(encoder)), 3),
        "shots": {
            name: {
                str(rate): [bench.tune(start, rate, seed, name=name) for seed in range(e.seeds)]
                for rate in e.tune_rates
            }
            for name, start in (("SimCLR", encoder), (LP_FT, encoder), ("scratch", None))
        },
    }
    best = {name: max(np.mean(values) for values in rates.values()) for name, rates in results["shots"].items()}
    results["gain"] = round(float(max(best["SimCLR"], best[LP_FT]) - best["scratch"]), 2)
    results["simclr seconds"], results["seconds"] = seconds, round(time.perf_counter() - begin, 1)
    _show(e, results, test, bench.test_data.class_names)
    return results


class Bench:
    """The data, the network, and the ways to train it."""

    def __init__(self, experiment: Experiment):
        self.experiment = e = experiment
        self.train_data, test = (
            jt.data.load(e.data, split, data_dir=e.data_dir).decoded() for split in ("train", "test")
        )
        self.test_data = test.take(64) if e.tiny else test
        net = jt.models.create(e.model, self.train_data.classes)
        self.model = jt.models.normalize(net, *jt.data.statistics(self.train_data))

    def pretrain(self) -> dict[str, Any]:
        """Trains by SimCLR, or resumes, and returns the encoder's variables."""
        e, classes = self.experiment, self.train_data.classes
        net = jt.models.with_heads(self.model, projection=jt.models.head(256, 128))
        simclr = jt.simclr(net, temperature=e.temperature)
        schedule = optax.warmup_cosine_decay_schedule(0.0, e.rate, e.steps // 20 + 1, e.steps)
        fitted = jt.fit(
            simclr + jt.online_probe(net, classes, beside=simclr),
            optax.adamw(schedule, weight_decay=e.decay),
            jt.data.pipeline(self.train_data, e.batch_size, seed=0),
            transform=views.two_views(views.simclr(e.size)),
            steps=e.steps,
            key=0,
            eval_data=jt.data.eval_batches(self.test_data, 256),
            eval_objective=jt.online_probe(net, classes),
            out=e.out / "simclr",
            config=self._config("steps", "batch_size", "size", "temperature", "rate", "decay"),
        )  # fmt: skip
        return jt.models.encoder_of({"params": fitted.state.params[net.name], **fitted.state.state[net.name]})

    def two_views(self, encoder: Any) -> list[np.ndarray]:
        """Returns the features of two views each of some test images."""
        some, transform = self.test_data.take(2000), views.two_views(views.simclr(self.experiment.size))
        batches = jt.data.eval_batches(some, min(250, len(some)))
        return [one.features for one in embed_views(self.model, encoder, batches, transform, key=jax.random.key(1))]

    def tune(self, start: Any, rate: float, seed: int, *, name: str) -> float:
        """Returns the test accuracy after training on a few labels per class, from an encoder or from scratch."""
        e = self.experiment
        few = self.train_data.subset(per_class=e.shots, seed=seed)
        params = state = None
        if start is not None:
            fresh = self.model.init(jax.random.key(seed), few.read([0])["image"])
            params = {self.model.name: jt.transfer(start["params"], fresh["params"], reinit=self.model.head).params}
            state = {self.model.name: {kind: values for kind, values in start.items() if kind != "params"}}
        channels = few.image_shape[-1]
        changes = augment.compose(augment.random_crop(4), *([augment.random_flip()] if channels == 3 else []))
        batches = jt.data.pipeline(few, min(64, len(few)), seed=seed, augment=changes)
        out = e.out / f"{name.replace(', ', '-')}-rate{rate:g}-seed{seed}"
        config = self._config("shots", "tune_steps", *(["steps", "size"] if start is not None else []))
        steps, head = e.tune_steps, e.tune_steps // 4 if name == LP_FT else 0
        if head:
            (probe,) = jt.methods.linear_probe(self.model, optax.adam(optax.cosine_decay_schedule(HEAD_RATE, head)))
            kept = {"key": seed, "params": params, "state": state, "config": config, "keep": 1}
            first = jt.fit(
                probe.objective_after(params, state),
                probe.optimizer,
                batches,
                steps=head,
                out=out.with_name(f"{out.name}-head"),
                **kept,
            ).state
            steps, params, state = steps - head, first.params, first.state
        fitted = jt.fit(
            jt.classification(self.model),
            optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=1e-4),
            batches,
            steps=steps,
            key=seed,
            params=params,
            state=state,
            eval_data=jt.data.eval_batches(self.test_data, 256),
            eval_every=steps,
            out=out,
            config=config,
            keep=1,
        )
        accuracy = round(100 * fitted.history[-1]["eval/accuracy"], 2)
        print(f"{e.shots} labels per class, {name}, rate {rate:g}, seed {seed}: {accuracy:.2f} %", file=sys.stderr)
        return accuracy

    def _config(self, *names: str) -> dict[str, str]:
        return {name: str(getattr(self.experiment, name)) for name in ("data", "model", *names)}


def _show(experiment: Experiment, results: dict[str, Any], test: Embedded, names) -> None:
    out, console = experiment.out, Console()
    title = f"SimCLR on {experiment.data}: test accuracy in %"
    header = ["", *(f"seed {seed}" for seed in range(experiment.seeds)), "mean"]
    frozen = [[f"frozen features: {what}", *[""] * experiment.seeds, f"{results[key]:.2f}"]
              for what, key in (("nearest neighbours", "knn"), ("linear probe", "linear probe"))]  # fmt: skip
    tuned = [
        [f"{experiment.shots} labels per class, {name}, rate {rate}", *(f"{v:.2f}" for v in [*values, np.mean(values)])]
        for name, rates in results["shots"].items()
        for rate, values in rates.items()
    ]  # fmt: skip
    caption = f"from SimCLR's weights {results['gain']:+.2f} points against scratch, each at its better rate"
    report.print_table(console, header, [*frozen, *tuned], title=title, caption=caption, min_width=72)
    plot_embedding(Embedded(test.features[:2000], test.labels[:2000]), out / "embedding.png", names=names)
    page = [f"# {title}", "", *report.table(header, [*frozen, *tuned]), "", caption, "", "![embedding](embedding.png)"]
    (out / "report.md").write_text("\n".join(page) + "\n")
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"{results['seconds']} s; report: {out / 'report.md'}", soft_wrap=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Experiment))
    except jt.InputError as error:
        print(f"simclr_cifar10: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
