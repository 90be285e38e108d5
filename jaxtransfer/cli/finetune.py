"""`jaxtransfer finetune`: move what a run has learned to another data set."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

import jaxtransfer as jt
from jaxtransfer.cli.classes import pick_classes, places_in, with_classes_of
from jaxtransfer.cli.options import DataOptions, TrainOptions, at_least, config_of, load_pair, positive
from jaxtransfer.cli.runs import Run, architecture, build_model, check_fits, check_knows_classes, load_run
from jaxtransfer.cli.stages import train_stages
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.runs.configuration import CLASSES

METHODS: dict[str, Callable] = {  # where a name on the command line becomes code
    "full": lambda make: jt.methods.full(make.model, make.optimizer, **make.loss),
    "linear-probe": lambda make: jt.methods.linear_probe(make.model, make.optimizer, **make.loss),
    "lp-ft": lambda make: make.lp_ft(),
    "l2-sp": lambda make: make.anchored(),
    "l2-sp-fisher": lambda make: make.anchored(fisher=make.fisher()),
    "layerwise-decay": lambda make: jt.methods.discriminative(make.model, make.optimizer, **make.loss),
    "gradual-unfreeze": lambda make: jt.methods.gradual(
        make.model, make.optimizer, every=max(1, make.steps // (2 * len(make.model.stages))), **make.loss
    ),
}


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Start from the weights of a run and train on another data set.

    Example: jaxtransfer finetune --from runs/a --data digits/noisy --out runs/b
    """

    source: Annotated[Path, tyro.conf.arg(name="from", metavar="RUN")]
    """Run directory to start from: its best checkpoint."""
    data: DataOptions
    training: TrainOptions
    method: Annotated[str, tyro.conf.arg(metavar="NAME")] = "full"
    """How to move the weights:
    - full: train all of them.
    - linear-probe: train the head on frozen features, in inference mode.
    - lp-ft: linear-probe for half of the steps, then full (Kumar et al. 2022).
    - l2-sp: full, drawn back to the source's weights (Li et al. 2018).
    - l2-sp-fisher: l2-sp, each weight by its importance for the source.
    - layerwise-decay: full, lower layers more slowly (Howard & Ruder 2018).
    - gradual-unfreeze: the head first, then layer by layer (the same); frozen ones in inference mode.
    Inference mode: batch norm by its running statistics, which stay, and no dropout.
    """
    head_rate: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: --lr)")] = None
    """Peak learning rate of the head, a new one's say, where it differs from that of the body."""
    strength: float = 0.1
    """Of the pull of l2-sp and l2-sp-fisher to the pretrained weights."""
    head_strength: float = 0.01
    """Of the decay of a new head under l2-sp and l2-sp-fisher."""
    keep_head: bool = False
    """Keep the source's head for the classes of the same names; otherwise a new one starts afresh."""
    resize: bool = False
    """Bring the images to the source's shape: size, and grey or colour."""

    def run(self) -> None:
        """Trains, or resumes, or says that it is done."""
        self.training.check()
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        at_least(self, 0, "strength", "head_strength")
        positive(self, "head_rate")
        source = load_run(self.source)
        if self.keep_head:
            check_knows_classes(source, self.source, "--keep-head keeps the source's classes")
        if self.method == "l2-sp-fisher":
            check_knows_classes(source, self.source, "--method l2-sp-fisher weighs by the source's own loss")
        shape = tuple(source.config["image_shape"]) if self.resize else None
        train, test = load_pair(self.data, shape, seed=self.training.seed, batch_size=self.training.batch_size)
        check_fits(source, train, self.source)
        check_fits(source, test, self.source)
        training = self.training.for_data(len(train), self.training.batch_size)
        config = config_of(
            "finetune",
            self.data,
            training,
            source=self.source,
            source_step=source.step,
            method=self.method,
            strength=self.strength,
            head_strength=self.head_strength,
            head_rate=self.head_rate,
            keep_head=self.keep_head,
            resize=self.resize,
            knows=[CLASSES],
            class_names=list(train.class_names),
            **architecture(source.config),
        )
        model = build_model(config)
        kept, places = _kept(self, source, train) if self.keep_head else (source, None)
        params, state = _start(self, kept, model, train)
        command, anchor = dataclasses.replace(self, training=training), {model.name: kept.params[source.model.name]}
        make = Ingredients(command, source, model, anchor, places)
        train_stages(
            METHODS[self.method](make),
            config,
            training,
            train,
            test,
            eval_model=model,
            title=f"finetune {config['model']} on {self.data.data} by {self.method}",
            params={model.name: params},
            state={model.name: state},
        )


def _start(command: Finetune, source: Run, model: jt.Model, train: jt.data.Dataset) -> tuple[Any, Any]:
    """Returns the weights and statistics to start from: the source's, with a fresh head unless it is kept."""
    key = jax.random.key(command.training.seed)
    fresh = model.init(key, train.read([0])["image"])
    reinit = () if command.keep_head else model.head
    params = jt.transfer(source.params[source.model.name], fresh["params"], reinit=reinit).params
    return params, source.state[source.model.name]


def _kept(command: Finetune, source: Run, train: jt.data.Dataset) -> tuple[Run, np.ndarray]:
    """Returns the source with its head for the classes of the data, and where they stood in it."""
    try:
        found = places_in(source, train, command.source)
    except InputError as error:
        raise InputError(
            f"--keep-head needs the same classes: {command.source} has {len(source.config['class_names'])}, "
            f"{train.name} has {train.classes}; leave it out to start with a new head: {error}"
        ) from None
    return with_classes_of(source, train, command.source, found), found.places


@dataclasses.dataclass(frozen=True)
class Ingredients:
    """What a method is made of."""

    command: Finetune
    source: Run
    model: jt.Model
    anchor: Any
    places: np.ndarray | None  # of the classes in the source, where its head is kept

    @property
    def steps(self) -> int:
        """Updates in all."""
        return self.command.training.updates

    @property
    def optimizer(self):
        """The optimiser, its schedule over all steps."""
        return self.optimizer_for(self.steps)

    def optimizer_for(self, steps: int):
        """Returns the optimiser with a schedule over `steps`; the head has its own rate where one is asked for."""
        training, rate = self.command.training, self.command.head_rate
        optimizer = training.optimizer_for(steps)
        if rate is None:
            return optimizer
        return jt.optim.scale_rate(optimizer, rate / training.lr, f"{self.model.name}/(?:{self.model.head})")

    @property
    def loss(self) -> dict[str, Any]:
        """Arguments of `classification`."""
        return {"label_smoothing": self.command.training.label_smoothing}

    def lp_ft(self):
        """Returns the two stages of LP-FT, each with half of the steps and a schedule of its own."""
        probe, rest = (self.optimizer_for(n) for n in jt.methods.split_steps(self.steps, [0.5, 0.5]))
        return jt.methods.lp_ft(self.model, rest, probe_optimizer=probe, **self.loss)

    def anchored(self, fisher: Any = None):
        """Returns the stage under L2-SP, weighted by the Fisher diagonal where one is given."""
        return jt.methods.anchored(
            self.model,
            self.optimizer,
            self.anchor,
            fisher=fisher,
            strength=self.command.strength,
            head_strength=self.command.head_strength,
            new_head=not self.command.keep_head,
            **self.loss,
        )

    def fisher(self) -> Any:
        """Returns the Fisher diagonal of the source's weights on (up to 2,000 of) the source's own data."""
        config = self.source.config
        data = jt.data.load(
            config["data"],
            config["split"],
            data_dir=self.command.data.data_dir,
            image_shape=tuple(config["image_shape"]),
        ).take(2000)
        data = data.as_classes(config["class_names"], whose=str(self.command.source))
        batches = jt.data.eval_batches(data, min(50, len(data)))
        objective = jt.classification(self.source.model)
        fisher = jt.fisher_diagonal(objective, self.source.params, self.source.state, batches)
        if self.places is None:
            return fisher
        return {name: pick_classes(config, values, self.places) for name, values in fisher.items()}
