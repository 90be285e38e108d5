"""Few-shot methods by name: what trains, and what is tested on episodes of new classes.

A row is built from `Ingredients` into a `Learner`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

import jaxtransfer as jt
from jaxtransfer.cli.registry.row import Row
from jaxtransfer.errors import InputError
from jaxtransfer.runs.configuration import (
    COUNT,
    COUNT_OR_NONE,
    ENTRIES,
    SWITCH,
    Rule,
    check_entry,
    lacks,
    list_of,
    number,
    or_none,
    whole,
)


class Learner(NamedTuple):
    """A few-shot learner of a configuration.

    Attributes:
      train: the objective that trains, over episodes or over labelled batches.
      validate: the objective over episodes that chooses the checkpoint.
      test: `test(state, base)` gives the objective over episodes of new classes; `base()` gives batches of the
        training classes.
    """

    train: jt.Objective
    validate: jt.Objective
    test: Callable[[jt.TrainState, Callable[[], Iterable[Any]]], jt.Objective]


@dataclasses.dataclass(frozen=True)
class FewShot:
    """What the command knows of a few-shot method.

    Attributes:
      steps: of the inner loop or of the head's training, where the option is left out.
      rate: its learning rate, likewise.
      fixed_ways: whether the network's outputs are the ways, so that training and test have the same number.
      labelled: whether it trains on labelled batches of the training classes; otherwise on episodes.
    """

    steps: int = 1
    rate: float = 0.4
    fixed_ways: bool = False
    labelled: bool = False


class Ingredients(NamedTuple):
    """What a learner is made of: a model and the run's configuration."""

    model: jt.Model
    config: dict[str, Any]

    @property
    def classify(self) -> jt.Objective:
        """The loss of one task or of one labelled batch."""
        return jt.classification(self.model)

    def adapting(self, *, multi_step: Callable[..., jax.Array] | None = None, **options: Any) -> Learner:
        """Returns MAML, in one of its forms; tests look at the last step alone."""
        inner = options.pop("inner", optax.sgd(self.config["inner_lr"]))
        statistics = options.pop("statistics", STATISTICS[self.config["statistics"]])

        def objective(steps: int, **more: Any) -> jt.Objective:
            return jt.maml(
                self.classify, inner=inner, steps=steps, statistics=statistics, at_once=_at_once(), **options, **more
            )

        return _episodic(
            objective(self.config["inner_steps"], multi_step=multi_step), objective(self.config["test_steps"])
        )

    def metric(self, build: Callable[..., jt.Objective], *more: Any) -> Learner:
        """Returns a learner that trains on as many ways as asked and tests on `ways`."""
        return _episodic(
            build(self.model, *more, ways=self.config["train_ways"]), build(self.model, *more, ways=self.config["ways"])
        )

    def baseline(self, train: jt.Objective, test: jt.Objective) -> Learner:
        """Returns a learner whose encoder trains by ordinary classification of the training classes."""
        return Learner(train, test, lambda state, base: test)

    @property
    def head(self) -> dict[str, Any]:
        """How a fresh head trains on the support."""
        return {
            "ways": self.config["ways"],
            "optimizer": optax.adam(self.config["inner_lr"]),
            "steps": self.config["inner_steps"],
        }


def _relation(make: Ingredients) -> Learner:
    return make.metric(jt.meta.relation, jt.models.relation_net())


def _simpleshot(make: Ingredients) -> Learner:
    def test(center: Any = None) -> jt.Objective:
        return jt.meta.simpleshot(make.model, ways=make.config["ways"], center=center)

    def centred(state: jt.TrainState, base: Callable[[], Iterable[Any]]) -> jt.Objective:
        return test(jt.meta.mean_features(make.model, state.params, state.state, base()))

    return Learner(make.classify, test(), centred)


def _reptile(make: Ingredients) -> Learner:
    def objective(steps: int) -> jt.Objective:
        inner = optax.adam(make.config["inner_lr"], b1=0.0)
        statistics = STATISTICS[make.config["statistics"]]
        return jt.meta.reptile(make.classify, inner=inner, steps=steps, statistics=statistics, at_once=_at_once())

    return _episodic(objective(make.config["inner_steps"]), objective(make.config["test_steps"]))


def _implicit(make: Ingredients) -> Learner:
    def objective(steps: int) -> jt.Objective:
        return jt.meta.implicit_maml(
            make.classify,
            inner=optax.sgd(make.config["inner_lr"]),
            steps=steps,
            strength=2.0,
            statistics=STATISTICS[make.config["statistics"]],
            at_once=_at_once(),
        )

    return _episodic(objective(make.config["inner_steps"]), objective(make.config["test_steps"]))


def _maml_plus_plus(make: Ingredients) -> Learner:
    steps, total = make.config["inner_steps"], make.config["steps"]
    ramp = optax.linear_schedule(0.0, 1.0, max(1, total // 4))

    def multi_step(step):
        """Weights from even ones to the last step's alone, over a quarter of the training."""
        done = ramp(step)
        last = jax.numpy.arange(steps) == steps - 1
        return (1 - done) / steps + done * last

    return make.adapting(
        inner=optax.sgd(1.0),
        rates=jt.meta.per_layer_and_step(make.config["inner_lr"]),
        multi_step=multi_step,
        first_order=lambda step: step < total // 4,
        statistics=jt.meta.per_step,
    )


STATISTICS = {"transductive": jt.meta.transductive, "running": jt.meta.running, "per-step": jt.meta.per_step}
_COMPARE, _ADAPT = "compare with the support", "adapt by gradient"
_WITHIN = "adapt without differentiating through it"
_BASELINE = "train an ordinary classifier, then fit a head to the support"
METHODS: dict[str, Row[FewShot]] = {
    "prototypical": Row(lambda make: make.metric(jt.meta.prototypical), _COMPARE, FewShot(), "Snell 2017"),
    "matching": Row(lambda make: make.metric(jt.meta.matching), _COMPARE, FewShot(), "Vinyals 2016"),
    "relation": Row(_relation, _COMPARE, FewShot(), "Sung 2018"),
    "r2d2": Row(
        lambda make: make.metric(jt.meta.r2d2),
        "ridge regression on the support's features",
        FewShot(),
        "Bertinetto 2019",
    ),
    "maml": Row(lambda make: make.adapting(), _ADAPT, FewShot(fixed_ways=True), "Finn 2017 and relatives"),
    "fomaml": Row(lambda make: make.adapting(first_order=True), _ADAPT, FewShot(fixed_ways=True)),
    "anil": Row(lambda make: make.adapting(adapt=make.model.head), _ADAPT, FewShot(fixed_ways=True)),
    "boil": Row(lambda make: make.adapting(adapt=make.model.stages[:-1]), _ADAPT, FewShot(fixed_ways=True)),
    "meta-sgd": Row(
        lambda make: make.adapting(inner=optax.sgd(1.0), rates=jt.meta.per_parameter(make.config["inner_lr"])),
        _ADAPT,
        FewShot(fixed_ways=True),
    ),
    "maml++": Row(_maml_plus_plus, _ADAPT, FewShot(steps=5, rate=0.1, fixed_ways=True)),
    "reptile": Row(_reptile, _WITHIN, FewShot(steps=8, rate=1e-3, fixed_ways=True), "Nichol 2018"),
    "imaml": Row(_implicit, _WITHIN, FewShot(steps=16, rate=0.1, fixed_ways=True), "Rajeswaran 2019"),
    "linear-head": Row(
        lambda make: make.baseline(make.classify, jt.meta.linear_head(make.model, **make.head)),
        _BASELINE,
        FewShot(steps=100, rate=1e-2, labelled=True),
    ),
    "simpleshot": Row(_simpleshot, _BASELINE, FewShot(labelled=True)),
    "baseline++": Row(
        lambda make: make.baseline(
            jt.meta.cosine_classification(make.model, classes=len(make.config["class_names"])),
            jt.meta.baseline_plus_plus(make.model, **make.head),
        ),
        _BASELINE,
        FewShot(steps=100, rate=1e-2, labelled=True),
    ),
}


def learner(model: jt.Model, config: dict[str, Any]) -> Learner:
    """Returns the learner of a run's configuration."""
    return METHODS[config["method"]].build(Ingredients(model, config))


_ENTRIES: dict[str, Rule] = {
    "method": (lambda name: isinstance(name, str) and name in METHODS, f"one of {', '.join(METHODS)}"),
    "statistics": (lambda name: isinstance(name, str) and name in STATISTICS, f"one of {', '.join(STATISTICS)}"),
    **dict.fromkeys(("ways", "shots", "queries", "tasks", "train_ways", "inner_steps"), COUNT),
    **dict.fromkeys(("test_steps", "batch_size", "steps"), COUNT),
    **dict.fromkeys(("train_queries", "val_classes"), COUNT_OR_NONE),
    "inner_lr": (lambda value: number(value) and value > 0, "a positive number"),
    "rotations": SWITCH,
    "split_classes": (or_none(list_of(whole(0), length=3)), "three numbers of classes, or null"),
    **{name: ENTRIES[name] for name in ("seed", "eval_split")},
}


def check_episodes(config: dict[str, Any], directory: Path) -> None:
    """Raises where the configuration of a run that knows episodes doesn't say how they were made and learned."""
    for name, rule in _ENTRIES.items():
        if name not in config:
            raise lacks(directory, name)
        check_entry(config, name, rule, directory)


def check_ways(config: dict[str, Any], ways: int) -> None:
    """Raises where a method can't be tested on another number of ways than it was trained on."""
    if METHODS[config["method"]].facts.fixed_ways and ways != config["ways"]:
        raise InputError(
            f"{config['method']} has one output per way: it was trained on {config['ways']} ways and can't be tested "
            f"on {ways}"
        )


def _episodic(train: jt.Objective, test: jt.Objective) -> Learner:
    return Learner(train, test, lambda state, base: test)


def _at_once() -> int | None:
    """One task after the other on a CPU, where weights of its own for each make batched products slow."""
    return 1 if jax.default_backend() == "cpu" and jax.device_count() == 1 else None
