"""`jaxtransfer evaluate`: how good a run is on a data set."""

import dataclasses
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import tyro

import jaxtransfer as jt
from jaxtransfer.cli.classes import labelled_as
from jaxtransfer.cli.domain_names import part_of
from jaxtransfer.cli.features import measured
from jaxtransfer.cli.image_options import ImageOptions
from jaxtransfer.cli.meta import check_episodes_asked, class_splits, episode_options, test_episodes, tested
from jaxtransfer.cli.options import DataDir, at_least, batch_for, check_folder
from jaxtransfer.cli.registry.fewshot import check_episodes, check_ways
from jaxtransfer.cli.runs import Run, beside, check_fits, load_run
from jaxtransfer.cli.scores import as_json, check_out, print_several, print_worst, write_scores
from jaxtransfer.cli.task_scores import evaluate_tasks
from jaxtransfer.cli.together import by_first
from jaxtransfer.devices import processes
from jaxtransfer.errors import InputError
from jaxtransfer.parts.learns import CLASSES, LABELS
from jaxtransfer.runs.configuration import EPISODES


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate a run on every example of a split; prints one JSON line.

    Besides loss and accuracy it has balanced accuracy, F1, likelihood, Brier score,

    top-5 of six classes or more, and the calibration error (15 equal bins).

    A run of `meta` is evaluated on episodes of its test classes.

    One of `contrast` by neighbours and a probe that learn from its own split.

    One of `multitask` on each of its tasks.

    Several data sets make a table, and a line each.

    Example: jaxtransfer evaluate runs/a --data digits/noisy digits/inverted
    """

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory; its best checkpoint is used."""
    data: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: the run's own)")
    ] = ()
    """Data set, as for `pretrain`, a split after @ in place of --split; its classes are found among the run's by their
    names. Of several, domains say, a table has a row each."""
    split: Annotated[
        str | None, tyro.conf.arg(metavar="SPLIT", help_behavior_hint="(default: the run's --eval-split, else test)")
    ] = None
    """Split to evaluate on; slices such as test[:100] work."""
    data_dir: DataDir = None
    """Folder of prepared tfds data sets."""
    batch_size: int = 256
    """Examples at a time."""
    matmul_precision: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the run's)")
    ] = None
    """Of products of matrices and convolutions, as for `pretrain`: default, high or highest."""
    resize: bool = False
    """Bring the images to the run's shape: size, and grey or colour; done anyway where the run says how."""
    worst: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 10 in a terminal, else none)")
    ] = None
    """Classes to list on stderr, the least accurate first."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: none)")] = None
    """Folder for evaluation.json, classes.csv, confusion.csv, and pictures: confusion.png, reliability.png."""
    images: ImageOptions = dataclasses.field(default_factory=ImageOptions)
    distributed: bool = False
    """This is one of several processes that share the examples, as for `pretrain`; the first one prints and writes. It
    does the evaluations of runs of `meta`, `contrast` and `multitask` alone."""

    base: Annotated[
        Path | None, tyro.conf.arg(metavar="RUN", help_behavior_hint="(default: where the delta noted it)")
    ] = None
    """Of a run of a delta the one that it stands on, where that has moved; another one is refused."""
    episodes: int = 1000
    """Episodes, for a run of `meta`."""
    ways: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the run's own)")] = None
    """Classes of an episode, likewise."""
    shots: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the run's own)")] = None
    """Support examples per class, likewise."""
    queries: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the run's own)")] = None
    """Query examples per class, likewise."""

    def run(self) -> None:
        """Evaluates and prints."""
        at_least(self, 1, "batch_size", "episodes", "ways", "shots", "queries")
        at_least(self, 0, "worst")
        check_episodes_asked(self, "episodes")
        check_folder(self.data_dir)
        self.images.check()
        run = load_run(self.directory, tasks=True, base=self.base)
        if run.tasks:
            return by_first(evaluate_tasks)(self, run)
        run = self.images.at_size(run)
        if self.worst is not None and (EPISODES in run.knows or CLASSES not in run.knows):
            raise InputError(f"--worst is for runs that name classes; {self.directory} knows {' and '.join(run.knows)}")
        if LABELS in run.knows:
            raise InputError(
                f"evaluate measures classes, and {self.directory} is a run of labels that hold together; in Python: "
                f"jt.evaluate(jt.multilabel_classification(run.model), ...) of run = jt.load_run(...)"
            )
        check_out(self.out)
        if len(set(self.data)) < len(self.data):
            raise InputError(f"--data: expected each data set once; got {' '.join(self.data)}")
        each = [self._of(number, name) for number, name in enumerate(self.data, 1)] if len(self.data) > 1 else [self]
        if EPISODES not in run.knows:
            for one in each if len(each) > 1 else ():
                one._check_data(run)
        rows = [one._evaluated(run) for one in each]
        if len(rows) > 1:
            by_first(print_several)(rows, self.out)

    def _of(self, number: int, name: str) -> "Evaluate":
        """Returns the same of one of several data sets, with a folder of its own."""
        out = None if self.out is None else self.out / f"{number}-{re.sub(r'[^a-zA-Z0-9.-]+', '-', name)}"
        return dataclasses.replace(self, data=(name,), out=out, worst=self.worst or 0)

    def _evaluated(self, run: Run) -> dict[str, Any]:
        """Evaluates on one data set, prints and writes, and returns what was found."""
        scores = None
        if EPISODES in run.knows:
            facts = processes.first_tells(lambda: self._on_episodes(run))
        elif CLASSES in run.knows:
            facts, scores = self._on_examples(run)
        else:
            facts = processes.first_tells(lambda: self._by_features(run))
        facts = {"run": str(self.directory), "step": run.step, **facts}
        by_first(self._told)(run, facts, scores)
        return facts

    def _told(self, run: Run, facts: dict[str, Any], scores: jt.measures.ClassScores | None) -> None:
        """Writes and prints what was found."""
        if self.out is not None:
            check_out(self.out)
            write_scores(self.out, facts, scores, run.class_names)
        print(as_json(facts))
        worst = self.worst if self.worst is not None else 10 if sys.stderr.isatty() else 0
        if scores is not None and worst:
            print_worst(scores, run.class_names, worst)

    def _check_data(self, run: Run) -> None:
        """Raises for data that can't be evaluated, before another one is; what is to be said is said then."""
        dataset = self._dataset(run)
        if CLASSES in run.knows:
            with warnings.catch_warnings(action="ignore"):
                labelled_as(run, dataset, self.directory)

    @property
    def _name(self) -> str | None:
        """The data set that is asked for; None for the run's own."""
        return self.data[0] if self.data else None

    def _on_episodes(self, run: Run) -> dict[str, Any]:
        check_episodes(run.config, self.directory)
        own = episode_options(run.config, self.data_dir)
        asked = {name: getattr(self, name) for name in ("ways", "shots", "queries") if getattr(self, name) is not None}
        spec = dataclasses.replace(own, **asked)
        check_ways(run.config, spec.ways)
        if self._name is None and self.split is None:
            test = class_splits(own, run.config["seed"])[2]
        else:
            name, split = self._name or own.data, self.split or own.eval_split
            shape, resizing = self.images.for_run(run, name, resize=True)
            test = jt.data.load(name, split, data_dir=self.data_dir, image_shape=shape, resizing=resizing)
        episodes = test_episodes(spec, test, self.episodes, run.config["seed"])
        scores = tested(run, episodes, lambda: class_splits(own, run.config["seed"])[0])
        return {"data": test.name, "split": test.split, **scores}

    def _by_features(self, run: Run) -> dict[str, Any]:
        test = self._dataset(run)
        own = self._name in (None, run.config["data"])
        train = self._dataset(run, run.config["split"] if own else "train")
        if own and run.config["shots"]:
            train = train.subset(per_class=run.config["shots"], seed=run.config["seed"])
        test = test.as_classes(train.class_names, whose=f"{train.name} ({train.split})")
        _, scores = measured(run, train, test, batch_for(test, self.batch_size))
        return {"data": test.name, "split": test.split, "examples": len(test), **scores}

    def _on_examples(self, run: Run) -> tuple[dict[str, Any], jt.measures.ClassScores]:
        dataset = labelled_as(run, self._dataset(run), self.directory)
        batches = jt.data.eval_batches(dataset, batch_for(dataset, self.batch_size))
        evaluate = jt.eval_step(jt.classification(run.model), measures=jt.measures.classification(run.model))

        def evaluated(one: Run) -> tuple[dict[str, Any], jt.measures.ClassScores]:
            metrics = evaluate(jt.TrainState.of(one.params, one.state, step=one.step), batches)
            scores = metrics.pop("scores")
            return {**scores.summary(), **metrics}, scores

        metrics, scores = evaluated(run)
        facts = {"data": dataset.name, "split": dataset.split, "examples": len(dataset), **metrics}
        for name, other in beside(run, self.base).items():
            facts[name] = evaluated(self.images.at_size(other))[0]
        return facts, scores

    def _dataset(self, run: Run, split: str | None = None) -> jt.data.Dataset:
        """Returns the split that was asked for, or another one of the same data, its images of the run's shape."""
        if wrong := [f"--{name}" for name in ("ways", "shots", "queries") if getattr(self, name) is not None]:
            raise InputError(f"{wrong[0]} is for runs of meta; {self.directory} knows {' and '.join(run.knows)}")
        name = self._name or run.config["data"]
        usual = run.config.get("eval_split", "test") if self._name is None else "test"
        split = split or self.split or str(usual)
        if self._name is not None:  # a domain that is a split of its data set names it
            name, split, *_ = part_of(name, split, None)
        resize = self.resize or bool(run.config.get("resize"))
        shape, resizing = self.images.for_run(run, name, resize=resize)
        dataset = jt.data.load(name, split, data_dir=self.data_dir, image_shape=shape, resizing=resizing)
        check_fits(run, dataset, self.directory)
        return dataset
