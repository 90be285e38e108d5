"""CMU faces: who it is, where they look, what face they make, sunglasses or not; four tasks of one small set.

624 grey pictures, 20 people in all four poses and expressions with and without sunglasses. As these are crossed, a
picture that is held out by chance tells on itself (its combination is rarer in training), so that pose, expression and
eyes are tested on people who are not in the training: four, drawn by the seed. Who it is can't be told of them; that
is tested on a sixth of the pictures of the other sixteen. So the test set lacks labels, and each task counts its own
(`jt.multitask.masked`); in training all four are known. No picture is mirrored, which would turn left into right.

All methods have the same first weights, pictures and optimiser (AdamW, a cosine to zero) and LeNet in small, shared but
for a head for each task; `single` has a network for each, and mmoe, cgc and cross-stitch share otherwise, with equal
weights. The accuracy is that of the last step; nothing is chosen by the test.

    TFDS_DATA_DIR=... nice python -m experiments.cmu_faces_tasks --out runs/cmu_faces_tasks

Measured, seed 0 alone, equal weights: person 98.73, pose 79.20, expression 32.00, eyes 98.40 %, in two minutes beside
twenty other processes. The expression of people never seen is near chance (25 % each of four). Not run: the others.

The same command resumes what is unfinished, further methods and seeds add to what is there; report.md, results.json and
the picture are written anew after each run. Do the tasks fight? Methods that read gradients note the mean cosine of
each pair in their cell.json; those of the first are printed.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import jaxtransfer as jt
from experiments import cells, multi_mnist
from experiments.finetune_cifar100 import run
from experiments.multi_mnist import LeNet, balanced, trained
from jaxtransfer.data import augment
from jaxtransfer.runs import report

TASKS = ("person", "pose", "expression", "eyes")
OF_NEW = TASKS[1:]  # tested on people who are not in the training
SHAPE = (30, 32, 1)
NETWORKS = ("mmoe", "cgc", "cross-stitch")
METHODS = (*multi_mnist.METHODS, *NETWORKS)
SETTINGS = ("steps", "batch_size", "rate", "decay", "held_out")  # of which a run is


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Learn four labels of faces by several ways to balance them; writes a table and a picture."""

    out: Path = Path("runs/cmu_faces_tasks")
    """Folder for report.md, results.json, accuracy.png and one run directory per training."""
    methods: tuple[str, ...] = ("equal", "pcgrad", "imtl", "uncertainty", "single", "mmoe")
    """Any of those, of the others of jt.multitask, and cgc, cross-stitch, in the order in which they run."""
    seeds: int = 3
    """Repetitions: other people held out, other first weights, another order of the batches."""
    steps: int = 600
    """Updates of a run."""
    batch_size: int = 32
    """Pictures per update."""
    rate: float = 2e-3
    """Peak learning rate of AdamW, falling to zero along a cosine."""
    decay: float = 1e-3
    """Weight decay."""
    held_out: int = 4
    """People who are not in the training."""
    data_dir: Path | None = None
    """Folder of prepared tfds data sets; by default $TFDS_DATA_DIR."""
    tiny: bool = False
    """Noise with labels, two steps: shows that everything runs."""


def main(experiment: Experiment) -> dict[str, Any]:
    """Trains what is not trained yet; returns by method and seed the accuracies of the tasks in per cent."""
    cells.check(experiment, "seeds", "steps", "batch_size", "rate", "held_out", methods=METHODS)
    if experiment.tiny:
        experiment = dataclasses.replace(experiment, steps=2, batch_size=4)
    bench = Bench(experiment)
    title = "CMU faces: four tasks"
    results = cells.all_cells(experiment, experiment.methods, TASKS, bench.cell, title)
    console, (header, rows) = Console(), cells.table_of(results, TASKS)
    report.print_table(console, header, rows, title=f"{title}, test accuracy, %")
    told = [one["cosines"] for by_seed in results.values() for one in by_seed.values() if "cosines" in one]
    if told:
        pairs = ", ".join(f"{pair} {cosine:.3f}" for pair, cosine in told[0].items())
        console.print(f"mean cosine of the tasks' gradients: {pairs}", soft_wrap=True)
    console.print(f"report: {experiment.out / 'report.md'}", soft_wrap=True)
    return results


class Bench:
    """The pictures, and how a run is trained."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.faces = _noise() if experiment.tiny else _faces(experiment.data_dir)
        self.classes = {task: self.faces.entry_of(task).classes or 0 for task in TASKS}
        self._nets: dict[Any, jt.Model] = {}

    def net(self, network: str, tasks: tuple[str, ...]) -> jt.Model:
        """Returns a network of some of the tasks; made once, as models compare by identity."""
        if (network, tasks) not in self._nets:
            encoder = jt.models.linen(LeNet((16, 32), 64), stages=("stage1_conv", "stage2_conv", "hidden"))
            classes = {task: self.classes[task] for task in tasks}
            made = jt.models.task_network(network, encoder, classes, image_shape=self.faces.image_shape)
            self._nets[network, tasks] = jt.models.normalize(made, 0.35, 0.22)
        return self._nets[network, tasks]

    def cell(self, method: str, seed: int) -> dict[str, Any]:
        """Returns what a run gives: trained, gone on with, or read from its folder."""
        settings = {name: getattr(self.experiment, name) for name in SETTINGS}
        parts = split(self.faces, self.experiment.held_out, seed)
        moves = augment.random_crop(2)

        def train(folder: Path) -> dict[str, Any]:
            config = {"method": method, **settings}
            groups = [(task,) for task in TASKS] if method == "single" else [TASKS]
            found: dict[str, Any] = {}
            for tasks in groups:
                network = method if method in NETWORKS else "shared-bottom"
                net = self.net(network, tasks)
                terms = {task: jt.classification(net, output=task, label=task).named(task) for task in tasks}
                shown = {task: jt.multitask.masked(term, f"has_{task}") for task, term in terms.items()}
                rule = "equal" if method in (*NETWORKS, "single") else method
                shared = f"{net.name}/(?:{jt.models.NETWORKS[network].shared})"
                own = folder / tasks[0] if method == "single" else folder
                objective = balanced(rule, list(terms.values()), shared)
                found |= trained(objective, shown, parts, self.experiment, seed, own, config, moves)
            return found

        return cells.cell(self.experiment.out / f"{method}-seed{seed}", settings, train)


def split(faces: jt.data.Dataset, held_out: int, seed: int) -> dict[str, jt.data.Dataset]:
    """Returns `train` and `test`: some people, who test all but `person`, and a sixth of the others', which tests that.

    Args:
      faces: with a column for each task.
      held_out: how many people.
      seed: of the choice.
    """
    rng, person = np.random.default_rng(seed), faces.column("person")
    people = np.unique(person)
    if not 0 < held_out < len(people):
        raise jt.InputError(f"--held-out must be below the {len(people)} people; got {held_out}")
    new = np.isin(person, rng.permutation(people)[:held_out])
    kept = np.zeros(len(person), bool)
    for one in people:
        rows = np.flatnonzero((person == one) & ~new)
        kept[rng.permutation(rows)[: max(1, len(rows) // 6) if len(rows) else 0]] = True
    test = faces.select(np.flatnonzero(new | kept))
    has = {f"has_{task}": (new if task in OF_NEW else kept)[new | kept].astype(np.float32) for task in TASKS}
    return {"train": faces.select(np.flatnonzero(~(new | kept))), "test": test.with_columns(has)}


def _faces(data_dir: Path | None) -> jt.data.Dataset:
    """Returns all pictures, those of both splits."""
    return jt.data.load("cmu_faces", "train+test", data_dir=data_dir, image_shape=SHAPE, label=TASKS).decoded()


def _noise() -> jt.data.Dataset:
    """Returns pictures of five people, crossed as the real ones are."""
    rng, sizes = np.random.default_rng(0), {"person": 6, "pose": 4, "expression": 4, "eyes": 2}
    crossed = np.indices((6, 2, 2, 2)).reshape(4, -1)
    labels = dict(zip(TASKS, crossed, strict=True))
    names = {task: [f"{task} {number}" for number in range(size)] for task, size in sizes.items()}
    image = rng.integers(0, 256, (crossed.shape[1], *SHAPE)).astype(np.uint8)
    return jt.data.Dataset.from_columns({"image": image, **labels}, class_names=names)


if __name__ == "__main__":
    run("cmu_faces_tasks", Experiment, main)
