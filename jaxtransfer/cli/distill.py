"""`jaxtransfer distill`: a student learns what a trained run knows."""

import contextlib
import dataclasses
import json
import statistics as stats
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

import jaxtransfer as jt
from jaxtransfer.cli.cache_teacher import attach_cache, teacher_identity
from jaxtransfer.cli.classes import places_in, with_classes_of
from jaxtransfer.cli.image_options import ImageOptions, noted
from jaxtransfer.cli.options import DataOptions, TrainOptions, at_least, config_of, load_pair, statistics
from jaxtransfer.cli.registry.distillation import LOGITS, LOSSES, taps_of, term_of
from jaxtransfer.cli.registry.row import choices, having, row_of
from jaxtransfer.cli.runs import Run, build_model, check_fits, check_knows_classes, load_run
from jaxtransfer.cli.settings import made_by
from jaxtransfer.cli.stages import train_stages
from jaxtransfer.cli.storage import StorageOptions
from jaxtransfer.cli.values import check_network
from jaxtransfer.data.classes import Places
from jaxtransfer.errors import InputError
from jaxtransfer.files import read_text
from jaxtransfer.methods import Phase
from jaxtransfer.objectives.distillation.teachers import Teacher
from jaxtransfer.parts.outputs import shapes_of
from jaxtransfer.runs.configuration import CLASSES, EPISODES
from jaxtransfer.runs.files import write_atomically


@dataclasses.dataclass(frozen=True)
class Distill:
    """Train a student on what a run says of the same images.

    Example: jaxtransfer distill --teacher runs/a --data digits/upright --out runs/b
    """

    teacher: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN ...", help_behavior_hint="(required)")]
    """Run directories of the teacher, or of several, whose losses are averaged; each one's best checkpoint is used."""
    data: DataOptions
    training: TrainOptions
    model: Annotated[str, tyro.conf.arg(metavar="NAME")] = "small-cnn"
    """Student; `jaxtransfer models` lists networks."""
    loss: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint=choices(LOSSES))] = "kd"
    """What draws the student to the teacher:"""
    temperature: Annotated[
        float | None,
        tyro.conf.arg(metavar="FLOAT", help_behavior_hint=having(LOSSES, "temperature", "usual for --loss")),
    ] = None
    """Of the losses that have one."""
    weight: Annotated[
        float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: usual for --loss)")
    ] = None
    """Of the loss; 0.9 for kd."""
    label_weight: Annotated[
        float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: usual for --loss)")
    ] = None
    """Of the labels' cross-entropy; 0.1 for kd, else 1. 0 learns without labels."""
    taps: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: by --loss)")] = ()
    """Outputs that are compared: stage2, or student=teacher where they are called differently."""
    cache: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: the teacher runs)")] = None
    """The teacher's outputs as `cache-teacher` wrote them, in place of running it; without --augment."""
    generations: int = 1
    """Students one after the other, each taught by the one before (born-again networks); they share --steps."""
    resize: bool = False
    """Bring the images to the teacher's shape: size, and grey or colour."""
    storage: StorageOptions = dataclasses.field(default_factory=StorageOptions)

    def run(self) -> None:
        """Trains, or resumes, or says that it is done."""
        self._check()
        runs = [load_run(directory) for directory in self.teacher]
        for run, directory in zip(runs, self.teacher, strict=True):
            if run.knows == (EPISODES,):
                raise InputError(
                    f"{directory} is a run of meta, which knows no fixed classes; expected one of pretrain"
                )
            if LOSSES[self.loss].facts.taps == LOGITS:
                check_knows_classes(run, directory, f"--loss {self.loss} compares classes")
        shape, resizing = ImageOptions().for_run(runs[0], self.data.data, resize=self.resize)
        for run, directory in zip(runs, self.teacher, strict=True):
            if shape is not None and run.resizing != runs[0].resizing:
                raise InputError(
                    f"teachers must take the same images: {self.teacher[0]} has them {runs[0].resizing}, {directory} "
                    f"{run.resizing}; distill from one of them"
                )
        train, test = load_pair(
            self.data,
            shape,
            resizing=resizing,
            seed=self.training.seed,
            batch_size=self.training.batch_size,
            prepare=lambda d: self._prepared(d, runs),
        )
        taught, comparable = [], True
        for run, directory in zip(runs, self.teacher, strict=True):
            check_fits(run, train, directory)
            found = self._found(run, train, directory)
            comparable = comparable and found is not None
            taught.append(run if found is None else with_classes_of(run, train, directory, found))
        training = self.training.for_data(len(train), self.training.batch_size)
        config = self._config(runs, train, training)
        config |= {"resize": shape is not None, **noted(config, resizing)}
        config |= self.storage.model_options()
        model = build_model(config)
        live = [_frozen(run) for run in taught]
        train_stages(
            [
                phase._replace(optimizer=self.storage.mover(phase.optimizer, config))
                for phase in self._stages(model, live, train, training)
            ],
            config,
            training,
            train,
            test,
            eval_model=model,
            eval_objective=_evaluation(model, live[0], comparable),
            title=f"distill {config['model']} from {', '.join(run.config['model'] for run in runs)} by {self.loss}",
            tables=lambda variables: [_sizes(self.training.out, model, variables, runs, train)],
        )

    def _check(self) -> None:
        self.training.check()
        self.storage.check()
        if not self.teacher:
            raise InputError("--teacher: expected a run directory, or several; got none")
        check_network(self.model)
        row_of("loss", self.loss, LOSSES)
        at_least(self, 0, "weight", "label_weight")
        at_least(self, 1, "generations")
        if self.temperature is not None and not 0 < self.temperature < float("inf"):
            raise InputError(f"--temperature must be positive and finite; got {self.temperature}")
        if self.weight == 0 and self.label_weight == 0:
            raise InputError("--weight and --label-weight are both 0, which leaves nothing to learn from")
        if self.cache is None:
            return
        if len(self.teacher) > 1 or self.generations > 1:
            raise InputError("--cache holds the outputs of one teacher; leave it out for several, or for --generations")
        if self.training.augment:
            raise InputError(
                f"--cache holds what the teacher says of the images as they are, which is wrong under --augment "
                f"{' '.join(self.training.augment)}; leave out either"
            )

    def _prepared(self, train: jt.data.Dataset, runs: list[Run]) -> jt.data.Dataset:
        """Returns the whole training split with the columns that the lesson reads."""
        if LOSSES[self.loss].facts.own:
            train = train.with_columns({"index": np.arange(len(train), dtype=np.int32)})
        if self.cache is not None:
            found = self._found(runs[0], train, self.teacher[0])
            classes = None if found is None or found.same else found.places
            train = attach_cache(train, self.cache, runs[0], self.teacher[0], classes)
        return train

    def _found(self, run: Run, train: jt.data.Dataset, directory: Path) -> Places | None:
        """Returns where the data's classes stand among a teacher's, or None where a lesson can do without them."""
        if CLASSES not in run.knows:
            return None
        try:
            return places_in(run, train, directory)
        except InputError as error:
            if LOSSES[self.loss].facts.taps != LOGITS:
                return None
            raise InputError(
                f"--loss {self.loss} compares classes: {directory} knows {len(run.config['class_names'])}, "
                f"{train.name} has {train.classes}; take a teacher of the same classes, or a loss of features or maps "
                f"(hint, rkd, attention-transfer): {error}"
            ) from None

    def _config(self, runs: list[Run], train: jt.data.Dataset, training: TrainOptions) -> dict[str, Any]:
        mean, std = statistics(train)
        row = LOSSES[self.loss].facts
        return config_of(
            "distill",
            self.data,
            training,
            **made_by("distill", self),
            teacher=[str(directory) for directory in self.teacher],
            teacher_steps=[run.step for run in runs],
            teacher_weights=[teacher_identity(run)["weights"][:16] for run in runs],
            knows=[CLASSES],
            model=self.model,
            loss=self.loss,
            temperature=self._temperature,
            weight=row.weight if self.weight is None else self.weight,
            label_weight=row.labels if self.label_weight is None else self.label_weight,
            taps=list(self.taps),
            cache=self.cache,
            generations=self.generations,
            class_names=list(train.class_names),
            image_shape=list(train.image_shape),
            mean=mean,
            std=std,
        )

    @property
    def _temperature(self) -> float:
        return self.temperature or LOSSES[self.loss].facts.temperature or 4.0

    def _stages(self, model: jt.Model, live: list[Any], train: jt.data.Dataset, training: TrainOptions) -> list[Phase]:
        """Returns a phase for each generation."""
        row = LOSSES[self.loss].facts
        weight, labels = (
            given if given is not None else usual
            for given, usual in ((self.weight, row.weight), (self.label_weight, row.labels))
        )
        image = {"image": jax.ShapeDtypeStruct((1, *train.image_shape), np.uint8)}
        mine = shapes_of(jt.Forward.of(model), image)
        examples = 1 + int(np.max(train.columns["index"][:])) if "index" in train.columns else len(train)

        def objective(teachers: Sequence[Teacher], given: Any) -> jt.Objective:
            taps = taps_of(self.loss, self.taps, mine, given, source)
            term = term_of(self.loss, model, teachers, temperature=self._temperature, taps=taps, examples=examples)
            objective = weight * term.named(self.loss)
            if labels:
                objective = labels * jt.classification(model, label_smoothing=self.training.label_smoothing) + objective
            return objective

        def taught_by_the_last(params, state):
            variables = {"params": params[model.name], **state[model.name]}
            return objective([jt.frozen(model.named("teacher"), variables)], mine)

        teachers: Sequence[Teacher] = [jt.cached()] if self.cache is not None else live
        given = shapes_of(jt.Forward.of(live[0]), image)
        if self.cache is not None:
            given = {name: given[name] for name in given if f"teacher_{name}" in train.columns}
        source = (
            "the teacher" if self.cache is None else f"the cache {self.cache} (cache-teacher --outputs writes more)"
        )
        if self.generations > training.updates:
            raise InputError(
                f"--generations {self.generations} share --steps and need as many; got --steps {training.updates}"
            )
        steps = training.updates // self.generations
        names = [f"generation-{number}" for number in range(1, self.generations + 1)]
        first = Phase(names[0], objective(teachers, given), training.optimizer_for(steps))
        return [
            first,
            *(Phase(name, taught_by_the_last, training.optimizer_for(steps), fresh=True) for name in names[1:]),
        ]


def _frozen(run: Run):
    return jt.frozen(run.model.named("teacher"), run.variables)


def _evaluation(model: jt.Model, teacher: Any, comparable: bool) -> jt.Objective:
    """Returns the student's loss, with the teacher's accuracy and their agreement beside it."""
    objective = jt.classification(model)
    if not comparable:
        return objective
    beside = jt.classification(teacher).named("teacher") + jt.distillation(model, teacher)
    return objective + 0.0 * beside


def _sizes(out: Path, model: jt.Model, variables: Any, runs: list[Run], train: jt.data.Dataset):
    """Returns a table of the parameters and the speed of student and teachers; measured once per run directory."""
    path = out / "sizes.json"
    table = _sizes_of(path)
    if table is None:
        images = train.read(np.arange(min(64, len(train))) % len(train))["image"]
        nets = [("student", model, variables)]
        for run in runs:
            nets.append((f"teacher ({run.config['model']})", run.model, run.variables))
        rows = [[name, f"{_count(own):,}", _images_per_second(net, own, images)] for name, net, own in nets]
        write_atomically(path, json.dumps(rows) + "\n")
        table = rows
    return (
        "Size and speed",
        ("network", "parameters", "images/s, inference in batches of 64"),
        table,
    )


def _sizes_of(path: Path) -> list[list[Any]] | None:
    """Returns the rows of a table that was measured before, or None where it wasn't, or isn't what was written."""
    with contextlib.suppress(OSError, ValueError):
        rows = json.loads(read_text(path))
        if isinstance(rows, list) and all(isinstance(row, list) and len(row) == 3 for row in rows):
            return rows
    return None


def _count(variables: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def _images_per_second(model: jt.Model, variables: Any, images: np.ndarray) -> int:
    run = jax.jit(lambda variables, images: model.apply(variables, images, train=False, key=None)[0]["logits"])
    variables, images = jax.device_put((model.complete(variables), images))
    run(variables, images).block_until_ready()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        run(variables, images).block_until_ready()
        times.append(time.perf_counter() - begin)
    return round(len(images) / stats.median(times))
