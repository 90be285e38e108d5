"""`jaxtransfer adapt`: from a labelled domain to one without labels, or with few of them."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

import jaxtransfer as jt
from jaxtransfer.cli.adaptation_plan import BESIDE, SMALL, Plan, planned
from jaxtransfer.cli.adaptation_report import Before, Outcome, before_of, check_comparable, reported
from jaxtransfer.cli.domain_scores import DomainScores
from jaxtransfer.cli.domains import DomainOptions, Domains, common_shape, load_domains
from jaxtransfer.cli.dry_run import end_dry_run
from jaxtransfer.cli.image_options import CropOptions
from jaxtransfer.cli.options import TrainOptions, at_least, check_memory
from jaxtransfer.cli.registry.adaptation import LAST, METHODS, SELECTIONS
from jaxtransfer.cli.registry.row import choices, row_of
from jaxtransfer.cli.runs import Run, check_knows_classes, load_run
from jaxtransfer.cli.seeds import check_seeds, run_each
from jaxtransfer.cli.sources import network_of, read_source
from jaxtransfer.cli.stages import check_model_takes
from jaxtransfer.cli.storage import StorageOptions
from jaxtransfer.cli.together import by_first
from jaxtransfer.cli.values import check_network
from jaxtransfer.errors import InputError
from jaxtransfer.resizing import STRETCH
from jaxtransfer.runs.configuration import CLASSES
from jaxtransfer.runs.console import facts_of, print_results
from jaxtransfer.runs.directory import open_run

NONE = "none"
COMPARES = (BESIDE, NONE)


@dataclasses.dataclass(frozen=True)
class SeedOptions:
    """How often to do it."""

    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...", help_behavior_hint="(default: --seed)")] = ()
    """Several runs, one for each seed, in OUT/seed-N; their mean and its interval go to OUT/report.md and
    OUT/summary.json."""


@dataclasses.dataclass(frozen=True)
class Adapt:
    """Adapt a classifier to a domain of which few labels are known, or none.

    Labels of the target, where there are some, test the result;

    they neither train it nor choose its step, unless that is asked for.

    Example: jaxtransfer adapt --source A --target B --method mcc --out runs/a
    """

    domains: DomainOptions
    training: TrainOptions
    recipe: SeedOptions
    method: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint=choices(METHODS))] = "source-only"
    """How to adapt. A batch has --batch-size examples of each domain."""
    strength: Annotated[
        float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: the usual one of --method)")
    ] = None
    """Weight of what the method adds to the loss on the source."""
    start: Annotated[
        str | None, tyro.conf.arg(name="from", metavar="SOURCE", help_behavior_hint="(default: from scratch)")
    ] = None
    """Weights to start from, as for finetune; a run of the same classes keeps its head."""
    model: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=f"(default: {SMALL}, or as --from says)")
    ] = None
    """Network; `jaxtransfer models` lists them."""
    image_shape: Annotated[
        tuple[int, int, int] | None,
        tyro.conf.arg(metavar="H W C", help_behavior_hint="(default: the source's own, or as --from says)"),
    ] = None
    """Bring the images of all domains to this height, width and number of channels (1 grey, 3 colour). Domains whose
    images differ are brought to the size of the first source, in colour where one of them is."""
    images: CropOptions = dataclasses.field(default_factory=CropOptions)
    select: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint=choices(SELECTIONS))] = LAST
    """Which step to keep as the result."""
    compare: Annotated[str, tyro.conf.arg(metavar="NAME")] = BESIDE
    """What the report compares with: source-only, trained beside with the same options in OUT/source-only (a method
    that does without the source is compared with its start); a run directory; or none."""
    tsne: bool = False
    """Draw the domains' features by t-SNE; by principal components otherwise."""
    storage: StorageOptions = dataclasses.field(default_factory=StorageOptions)

    def run(self) -> None:
        """Trains, or resumes, or says that it is done; then reports."""
        self._check()
        if self.recipe.seeds:
            return run_each("adapt", self)
        start = self._start()
        domains = self._load(start)
        plan = planned(self, start, domains)
        training, out = plan.training, self.training.out
        with open_run(out, plan.config):
            check_model_takes(plan.model, plan.config["model"], domains.target)
            made = METHODS[self.method].build(plan.make)
            batches = plan.batches(self.method)
            if self.compare not in COMPARES:
                check_comparable(load_run(Path(self.compare)), domains)
            measure = DomainScores(plan.model, domains, training.batch_size, self._scores())
        for note in domains.notes:
            print(note, file=sys.stderr)
        training.say_steps()
        compared = (lambda: None) if training.dry_run else self._compared(plan, start, measure)
        chosen = SELECTIONS[self.select].facts
        fitted = plan.fit(made, batches, measure, out, monitor=chosen.metric, config=plan.config)
        end_dry_run(training, fitted)
        by_first(self._reported)(plan, fitted, compared, measure)

    def _reported(self, plan: Plan, fitted: jt.Fitted, compared: Callable[[], Before | None], measure: Any) -> None:
        """Writes the report."""
        out, domains, before = self.training.out, plan.domains, compared()
        outcome = Outcome(out, self.method, self.select, fitted, before, measure, domains)
        page, told = reported(outcome, facts_of(plan.config), tsne=self.tsne)
        print_results(out, fitted, page)
        print(told)

    def _check(self) -> None:
        """Raises for what no run can be, before anything is loaded."""
        for options in (self.training, self.storage, self.domains, self.images):
            options.check()
        check_seeds(self.training, self.recipe.seeds)
        row, chosen = row_of("method", self.method, METHODS).facts, row_of("select", self.select, SELECTIONS).facts
        at_least(self, 0, "strength")
        if self.strength is not None and row.strength is None:
            raise InputError(f"--strength: {self.method} has none; leave it out")
        names = self.domains.names
        if not names and not row.source_free:
            raise InputError(f"--method {self.method} learns from a source; name it: --source, or --sources")
        if row.source_free and self.start is None:
            raise InputError(
                f"--method {self.method} adapts a run that knows the source's classes; name it: --from RUN"
            )
        if row.one_source and len(names) > 1:
            raise InputError(f"--method {self.method} takes one source; got {len(names)}: {' '.join(names)}")
        if row.several and len(names) < 2:
            raise InputError(f"--method {self.method} is of several sources; name them: --sources A B")
        if row.target_labels and self.domains.target_shots is not None:
            raise InputError(f"--target-shots: {self.method} learns from all labels of the target; leave it out")
        if row.source_free and self.domains.target_shots is not None:
            raise InputError(f"--target-shots: {self.method} learns from no labels; leave it out")
        if row.turns and self.domains.target_shots is not None:
            raise InputError(f"--target-shots: the updates of {self.method} alternate, and take no further loss")
        for option in row.without:
            if option in self._labels_asked:
                raise InputError(f"{self._labels_asked[option]}: {self.method} has no use for it; leave it out")
        if chosen.source and not names:
            raise InputError(f"--select {self.select} looks at the source; name it: --source")
        if self.training.patience is not None and chosen.metric is None:
            raise InputError("--patience stops for want of a better score; say by which: --select")
        if self.compare not in COMPARES and not Path(self.compare).is_dir():
            raise InputError(f"--compare takes {', '.join(COMPARES)} or a run directory; there is no {self.compare}")
        if self.start is None:
            check_network(self.model or SMALL)

    @property
    def _labels_asked(self) -> dict[str, str]:
        """The options that say how labels are learned from, of those that were given: as they were, by name."""
        training = self.training
        asked = {"label-smoothing": training.label_smoothing, "balance": training.balance}
        options = {name: f"--{name} {value}" for name, value in asked.items() if value}
        return options | {name: f"--augment {name}" for name in training.augment}

    def _start(self) -> Run | None:
        """Returns what to start from; None for new weights."""
        if self.start is None:
            return None
        if self.image_shape is not None:
            raise InputError("--image-shape: --from says which images its weights take; leave it out")
        source_free = METHODS[self.method].facts.source_free
        found = read_source(self.start, network_of(self.start, self.model), needs_head=source_free)
        if source_free:
            check_knows_classes(found, self.start, f"--method {self.method} adapts a classifier")
        return found

    def _load(self, start: Run | None) -> Domains:
        """Returns the domains, their images as the network takes them."""
        told, names = "", ()
        if start is not None:
            shape = tuple(start.config["image_shape"])
            resizing = self.images.resizing_over(start.resizing)
            names = start.class_names if CLASSES in start.knows else ()
        elif self.image_shape is not None:
            shape, resizing = self.image_shape, self.images.resizing_over(STRETCH)
        else:
            usual = self.images.resizing_over(jt.data.Resizing())
            shape, several, told = common_shape(self.domains, jt.models.ZOO[self.model or SMALL].image, usual)
            resizing = usual if several else None if shape is None else self.images.resizing_over(STRETCH)
            if self.images.asked and shape is None:
                raise InputError(
                    "--crop and --interpolation say how images are resized; add --image-shape to say to what"
                )
        facts = METHODS[self.method].facts
        domains = load_domains(
            self.domains,
            shape,
            resizing,
            known=names,
            keeps=facts.source_free,
            labels=facts.target_labels,
            unknown=facts.unknown,
            seed=self.training.seed,
        )
        check_memory(self.training.batch_size, domains.target.image_shape)
        if domains.test is None and SELECTIONS[self.select].facts.target_labels:
            raise InputError(
                f"--select {self.select} reads the target's labels, and {domains.target.title} has none that are "
                f"known; choose without them: {', '.join(name for name in SELECTIONS if name != self.select)}"
            )
        return domains._replace(notes=(*([told] if told else []), *domains.notes))

    def _scores(self) -> dict[str, Any]:
        """Returns the score without target labels that chooses the step, by the name of its metric."""
        row = SELECTIONS[self.select]
        score = row.build()
        return {} if score is None or row.facts.metric is None else {row.facts.metric: score}

    def _compared(self, plan: Plan, start: Run | None, measure: DomainScores) -> Callable[[], Before | None]:
        """Trains what adaptation is compared with, and returns what gives it; None for nothing."""
        facts = METHODS[self.method].facts
        if self.compare not in COMPARES:
            return lambda: before_of(load_run(Path(self.compare)), self.compare, measure)
        if not facts.adapts or self.compare == NONE:
            return lambda: None
        if facts.source_free:
            assert start is not None
            return functools.partial(before_of, start, "before adaptation", measure)
        out = self.training.out / BESIDE
        made = METHODS[BESIDE].build(plan.make)
        config = {name: value for name, value in plan.config.items() if name != "monitor"}
        config |= {"method": BESIDE, "select": LAST, "strength": None}
        last = DomainScores(plan.model, measure.domains, plan.training.batch_size)
        plan.fit(made, plan.batches(BESIDE), last, out, monitor=None, config=config, every=plan.training.updates)
        return lambda: before_of(load_run(out), "source only", measure)
