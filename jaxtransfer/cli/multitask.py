"""`jaxtransfer multitask`: several tasks at once, and whether they help or fight each other."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

import jaxtransfer as jt
from jaxtransfer.cli.dry_run import end_dry_run
from jaxtransfer.cli.image_options import CropOptions, noted
from jaxtransfer.cli.options import TrainOptions, at_least, check_memory, config_of, statistics
from jaxtransfer.cli.registry.augmentations import MIXES, augmentation
from jaxtransfer.cli.registry.multitask import ARCHITECTURES, METHODS, Ingredients
from jaxtransfer.cli.registry.row import choices, row_of
from jaxtransfer.cli.runs import build_model, load_run
from jaxtransfer.cli.seeds import check_seeds, run_each
from jaxtransfer.cli.settings import made_by
from jaxtransfer.cli.stages import check_model_takes
from jaxtransfer.cli.storage import PrecisionOptions
from jaxtransfer.cli.task_data import TaskOptions, TaskSets, load_tasks, terms_of
from jaxtransfer.cli.task_report import SINGLE, Outcome, reported
from jaxtransfer.cli.task_scores import ACCURACY, TaskScores
from jaxtransfer.cli.together import by_first
from jaxtransfer.cli.validation import share_of
from jaxtransfer.cli.values import check_network
from jaxtransfer.devices import processes
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.resizing import STRETCH
from jaxtransfer.runs.configuration import TASK_CLASSES, TASKS
from jaxtransfer.runs.console import announcer, facts_of, print_results
from jaxtransfer.runs.directory import open_run

NONE = "none"
COMPARES = (NONE, SINGLE)
SHARED = "shared-bottom"


@dataclasses.dataclass(frozen=True)
class ChoiceOptions:
    """By which examples the best step is chosen, and how often to do it all."""

    val_split: Annotated[str | None, tyro.conf.arg(metavar="SPLIT", help_behavior_hint="(default: --eval-split)")] = (
        None
    )
    """Examples by which the best step is chosen, so that --eval-split tests what was chosen once, at the end: a split,
    such as train[90%:] beside --split train[:90%], or a share of the training examples, 0.1."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...", help_behavior_hint="(default: --seed)")] = ()
    """Several runs, one for each seed, in OUT/seed-N; their mean and its interval go to OUT/report.md and
    OUT/summary.json."""


@dataclasses.dataclass(frozen=True)
class Multitask:
    """Learn several tasks at once: labels of one data set, or several data sets.

    The report tells each task's accuracy, the tasks' weights, and by the cosines

    of their gradients whether they fight.

    Example: jaxtransfer multitask --data cmu_faces --labels pose eyes --out runs/a
    """

    data: TaskOptions
    training: TrainOptions
    recipe: ChoiceOptions
    method: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint=choices(METHODS))] = "equal"
    """How the tasks are balanced."""
    architecture: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint=choices(ARCHITECTURES))] = SHARED
    """What the tasks share."""
    model: Annotated[str, tyro.conf.arg(metavar="NAME")] = "small-cnn"
    """Network of the encoders; `jaxtransfer models` lists them."""
    experts: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(mmoe, cgc, ple; default: 3)")] = (
        None
    )
    """Encoders that the tasks share."""
    cosines: Annotated[bool, tyro.conf.arg(help_behavior_hint="(default: they are noted)")] = True
    """Leave out the cosines of the tasks' gradients: to methods that look at the losses alone (equal, random, dwa,
    famo, stch, geometric) they cost a pass backwards for each task."""
    compare: Annotated[str, tyro.conf.arg(metavar="NAME")] = NONE
    """single trains a network for each task beside, by the same options, in OUT/single; or none."""
    image_shape: Annotated[
        tuple[int, int, int] | None, tyro.conf.arg(metavar="H W C", help_behavior_hint="(default: the data's own)")
    ] = None
    """Bring images of any size to this height, width and number of channels (1 grey, 3 colour). Several data sets whose
    images differ are brought to the size of the first, in colour where one of them is."""
    images: CropOptions = dataclasses.field(default_factory=CropOptions)
    precision: PrecisionOptions = dataclasses.field(default_factory=PrecisionOptions)

    def run(self) -> None:
        """Trains, or resumes, or says that it is done; then reports."""
        self._check()
        if self.recipe.seeds:
            return run_each("multitask", self)
        shape, resizing, notes = self._shape()

        def load(data: str, split: str, label: Any) -> jt.data.Dataset:
            how = {"data_dir": self.data.data_dir, "image_shape": shape, "resizing": resizing}
            return jt.data.load(data, split, label=label, **how)

        sets = load_tasks(self.data, load, self.recipe.val_split, seed=self.training.seed)
        sets = sets._replace(notes=(*notes, *sets.notes))
        check_memory(self.training.batch_size, sets.train.image_shape)
        training = self.training.for_data(len(sets.train), self.training.batch_size)
        config = self._config(sets, training, resizing, resize=shape is not None)
        trained = Training(config, sets, training, self.precision, training.out, cosines=self.cosines)
        with open_run(training.out, config):
            trained.check()
        for note in sets.notes:
            print(note, file=sys.stderr)
        training.say_steps()
        fitted = trained.fit()
        end_dry_run(training, fitted)
        single = self._single(config, sets, training) if self.compare == SINGLE else {}
        by_first(self._reported)(trained, fitted, single)

    def _reported(self, trained: "Training", fitted: jt.Fitted, single: dict[str, Any]) -> None:
        """Tests the step that was chosen and writes the report."""
        step, test = trained.tested()
        outcome = Outcome(trained.out, self.method, self.architecture, fitted, step, test, single, trained.sets)
        page, told = reported(outcome, facts_of(trained.config))
        print_results(trained.out, fitted, page)
        print(told)

    def _check(self) -> None:
        """Raises for what no run can be, before anything is loaded."""
        self.training.check()
        self.data.check()
        self.images.check()
        self.precision.check()
        self.precision.model_options()  # raises
        share_of(self.recipe.val_split)
        check_seeds(self.training, self.recipe.seeds)
        check_network(self.model)
        row_of("method", self.method, METHODS)
        network = row_of("architecture", self.architecture, ARCHITECTURES).facts
        at_least(self, 1, "experts")
        if self.experts is not None and not network.experts:
            raise InputError(f"--experts: {self.architecture} has none; leave it out")
        if self.compare not in COMPARES:
            raise unknown("--compare", self.compare, COMPARES)
        if self.training.balance is not None:
            raise InputError(
                "--balance draws the classes of one task equally often, and there are several; leave it out"
            )
        if mixed := [name for name in self.training.augment if name in MIXES]:
            raise InputError(f"--augment {mixed[0]} mixes the labels of one task, and there are several; leave it out")

    def _shape(self) -> tuple[Any, Any, list[str]]:
        """Returns the shape of images and their resizing, None and None for as they are, and what is to be said."""
        options, usual = self.data, jt.models.ZOO[self.model].image
        how = [
            self.images.for_new(data, options.split, options.data_dir, self.image_shape, usual) for data in options.data
        ]
        if len(options.data) == 1 or self.image_shape is not None:
            return *how[0], []
        shapes = []
        for entry, (shape, _) in zip(options.entries, how, strict=True):
            if shape is None:
                label = None if entry["label"] == "label" else entry["label"]
                shape = jt.data.load(entry["data"], options.split, data_dir=options.data_dir, label=label).image_shape
            shapes.append(tuple(shape))
        if len(set(shapes)) == 1:
            return *how[0], []
        shape = (*shapes[0][:2], max(one[2] for one in shapes))
        resizing = self.images.resizing_over(how[0][1] or STRETCH)
        sizes = ", ".join(f"{name} {'×'.join(map(str, one))}" for name, one in zip(options.data, shapes, strict=True))
        return shape, resizing, [f"Images differ ({sizes}) and are brought to {'×'.join(map(str, shape))}."]

    def _config(self, sets: TaskSets, training: TrainOptions, resizing: Any, *, resize: bool) -> dict[str, Any]:
        mean, std = statistics(sets.train)
        config = config_of(
            "multitask",
            self.data,
            training,
            self.recipe,
            **made_by("multitask", self),
            method=self.method,
            architecture=self.architecture,
            compare=self.compare,
            cosines=self.cosines,
            knows=[TASKS],
            task_classes={task: list(names) for task, names in sets.tasks.items()},
            sets=self.data.entries,
            data=" + ".join(self.data.data),
            model=self.model,
            outputs=1,
            image_shape=list(sets.train.image_shape),
            resize=resize,
            mean=mean,
            std=std,
            monitor=ACCURACY,
        )
        if ARCHITECTURES[self.architecture].facts.experts:
            config["experts"] = 3 if self.experts is None else self.experts
        return config | self.precision.model_options() | noted(config, resizing)

    def _single(self, config: dict[str, Any], sets: TaskSets, training: TrainOptions) -> dict[str, Any]:
        """Trains a network for each task; returns their scores on the test examples."""
        found = {}
        for entry in self.data.entries:
            task = entry["task"]
            own = sets.alone(task)
            more = {
                TASK_CLASSES: {task: config[TASK_CLASSES][task]},
                "sets": [entry],
                "method": "equal",
                "compare": NONE,
            }
            more |= {"architecture": SHARED, "data": entry["data"], "cosines": False}
            alone = {name: value for name, value in config.items() if name != "experts"} | more
            trained = Training(alone, own, training, self.precision, training.out / SINGLE / task, cosines=False)
            trained.fit(prefix=f"{SINGLE} {task}")
            found[task] = processes.first_tells(lambda trained=trained: trained.tested()[1])
        return found


class Training:
    """One training: its network, objective, batches and scores.

    Args:
      config: of the run.
      sets: its examples.
      options: how to train.
      precision: how the weights are stored.
      out: the run directory.
      cosines: whether those of the tasks' gradients are noted, where the method can tell them.
    """

    def __init__(
        self,
        config: dict[str, Any],
        sets: TaskSets,
        options: TrainOptions,
        precision: PrecisionOptions,
        out: Path,
        *,
        cosines: bool,
    ):
        self.config, self.sets, self.options, self.precision, self.out = config, sets, options, precision, out
        self.model = build_model(config)
        row, network = METHODS[config["method"]], ARCHITECTURES[config["architecture"]].facts
        transform = augmentation(options.augment, sets.train)
        self.batches = jt.data.pipeline(
            sets.train, options.batch_size, seed=options.seed, augment=transform, balance=sets.weights
        )
        tasks = terms_of(self.model, sets.train, sets.tasks, label_smoothing=options.label_smoothing)
        shared = f"{self.model.name}/(?:{network.shared})"
        several = cosines and row.facts.cosines and len(tasks) > 1
        self.objective = row.build(Ingredients(tasks, shared, self.batches.steps_per_epoch, several))

    def check(self) -> None:
        """Raises where the images don't fit the network, by tracing it."""
        check_model_takes(self.model, self.config["model"], self.sets.train)

    def scores(self, dataset: jt.data.Dataset) -> TaskScores:
        """Returns what measures a state on examples; of several processes the first one does, on its own devices."""
        with processes.alone():
            where = self.options.where
            return TaskScores(self.model, dataset, list(self.sets.tasks), self.options.batch_size, **where)

    def fit(self, prefix: str = "") -> jt.Fitted:
        """Trains, or resumes."""
        options = self.options
        return jt.fit(
            self.objective,
            self.precision.mover(options.optimizer_for(options.updates), self.config),
            self.batches,
            steps=options.updates,
            key=options.seed,
            measure=self.scores(self.sets.test if self.sets.val is None else self.sets.val),
            measure_every=options.eval_every or max(1, options.updates // 10),
            monitor=ACCURACY,
            patience=options.patience,
            out=self.out,
            config=self.config,
            keep=options.keep,
            **options.where,
            log=announcer(prefix),
            **options.looked_at,
        )

    def tested(self) -> tuple[int, dict[str, float]]:
        """Returns the step that was chosen, and what it scores on the test examples."""
        run = load_run(self.out, tasks=True)
        return run.step, dict(run.result) if self.sets.val is None else self.scores(self.sets.test)(run)
