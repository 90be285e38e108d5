"""`jaxtransfer meta`: learn to learn new classes from a few examples."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
import tyro

import jaxtransfer as jt
from jaxtransfer import models
from jaxtransfer.cli.dry_run import end_dry_run
from jaxtransfer.cli.options import (
    DataDir,
    RunOptions,
    at_least,
    at_most,
    check_folder,
    check_memory,
    config_of,
    divides_by_devices,
)
from jaxtransfer.cli.options import statistics as image_statistics
from jaxtransfer.cli.registry.fewshot import METHODS, STATISTICS, learner
from jaxtransfer.cli.registry.row import choices, having, row_of
from jaxtransfer.cli.runs import Run, build_model, load_run
from jaxtransfer.cli.settings import made_by
from jaxtransfer.cli.stages import check_model_takes
from jaxtransfer.cli.storage import StorageOptions
from jaxtransfer.cli.together import by_first
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.runs.configuration import CLASSES, EPISODES
from jaxtransfer.runs.console import announcer, facts_of, print_results
from jaxtransfer.runs.directory import open_run
from jaxtransfer.runs.files import write_atomically
from jaxtransfer.runs.report import write_report

_ON_DEVICE = 2 * 2**30  # bytes; larger sets of training images stay on the host
_VALIDATION = 200  # episodes
_MOST_EPISODES = 1_000_000


@dataclasses.dataclass(frozen=True)
class EpisodeOptions:
    """Which classes, and how episodes are made of them."""

    data: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """Data set, as for `pretrain`; omniglot, say."""
    ways: int = 5
    """Classes of a test episode."""
    shots: int = 1
    """Support examples per class."""
    queries: int = 15
    """Query examples per class."""
    train_ways: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: --ways)")] = None
    """Classes of a training episode; metric learners gain from more."""
    train_queries: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: --queries)")] = None
    """Query examples per class of a training episode."""
    tasks: int = 4
    """Episodes per update, over all devices; a multiple of their number."""
    split: Annotated[str, tyro.conf.arg(metavar="SPLIT")] = "train"
    """Split with the training classes."""
    eval_split: Annotated[str, tyro.conf.arg(metavar="SPLIT")] = "test"
    """Split with the test classes, which must be others."""
    split_classes: Annotated[
        tuple[int, int, int] | None, tyro.conf.arg(metavar="A B C", help_behavior_hint="(default: by the splits)")
    ] = None
    """Share the classes of --split out by --seed: A to train, B to validate, C to test; --eval-split is not read."""
    val_classes: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: a tenth, at least --ways)")
    ] = None
    """Classes of --split that are held out to choose the checkpoint."""
    rotations: bool = False
    """Make each quarter turn a class of its own (the protocol of Omniglot)."""
    image_shape: Annotated[
        tuple[int, int, int] | None, tyro.conf.arg(metavar="H W C", help_behavior_hint="(default: the data's own)")
    ] = None
    """Bring images of any size to this height, width and number of channels; 28 28 1 is usual for omniglot."""
    data_dir: DataDir = None
    """Folder of prepared tfds data sets."""

    @property
    def images(self) -> int:
        """Images of the episodes of an update."""
        ways, queries = self.train_ways or self.ways, self.train_queries or self.queries
        return self.tasks * ways * (self.shots + queries)

    def episodes(self, dataset: jt.data.Dataset, *, tasks: int, seed: int, train: bool = False) -> jt.data.Episodes:
        """Returns episodes of a data set."""
        return jt.data.Episodes(
            dataset,
            (self.train_ways if train else None) or self.ways,
            self.shots,
            (self.train_queries if train else None) or self.queries,
            tasks=tasks,
            rotations=jt.data.RIGHT_ANGLES if self.rotations else (0,),
            seed=seed,
        )


@dataclasses.dataclass(frozen=True)
class Meta:
    """Train a few-shot learner on episodes, test it on episodes of new classes.

    Example: jaxtransfer meta --data omniglot --image-shape 28 28 1 --rotations
    --method prototypical --out runs/few-shot
    """

    episodes: EpisodeOptions
    training: RunOptions
    method: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint=choices(METHODS))] = "prototypical"
    """How to learn new classes:"""
    model: Annotated[str, tyro.conf.arg(metavar="NAME")] = "conv4"
    """Network; `jaxtransfer models` lists them. conv4-strided is faster to adapt."""
    inner_steps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: by the method)")] = (
        None
    )
    """Steps of adaptation, or of a head's training."""
    inner_lr: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: by the method)")] = (
        None
    )
    """Learning rate of the adaptation; the first one where it is learned."""
    test_steps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: --inner-steps)")] = (
        None
    )
    """Steps of adaptation at test; of what maml++ learns for each step, further ones take the last."""
    statistics: Annotated[str, tyro.conf.arg(metavar="NAME")] = "transductive"
    """What batch norm of an adapted network normalises by: transductive (each set's own), running, or per-step."""
    batch_size: Annotated[int, tyro.conf.arg(help_behavior_hint=having(METHODS, "labelled", "128"))] = 128
    """Examples per update of the methods that learn without episodes."""
    test_episodes: int = 1000
    """Test episodes, for the accuracy and its 95 % interval."""
    storage: StorageOptions = dataclasses.field(default_factory=StorageOptions)

    def run(self) -> None:
        """Trains, or resumes, or says that it is done; then tests."""
        self._check()
        train, valid, test = class_splits(self.episodes, self.training.seed)
        check_memory(self.episodes.images, train.image_shape, "--tasks, --ways, --shots, --queries:")
        check_memory(self.batch_size, train.image_shape)
        mean, std = image_statistics(train)
        kind = METHODS[self.method].facts
        steps = self.inner_steps or kind.steps
        training = self.training.for_data(len(train), self.batch_size)
        names = (
            [f"way {way + 1}" for way in range(self.episodes.ways)] if not kind.labelled else list(train.class_names)
        )
        config = config_of(
            "meta",
            self.episodes,
            training,
            **made_by("meta", self),
            knows=[EPISODES, CLASSES] if kind.labelled else [EPISODES],
            method=self.method,
            model=self.model,
            inner_steps=steps,
            inner_lr=self.inner_lr or kind.rate,
            test_steps=self.test_steps or steps,
            statistics=self.statistics,
            batch_size=self.batch_size,
            class_names=names,
            mean=mean,
            std=std,
        )
        config |= {"image_shape": list(train.image_shape), "train_ways": self.episodes.train_ways or self.episodes.ways}
        config |= self.storage.model_options()
        out = self.training.out
        with open_run(out, config):
            model = build_model(config)
            check_model_takes(model, self.model, train)
            own = learner(model, config)
            validation = self._validation(valid)
            tests = test_episodes(self.episodes, test, self.test_episodes, self.training.seed)
            data, first = self._training_data(train, kind.labelled)
            still = self.storage.mover(optax.identity(), config)
            jt.init(own.train, still, jax.random.key(0), first)  # raises where the method doesn't fit
        training.say_steps()
        fitted = jt.fit(
            own.train,
            self.storage.mover(training.optimizer_for(training.updates), config),
            steps=training.updates,
            key=self.training.seed,
            eval_data=validation,
            eval_objective=own.validate,
            eval_every=self.training.eval_every,
            patience=self.training.patience,
            out=out,
            config=config,
            keep=self.training.keep,
            **self.training.where,
            log=announcer(),
            **data,
            **training.looked_at,
        )
        end_dry_run(training, fitted)
        by_first(self._tested)(fitted, config, tests, train)

    def _tested(self, fitted: jt.Fitted, config: dict[str, Any], tests: jt.data.EpisodeBatches, train: Any) -> None:
        """Writes the report and tests the run."""
        out = self.training.out
        title = f"{self.method} on {self.episodes.data}, {self.episodes.ways} ways, {self.episodes.shots} shots"
        report = write_report(out, title, facts_of(config))
        scores = tested(load_run(out), tests, lambda: train)
        write_atomically(out / "test.json", json.dumps(scores) + "\n")
        print_results(out, fitted, report)
        print(
            f"test: accuracy {scores['accuracy']:.4f} ± {scores['accuracy_interval']:.4f} on {scores['episodes']} "
            f"episodes of new classes"
        )

    def _check(self) -> None:
        self.training.check()
        self.storage.check()
        kind = row_of("method", self.method, METHODS).facts
        for name, value, known in (
            ("model", self.model, models.ZOO),
            ("statistics", self.statistics, STATISTICS),
        ):
            if value not in known:
                raise unknown(name, value, known)
        at_least(self, 1, "inner_steps", "test_steps", "batch_size", "test_episodes")
        check_episodes_asked(self, "test_episodes")
        at_least(self.episodes, 2, "ways", "train_ways")
        at_least(self.episodes, 1, "shots", "queries", "train_queries", "tasks", "val_classes")
        if self.inner_lr is not None and not (self.inner_lr > 0 and math.isfinite(self.inner_lr)):
            raise InputError(f"--inner-lr must be positive and finite; got {self.inner_lr}")
        if self.training.epochs is not None and not kind.labelled:
            raise InputError(f"--epochs: {self.method} learns from episodes, which have none; give --steps")
        divides_by_devices("tasks", self.episodes.tasks)
        divides_by_devices("batch_size", self.batch_size)
        if kind.fixed_ways and self.episodes.train_ways not in (None, self.episodes.ways):
            raise InputError(f"--train-ways: {self.method} has one output per way and trains on --ways; leave it out")

    def _validation(self, valid: jt.data.Dataset) -> jt.data.EpisodeBatches:
        """Returns about 200 episodes, in batches that divide by the devices."""
        tasks = jax.device_count() * max(1, 10 // jax.device_count())
        episodes = self.episodes.episodes(valid, tasks=tasks, seed=self.training.seed)
        return episodes.test_set(tasks * max(1, _VALIDATION // tasks))

    def _training_data(self, train: jt.data.Dataset, labelled: bool) -> tuple[dict[str, Any], Any]:
        """Returns what `fit` trains on, a sampler on the device or a pipeline of the host, and a batch like its own."""
        seed = self.training.seed
        if labelled:
            batches = jt.data.pipeline(train, self.batch_size, seed=seed)
            return {"data": batches}, batches.batch(0)
        episodes = self.episodes.episodes(train, tasks=self.episodes.tasks, seed=seed, train=True)
        if train.nbytes > _ON_DEVICE:
            return {"data": episodes.batches()}, episodes.batches(cache=None, threads=0).batch(0)
        data, sample = episodes.on_device()
        return {"data": data, "sample": sample}, jax.jit(sample)(jax.random.key(seed), data)


def class_splits(options: EpisodeOptions, seed: int) -> Sequence[jt.data.Dataset]:
    """Returns the data sets of the training, validation and test classes, none of which is in two of them.

    Raises:
      InputError: where the splits share classes, or there are too few.
    """
    check_folder(options.data_dir)

    def load(split):
        return jt.data.load(options.data, split, data_dir=options.data_dir, image_shape=options.image_shape)

    train = load(options.split)
    present = np.unique(train.labels)
    if options.split_classes is not None:
        return jt.data.split_classes(train, options.split_classes, seed=seed)
    test = load(options.eval_split)
    if len(shared := np.intersect1d(present, test.labels)):
        raise InputError(
            f"{options.data}: class {train.class_names[shared[0]]!r} is in {options.split!r} and in "
            f"{options.eval_split!r} ({len(shared)} classes are), and few-shot learning is tested on new classes; add "
            f"--split-classes A B C, which shares the {len(present)} classes of {options.split!r} out"
        )
    held_out = options.val_classes or max(options.ways, len(present) // 10)
    if held_out >= len(present):
        raise InputError(
            f"{options.data}: {options.split!r} has {len(present)} classes, of which {held_out} are held out to "
            f"choose the checkpoint; ask for fewer --val-classes"
        )
    train, valid = jt.data.split_classes(train, (len(present) - held_out, held_out), seed=seed)
    return train, valid, test


def check_episodes_asked(options: Any, name: str) -> None:
    """Raises for more test episodes than can tell anything new: their mean is known to a tenth of a per cent then."""
    at_most(options, _MOST_EPISODES, "whose interval is about a tenth of a per cent wide", name)


def test_episodes(options: EpisodeOptions, dataset: jt.data.Dataset, count: int, seed: int) -> jt.data.EpisodeBatches:
    """Returns the test episodes, up to 20 in a batch."""
    return options.episodes(dataset, tasks=math.gcd(count, 20), seed=seed).test_set(count)


def episode_options(config: dict[str, Any], data_dir: Path | None) -> EpisodeOptions:
    """Returns the episodes of a run's configuration."""
    known = [field.name for field in dataclasses.fields(EpisodeOptions) if field.name in config]
    values: dict[str, Any] = {
        name: tuple(config[name]) if isinstance(config[name], list) else config[name] for name in known
    }
    return EpisodeOptions(**values, data_dir=data_dir)


def tested(run: Run, episodes: jt.data.EpisodeBatches, base: Callable[[], jt.data.Dataset]) -> dict[str, Any]:
    """Returns the scores of a run on test episodes; `base` loads its training classes, where they are needed."""
    spec = episodes.episodes
    state = jt.TrainState.of(run.params, run.state, step=run.step)
    own = learner(run.model, {**run.config, "ways": spec.ways})
    objective = own.test(state, lambda: jt.data.eval_batches(base(), run.config["batch_size"]))
    scores = jt.evaluate_episodes(objective, state, episodes)
    means = {name: score.mean for name, score in scores.items()}
    half = {f"{name}_interval": score.half for name, score in scores.items()}
    facts = {"ways": spec.ways, "shots": spec.shots, "queries": spec.queries, "step": run.step}
    return {**facts, "episodes": scores["accuracy"].episodes, **means, **half}
