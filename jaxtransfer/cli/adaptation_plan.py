"""What a run of `adapt` consists of: its network, the weights that it starts from, its configuration, batches."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

import jaxtransfer as jt
from jaxtransfer.cli.domains import LABELLED, TARGET, Domains
from jaxtransfer.cli.image_options import noted
from jaxtransfer.cli.options import TrainOptions, config_of, statistics
from jaxtransfer.cli.registry.adaptation import METHODS, SELECTIONS, Adaptation, Ingredients
from jaxtransfer.cli.registry.augmentations import MIXES, augmentation
from jaxtransfer.cli.runs import Run, architecture, build_model
from jaxtransfer.cli.settings import made_by
from jaxtransfer.runs.configuration import CLASSES
from jaxtransfer.runs.console import announcer

if TYPE_CHECKING:
    from jaxtransfer.cli.adapt import Adapt

SMALL = "small-cnn"
"""The network that is trained where none is asked for."""
BESIDE = "source-only"
"""The method that adaptation is compared with, and the folder of its run."""


class Plan(NamedTuple):
    """What a run is made of.

    Attributes:
      config: of the run.
      model: what trains.
      training: the options, with their steps.
      make: what methods are built from.
      domains: the data.
      params: weights to start from, by model name; None for new ones.
      state: statistics, likewise.
    """

    config: dict[str, Any]
    model: jt.Model
    training: TrainOptions
    make: Ingredients
    domains: Domains
    params: Any
    state: Any

    def batches(self, method: str) -> jt.data.Zipped:
        """Returns the batches that a method reads: of the sources, the target, and its labelled examples."""
        facts, size = METHODS[method].facts, self.training.batch_size
        parts = {} if facts.source_free else dict(self.domains.sources)
        if facts.adapts:
            parts[TARGET] = self.domains.target.with_columns({"index": np.arange(len(self.domains.target))})
        streams = {name: self._pipeline(name, one, size) for name, one in parts.items()}
        if self.domains.labelled is not None:
            count, devices = len(self.domains.labelled), jax.device_count()
            few = min(size, -(-count // devices) * devices)
            streams[LABELLED] = self._pipeline(LABELLED, self.domains.labelled, few)
        return jt.data.zipped(streams)

    def fit(
        self,
        made: Adaptation,
        batches: Any,
        measure: Any,
        out: Path,
        *,
        monitor: str | None,
        config: Any,
        every: Any = None,
    ) -> jt.Fitted:
        """Trains what a method made, or resumes.

        Args:
          made: by the method.
          batches: that it reads.
          measure: what is noted of the state now and then.
          out: the run directory.
          monitor: the metric that chooses the step; None for the last one.
          config: of the run.
          every: steps between measurements; by default as the options say.
        """
        training = self.training
        return jt.fit(
            made.objective,
            made.optimizer,
            batches,
            steps=training.updates,
            key=training.seed,
            params=self.params,
            state=self.state,
            measure=measure,
            measure_every=every or training.eval_every or max(1, training.updates // 10),
            monitor=monitor,
            patience=training.patience if monitor is not None else None,
            refresh=made.refresh,
            transform=made.transform,
            out=out,
            config=config,
            keep=training.keep,
            **training.where,
            log=announcer(),
            **training.looked_at,
        )

    def _pipeline(self, name: str, dataset: jt.data.Dataset, rows: int) -> jt.data.Pipeline:
        """Returns the batches of a domain, in an order of its own, so that pairs of domains stay unknown."""
        own = np.random.SeedSequence([self.training.seed, *name.encode()]).generate_state(1)[0]
        names, labelled = self.training.augment, "label" in dataset.entries
        chosen = names if labelled else tuple(one for one in names if one not in MIXES)  # no labels to mix
        steps = [augmentation(chosen, dataset)] if chosen else []
        if "mixup" in names:  # gives images in [0, 1], which the others join in one batch
            steps.append(jt.data.augment.normalize(0.0, 1.0))
        by = "label" if labelled and self.training.balance else None
        transform = jt.data.augment.compose(*steps) if steps else None
        return jt.data.pipeline(dataset, rows, seed=int(own), augment=transform, balance=by)


def planned(command: "Adapt", start: Run | None, domains: Domains) -> Plan:
    """Returns what a run consists of.

    Args:
      command: its options.
      start: what to start from; None for new weights.
      domains: the data.
    """
    facts = METHODS[command.method].facts
    training = command.training.for_data(
        max(map(len, domains.sources.values() or [domains.target])), command.training.batch_size
    )
    shown = domains.test or next(iter(domains.held.values()), domains.target)
    learned = (
        domains.target if domains.test is not None or not domains.sources else next(iter(domains.sources.values()))
    )
    config = config_of(
        "adapt",
        command.domains,
        training,
        **made_by("adapt", command),
        method=command.method,
        strength=facts.strength if command.strength is None else command.strength,
        start=command.start,
        start_step=None if start is None else start.step,
        select=command.select,
        knows=[CLASSES],
        class_names=list(domains.class_names),
        data=shown.name,
        split=learned.split,
        eval_split=shown.split,
        shots=None,
        resize=True,
    )
    if start is not None:
        config |= architecture(start.config)
    else:
        mean, std = _statistics(list(domains.sources.values()))
        config |= {"model": command.model or SMALL, "mean": mean, "std": std}
        config["image_shape"] = list(domains.target.image_shape)
    config |= noted(config, domains.resizing) | command.storage.model_options_over(config)
    if (metric := SELECTIONS[command.select].facts.metric) is not None:
        config["monitor"] = metric
    model = build_model(config)
    params, state = _start(start, model, domains, training.seed)
    make = Ingredients(
        model,
        () if facts.source_free else tuple(domains.sources),
        TARGET,
        None if domains.labelled is None else LABELLED,
        examples=len(domains.target),
        image_shape=domains.target.image_shape,
        optimizer_for=lambda steps: command.storage.mover(training.optimizer_for(steps), config),
        steps=training.updates,
        strength=config["strength"] or 0.0,
        label_smoothing=training.label_smoothing,
        eval_target=jt.data.eval_batches(domains.target, min(training.batch_size, len(domains.target))),
    )
    return Plan(config, model, training, make, domains, params, state)


def _start(start: Run | None, model: jt.Model, domains: Domains, seed: int) -> tuple[Any, Any]:
    """Returns the weights and statistics to start from; with a new head, unless the classes are the run's own."""
    if start is None:
        return None, None
    fresh = model.init(jax.random.key(seed), domains.target.read([0])["image"])
    same = CLASSES in start.knows and start.class_names == domains.class_names
    weights = jt.transfer(start.params[start.model.name], fresh["params"], reinit=() if same else model.head).params
    return {model.name: weights}, {model.name: start.state[start.model.name]}


def _statistics(sets: list[jt.data.Dataset]) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation of the images of all sources, each source counting the same."""
    means, stds = (np.array(values) for values in zip(*map(statistics, sets), strict=True))
    mean = means.mean(axis=0)
    std = np.sqrt((stds**2 + means**2).mean(axis=0) - mean**2)
    return [round(float(m), 4) for m in mean], [round(float(s), 4) for s in std]
