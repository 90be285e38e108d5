"""Fine-tuning methods by name. A row is built from `Ingredients` into the phases that train."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import jaxtransfer as jt
from jaxtransfer.cli.classes import pick_classes
from jaxtransfer.cli.registry.row import Row
from jaxtransfer.cli.runs import Run
from jaxtransfer.errors import InputError

if TYPE_CHECKING:
    from jaxtransfer.cli.finetune import Finetune


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """What the command knows of a fine-tuning method.

    Attributes:
      weighs: whether it weighs by the source's own loss, so that the source must know classes.
      probes: whether the head trains alone, at first at least.
      strength: the usual one of its penalty; None where it has none.
      decays: whether a new head decays by --head-strength.
    """

    weighs: bool = False
    probes: bool = False
    strength: float | None = None
    decays: bool = False

    @property
    def unused(self) -> tuple[str, ...]:
        """The options of the command that mean nothing to it."""
        return (*(["strength"] if self.strength is None else []), *([] if self.decays else ["head_strength"]))


METHODS: dict[str, Row[Finetuning]] = {
    "full": Row(
        lambda make: jt.methods.full(make.model, make.optimizer, **make.loss), "train all of them", Finetuning()
    ),
    "linear-probe": Row(
        lambda make: jt.methods.linear_probe(make.model, make.optimizer, **make.loss),
        "train the head on frozen features",
        Finetuning(probes=True),
    ),
    "lp-ft": Row(
        lambda make: make.lp_ft(),
        "linear-probe for half of the steps, then full",
        Finetuning(probes=True),
        "Kumar et al. 2022",
    ),
    "l2-sp": Row(
        lambda make: make.anchored(),
        "full, drawn back to the source's weights",
        Finetuning(strength=0.1, decays=True),
        "Li et al. 2018",
    ),
    "l2-sp-fisher": Row(
        lambda make: make.anchored(fisher=make.fisher()),
        "l2-sp, each weight by its importance for the source",
        Finetuning(weighs=True, strength=0.1, decays=True),
    ),
    "delta": Row(
        lambda make: make.delta(),
        "full, feature maps held at the source's",
        Finetuning(strength=0.01, decays=True),
        "Li et al. 2019",
    ),
    "bss": Row(
        lambda make: jt.methods.bss(make.model, make.optimizer, strength=make.strength, **make.loss),
        "full, the weakest directions of the features shrunk",
        Finetuning(strength=0.001),
        "Chen et al. 2019",
    ),
    "layerwise-decay": Row(
        lambda make: jt.methods.discriminative(make.model, make.optimizer, **make.loss),
        "full, lower layers more slowly",
        Finetuning(),
        "Howard & Ruder 2018",
    ),
    "gradual-unfreeze": Row(
        lambda make: jt.methods.gradual(make.model, make.optimizer, every=make.period, **make.loss),
        "the head first, then layer by layer",
        Finetuning(),
        "Howard & Ruder 2018",
    ),
}


@dataclasses.dataclass(frozen=True)
class Ingredients:
    """What a method is made of."""

    command: "Finetune"
    source: Run
    model: jt.Model
    anchor: Any
    places: np.ndarray | None  # of the classes in the source, where its head is kept
    weights: np.ndarray | None = None  # of the classes in the loss

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
        optimizer = training.optimizer_for(steps, self.command.difference.around)
        if rate is None:
            return optimizer
        return jt.optim.scale_rate(optimizer, rate / training.lr, f"{self.model.name}/(?:{self.model.head})")

    @property
    def period(self) -> int:
        """Batches between two unfreezings, a whole number of updates: all stages train for half of the steps."""
        together = self.command.training.accumulate or 1
        return max(1, self.steps // (2 * len(self.model.stages)) // together) * together

    @property
    def loss(self) -> dict[str, Any]:
        """Arguments of `classification`."""
        return {"label_smoothing": self.command.training.label_smoothing, "weight": self.weights}

    def lp_ft(self):
        """Returns the two stages of LP-FT, each with half of the steps and a schedule of its own."""
        probe, rest = (self.optimizer_for(n) for n in jt.methods.split_steps(self.steps, [0.5, 0.5]))
        return jt.methods.lp_ft(self.model, rest, probe_optimizer=probe, **self.loss)

    @property
    def strength(self) -> float:
        """Of the method's penalty."""
        return strength_of(self.command)

    def delta(self):
        """Returns the phase under DELTA, in its plain form, on the maps of the stages, or on the features."""
        image = jax.ShapeDtypeStruct((1, *self.source.config["image_shape"]), np.uint8)
        before = self.source.model
        variables = {"params": self.source.params[before.name], **self.source.state[before.name]}
        frozen = jt.frozen(before.named(f"{before.name}_source"), variables)
        shapes = jt.shapes_of(jt.Forward.of(frozen), {"image": image})
        taps = tuple(name for name in shapes if name.startswith("stage")) or ("features",)
        return jt.methods.delta(
            self.model,
            self.optimizer,
            frozen,
            taps=taps,
            strength=self.strength,
            head_strength=self.command.head_strength,
            new_head=not self.command.keep_head,
            **self.loss,
        )

    def anchored(self, fisher: Any = None):
        """Returns the stage under L2-SP, weighted by the Fisher diagonal where one is given."""
        return jt.methods.anchored(
            self.model,
            self.optimizer,
            self.anchor,
            fisher=fisher,
            strength=self.strength,
            head_strength=self.command.head_strength,
            new_head=not self.command.keep_head,
            **self.loss,
        )

    def fisher(self) -> Any:
        """Returns the Fisher diagonal of the source's weights on (up to 2,000 of) the source's own data."""
        config = self.source.config
        where = {"data_dir": self.command.data.data_dir, "resizing": self.source.resizing}
        try:
            data = jt.data.load(config["data"], config["split"], image_shape=tuple(config["image_shape"]), **where)
        except InputError as error:
            raise InputError(
                f"--method {self.command.method} measures how much each weight matters on the data that "
                f"{self.command.source} was trained on, and those can't be loaded: {error}. Take --method l2-sp, or in "
                f"Python jt.fisher_diagonal(objective, params, state, batches)"
            ) from None
        data = data.take(2000)
        data = data.as_classes(config["class_names"], whose=str(self.command.source))
        batches = jt.data.eval_batches(data, min(50, len(data)))
        objective = jt.classification(self.source.model)
        fisher = jt.fisher_diagonal(objective, self.source.params, self.source.state, batches)
        if self.places is None:
            return fisher
        return {name: pick_classes(config, values, self.places) for name, values in fisher.items()}


def strengths() -> str:
    """Returns what follows the help of --strength: the usual one of each method that has a penalty."""
    usual = {name: row.facts.strength for name, row in METHODS.items() if row.facts.strength is not None}
    return f"(default: {', '.join(f'{value:g} of {name}' for name, value in usual.items())})"


def strength_of(command: "Finetune") -> float:
    """Returns the strength that is asked for, or the method's usual one; 0.1 where it has no penalty."""
    usual = METHODS[command.method].facts.strength
    return next(value for value in (command.strength, usual, 0.1) if value is not None)
