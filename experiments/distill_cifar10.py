"""From ResNet-56 to ResNet-20 on CIFAR-10: does a teacher help a student of a third of its size?

The same student is trained twice, the same number of steps on the same batches from the same first weights: on the
labels alone, and under (1 − α) · cross-entropy + α · T² KL(teacher ‖ student) + γ · hints, the squared differences of
their inner maps, which have the same shapes in this family. The teacher sees the student's crops and flips. It is
either trained here on the same images (`--teacher-steps`) or read from PyTorch weights (`--teacher-weights`, which
needs PyTorch). Accuracy is that of the last step on the whole test split. Every run lies in its own folder under
`--out`: the same command resumes whatever is unfinished.

    TFDS_DATA_DIR=... python -m experiments.distill_cifar10 --teacher-weights .../resnet56-4bfd9763.th

Two cores that other jobs used too, 59 minutes: the teacher's published weights have 93.39 %; the student, on the first
20,000 training images after 1,500 steps of 64, mean of three seeds (and each):

    labels alone      72.61 %  (72.06, 72.23, 73.54)
    with the teacher  80.40 %  (80.11, 79.69, 81.41)

Most of that comes from the maps in so short a training: with `--hint 0 --steps 2000` one seed went from 76.48 to
77.91 %, and after 600 steps class probabilities alone helped not at all (58.7 and 58.6 %, with the maps 65.9 %). The
temperature, α and γ were not tuned beyond that.
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
from jaxtransfer.data import augment
from jaxtransfer.devices import device_mesh
from jaxtransfer.errors import unknown
from jaxtransfer.runs import report

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Train a student with and without a teacher; writes a table and the curves."""

    out: Path = Path("runs/distill_cifar10")
    """Folder for report.md, curves.png, results.json and one run directory per training."""
    data: str = "cifar10"
    """Data set."""
    student: str = "resnet20"
    """Student; `jaxtransfer models` lists networks."""
    teacher: str = "resnet56"
    """Teacher, likewise."""
    teacher_weights: Path | None = None
    """PyTorch weights of the teacher (a CIFAR ResNet); without them it is trained here."""
    teacher_steps: int = 5000
    """Updates of a teacher that is trained here."""
    steps: int = 1500
    """Updates of the student, with and without the teacher."""
    batch_size: int = 64
    """Examples per update."""
    rate: float = 0.1
    """Peak learning rate of SGD with Nesterov momentum 0.9: a linear rise over a tenth of the steps, then a cosine."""
    decay: float = 5e-4
    """Weight decay."""
    temperature: float = 4.0
    """T of the distillation."""
    alpha: float = 0.9
    """Weight of the class probabilities; the labels have the rest."""
    hint: float = 3.0
    """Weight of the maps; 0 compares class probabilities alone."""
    taps: tuple[str, ...] = ("stage2", "stage3", "features")
    """The outputs whose squared differences are hints; of one shape in both networks."""
    seeds: int = 3
    """Repetitions: first weights, order of the examples, crops and flips."""
    data_dir: Path | None = None
    """Folder of prepared tfds data sets; by default $TFDS_DATA_DIR."""
    tiny: bool = False
    """Small nets and few steps: shows that everything runs, not what comes out."""


def main(experiment: Experiment) -> dict[str, Any]:
    """Trains what is not trained yet and returns the accuracies, in per cent."""
    if experiment.tiny:
        nets = {"student": "small-cnn", "teacher": "small-cnn"}
        experiment = dataclasses.replace(
            experiment, **nets, taps=("features",), steps=6, teacher_steps=10, batch_size=16
        )
    for name in (experiment.student, experiment.teacher):
        if name not in jt.models.ZOO:
            raise unknown("model", name, jt.models.ZOO)
    if experiment.seeds < 1:
        raise jt.InputError(f"--seeds must be at least 1; got {experiment.seeds}")
    begin, bench = time.perf_counter(), Bench(experiment)
    teacher_accuracy = bench.accuracy_of_teacher()
    accuracies: dict[str, list[float]] = {"labels alone": [], "with the teacher": []}
    for seed in range(experiment.seeds):
        accuracies["labels alone"].append(bench.train(seed, taught=False))
        accuracies["with the teacher"].append(bench.train(seed, taught=True))
    gains = np.subtract(accuracies["with the teacher"], accuracies["labels alone"])
    results = {
        "teacher": teacher_accuracy,
        "student": accuracies,
        "gain": float(np.mean(gains)),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    _show(experiment, results)
    return results


class Bench:
    """The data, the teacher, and how a student is trained."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        train, test = (
            jt.data.load(experiment.data, split, data_dir=experiment.data_dir) for split in ("train", "test")
        )
        self.train_data, self.test_data = (train, test.take(64)) if experiment.tiny else (train, test)
        self.mesh = device_mesh()
        self.student = self.network(experiment.student, "student")
        self.teacher = jt.frozen(*self.taught_network())

    def network(self, name: str, key: str) -> jt.Model:
        """Returns a network of normalised images."""
        channels = self.train_data.image_shape[-1]
        model = jt.models.create(name, self.train_data.classes, name_in_params=key)
        return jt.models.normalize(model, MEAN[:channels], STD[:channels])

    def taught_network(self) -> tuple[jt.Model, Any]:
        """Returns the teacher and its variables, read or trained here."""
        model, e = self.network(self.experiment.teacher, "teacher"), self.experiment
        if e.teacher_weights is not None:
            image = jax.ShapeDtypeStruct((1, *self.train_data.image_shape), np.uint8)
            return model, jt.models.from_torch(model, e.teacher_weights, image, rules=jt.models.CIFAR_RESNET)
        fitted = self.fit(jt.classification(model), model, e.teacher_steps, seed=100, name="teacher")
        return model, fitted.state

    def accuracy_of_teacher(self) -> float:
        """Returns the teacher's accuracy on the test split."""
        nothing = jt.TrainState.of({}, {})
        batches = jt.data.eval_batches(self.test_data, 256)
        return 100 * jt.evaluate(jt.classification(self.teacher), nothing, batches, mesh=self.mesh)["accuracy"]

    def train(self, seed: int, *, taught: bool) -> float:
        """Returns the student's accuracy on the test split after all steps."""
        e, objective = self.experiment, jt.classification(self.student)
        if taught:
            lesson = jt.distillation(self.student, self.teacher, temperature=e.temperature)
            objective = (1 - e.alpha) * objective + e.alpha * lesson
            if e.hint:
                hints = jt.distillation(self.student, self.teacher, loss=jt.losses.hint, taps=list(e.taps))
                objective += e.hint * hints.named("hint")
        name = f"{'taught' if taught else 'alone'}-seed{seed}"
        fitted = self.fit(objective, self.student, e.steps, seed=seed, name=name)
        accuracy = 100 * fitted.history[-1]["eval/accuracy"]
        print(f"{name}: accuracy {accuracy:.2f} %", file=sys.stderr)
        return accuracy

    def fit(self, objective: jt.Objective, model: jt.Model, steps: int, *, seed: int, name: str) -> jt.Fitted:
        """Trains, or resumes, in a run directory of its own."""
        e = self.experiment
        crop_flip = augment.compose(augment.random_crop(4), augment.random_flip())
        schedule = optax.warmup_cosine_decay_schedule(0.0, e.rate, max(1, steps // 10), steps)
        left_out = {"out", "data_dir", "seeds"}
        left_out |= set() if name.startswith("taught") else {"temperature", "alpha", "hint", "taps"}
        return jt.fit(
            objective,
            optax.chain(optax.add_decayed_weights(e.decay), optax.sgd(schedule, momentum=0.9, nesterov=True)),
            jt.data.pipeline(self.train_data, e.batch_size, seed=seed, augment=crop_flip),
            steps=steps,
            key=seed,
            eval_data=jt.data.eval_batches(self.test_data, 256),
            eval_objective=jt.classification(model),
            eval_every=-(-steps // 5),
            out=e.out / name,
            config={k: str(v) for k, v in dataclasses.asdict(e).items() if k not in left_out} | {"run": name},
            keep=1,
            mesh=self.mesh,
        )


def _show(experiment: Experiment, results: dict[str, Any]) -> None:
    out, console = experiment.out, Console()
    title = f"{experiment.teacher} → {experiment.student} on {experiment.data}"
    gain = results["gain"]
    caption = (
        f"test accuracy in % after {experiment.steps} steps of {experiment.batch_size}; the teacher has "
        f"{results['teacher']:.2f}; it {'adds' if gain >= 0 else 'costs'} {abs(gain):.2f} points"
    )
    header = ["student", "mean", *(f"seed {seed}" for seed in range(experiment.seeds))]
    rows = [
        [name, f"{np.mean(values):.2f}", *(f"{value:.2f}" for value in values)]
        for name, values in results["student"].items()
    ]
    report.print_table(console, header, rows, title=title, caption=caption, min_width=72)
    report.plot_curves({"accuracy": _curves(experiment)}, out / "curves.png")
    page = [f"# {title}", "", caption, "", *report.table(header, rows), "", "![accuracy](curves.png)"]
    (out / "report.md").write_text("\n".join(page) + "\n")
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"{results['seconds']} s; report: {out / 'report.md'}", soft_wrap=True)


def _curves(experiment: Experiment) -> dict[str, tuple[list, list]]:
    curves = {}
    for name, folder in (("labels alone", "alone"), ("with the teacher", "taught")):
        histories = [
            report.read_jsonl(experiment.out / f"{folder}-seed{seed}" / "metrics.jsonl")
            for seed in range(experiment.seeds)
        ]
        evaluated = [[(r["step"], r["eval/accuracy"]) for r in h if "eval/accuracy" in r] for h in histories]
        curves[name] = ([step for step, _ in evaluated[0]], np.mean([[a for _, a in e] for e in evaluated], 0).tolist())
    return curves


if __name__ == "__main__":
    try:
        main(tyro.cli(Experiment))
    except jt.InputError as error:
        print(f"distill_cifar10: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
