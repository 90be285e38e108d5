"""Methods of domain adaptation by name, and the scores by which a checkpoint is chosen.

A method is built from `Ingredients` into an `Adaptation`; a score is a function of arrays, as
`jt.adaptation.selection.watched` takes it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxtransfer as jt
from jaxtransfer.adaptation import selection
from jaxtransfer.cli.registry.augmentations import MIXES
from jaxtransfer.cli.registry.row import Row
from jaxtransfer.data import views


class Adaptation(NamedTuple):
    """What trains.

    Attributes:
      objective: what is minimised.
      optimizer: what with.
      refresh: what is made anew now and then, or None.
      transform: the views of a batch, made within the step, or None.
    """

    objective: jt.Objective
    optimizer: Any
    refresh: jt.Refresh | None = None
    transform: Any = None


@dataclasses.dataclass(frozen=True)
class Adapting:
    """What the command knows of a method.

    Attributes:
      adapts: whether it looks at the target at all; the others are what a method is compared with.
      source_free: whether it starts from a run and does without the source.
      one_source: whether it takes a single source.
      several: whether it takes two sources or more.
      turns: whether its updates alternate, the source's loss among them, so that nothing can be added to it.
      unknown: whether it has a class for what is of no class of the source.
      target_labels: whether it learns from the labels of the target.
      without: options of training that its own loss has no use for, by name; of --augment, names that it can take.
      strength: the usual weight of what it adds to the source's loss; None where that can't be told.
    """

    adapts: bool = True
    source_free: bool = False
    one_source: bool = False
    several: bool = False
    turns: bool = False
    unknown: bool = False
    target_labels: bool = False
    without: tuple[str, ...] = ()
    strength: float | None = None


@dataclasses.dataclass(frozen=True)
class Ingredients:
    """What a method is made of.

    Attributes:
      model: what trains.
      sources: the entries of a batch that are the sources'.
      target: that of the target, whose examples are numbered in its column `index`.
      labelled: that of the target's labelled examples; None where there are none.
      examples: how many unlabelled examples the target has.
      image_shape: of all domains.
      optimizer_for: from a number of steps to the optimiser with its schedule.
      steps: updates in all.
      strength: of what a method adds to the source's loss.
      label_smoothing: of the source's loss.
      eval_target: the target's examples once, in batches.
    """

    model: jt.Model
    sources: tuple[str, ...]
    target: str
    labelled: str | None
    examples: int
    image_shape: tuple[int, int, int]
    optimizer_for: Callable[[int], Any]
    steps: int
    strength: float
    label_smoothing: float
    eval_target: Any

    @property
    def optimizer(self) -> Any:
        """The optimiser, its schedule over all steps."""
        return self.optimizer_for(self.steps)

    def supervised(self) -> jt.Objective:
        """Returns what is learned from labels: the mean over the sources, and the target's own."""
        terms = [self.classified(name) for name in self.sources]
        total = sum(terms[1:], start=terms[0]) * (1 / len(terms)) if len(terms) > 1 else terms[0]
        return self.with_labelled(total)

    def with_labelled(self, objective: jt.Objective) -> jt.Objective:
        """Returns an objective with what is learned from the target's own labels, where there are some."""
        return objective if self.labelled is None else objective + self.classified(self.labelled)

    def classified(self, name: str) -> jt.Objective:
        """Returns what is learned from the labels of an entry of the batch."""
        return jt.classification(self.model, label_smoothing=self.label_smoothing).on(name)

    def adapted(self, *terms: jt.Objective, transform: Any = None) -> Adaptation:
        """Returns a method that adds terms to what is learned from labels, each model run once on all domains."""
        added = sum(terms[1:], start=terms[0])
        objective = jt.together(self.supervised() + self.strength * added)
        return Adaptation(objective, self.optimizer, transform=transform)

    def pairs(self, term: Callable[..., jt.Objective]) -> jt.Objective:
        """Returns the mean over the sources of a term of a source and the target."""
        if len(self.sources) == 1:
            return term(self.model, source=self.sources[0], target=self.target)
        made = {one: term(self.model, source=one, target=self.target) for one in self.sources}
        several = [found.named(f"{found.name}_{one}") for one, found in made.items()]
        return sum(several[1:], start=several[0]) * (1 / len(several))

    def views(self) -> Any:
        """Returns the transform to a weak and a strong view of the target's examples, and a weak one of all others."""
        side = min(self.image_shape[:2])
        weak = views.random_crop(max(1, side // 10))
        warp = views.affine(degrees=20, translate=0.1, scale=(0.8, 1.2), shear=10)
        strong = views.chain(warp, views.color_jitter(), views.cutout(max(1, side // 3)))
        others = [*self.sources, *([] if self.labelled is None else [self.labelled])]
        return views.in_turn(
            views.on(self.target, views.two_views(weak, strong)),
            *(views.on(name, views.augmented(weak)) for name in others),
        )


def _supervised(make: Ingredients) -> Adaptation:
    return Adaptation(make.supervised(), make.optimizer)


def _on_target(term: Callable[..., jt.Objective]) -> Callable[[Ingredients], Adaptation]:
    """Builds a method that adds a term of the target's unlabelled examples alone."""
    return lambda make: make.adapted(term(make.model, target=make.target))


def _on_views(term: Callable[..., jt.Objective]) -> Callable[[Ingredients], Adaptation]:
    """Builds a method that adds a term of a weak and a strong view of them."""
    return lambda make: make.adapted(term(make.model, target=make.target), transform=make.views())


def _on_pairs(*terms: Callable[..., jt.Objective]) -> Callable[[Ingredients], Adaptation]:
    """Builds a method that adds terms of a source and the target."""
    return lambda make: make.adapted(*map(make.pairs, terms))


def _in_turns(method: Callable[..., Any]) -> Callable[[Ingredients], Adaptation]:
    """Builds a method whose updates alternate."""

    def build(make: Ingredients) -> Adaptation:
        where = {"source": make.sources[0], "target": make.target}
        return Adaptation(*method(make.model, make.optimizer, trade_off=make.strength, **where))

    return build


def _pada(make: Ingredients) -> Adaptation:
    term = jt.adaptation.pada(make.model, trade_off=make.strength, source=make.sources[0], target=make.target)
    return Adaptation(jt.together(make.with_labelled(term)), make.optimizer)


def _shot(make: Ingredients) -> Adaptation:
    """SHOT: the head stays, and pseudo-labels of all of the target are made anew fifteen times."""
    labels = jt.adaptation.shot_labels(make.model, make.eval_target, target=make.target)
    term = jt.adaptation.shot(make.model, examples=make.examples, strength=make.strength, target=make.target)
    optimizer = jt.optim.freeze(make.optimizer, f"{make.model.name}/(?:{make.model.head})")
    return Adaptation(term, optimizer, jt.Refresh(max(1, make.steps // 15), labels))


def _tent(make: Ingredients) -> Adaptation:
    image = jax.ShapeDtypeStruct((1, *make.image_shape), np.uint8)
    shapes = jax.eval_shape(make.model.init, jax.random.key(0), image)
    scales = jt.adaptation.norm_parameters(make.model, shapes)
    return Adaptation(jt.adaptation.tent(make.model, target=make.target), jt.optim.only(make.optimizer, scales))


def _vat(make: Ingredients) -> Adaptation:
    """VAT within a radius of 0.03 √D for D values of an image in [0, 1]: that of VADA's 32 x 32 x 3 ones in [−1, 1]."""
    radius = 0.03 * math.sqrt(math.prod(make.image_shape))
    return make.adapted(jt.adaptation.vat(make.model, radius=radius, target=make.target))


_OWN_LOSS = ("label-smoothing",)
_BY_CLASS = (*_OWN_LOSS, *MIXES)
_NO_LABELS = (*_OWN_LOSS, "balance", *MIXES)
_ALIKE = "make the domains' features alike"
_ADVERSARY = "deceive a network that tells the domains apart"
_RIVALS = "let two classifiers differ on the target, and the features deny it"
_SURE = "make the target's predictions sure, and of many classes"
_GUESSES = "learn from the model's own sure guesses on the target"
METHODS: dict[str, Row[Adapting]] = {
    "source-only": Row(_supervised, "learn from the source, and nothing else", Adapting(adapts=False)),
    "oracle": Row(
        _supervised,
        "learn from all labels of the target, too: what adaptation could reach",
        Adapting(adapts=False, target_labels=True),
    ),
    "dann": Row(_on_pairs(jt.adaptation.dann), _ADVERSARY, Adapting(strength=1.0), "Ganin 2016"),
    "cdan": Row(_on_pairs(jt.adaptation.cdan), _ADVERSARY, Adapting(strength=1.0), "Long 2018"),
    "bsp": Row(_on_pairs(jt.adaptation.dann, jt.adaptation.bsp), _ADVERSARY, Adapting(strength=1.0), "Chen 2019"),
    "mdd": Row(_on_pairs(jt.adaptation.mdd), _RIVALS, Adapting(strength=1.0), "Zhang 2019"),
    "wdgrl": Row(
        _in_turns(jt.adaptation.wdgrl),
        "bring the domains' features near by the slope of a critic",
        Adapting(one_source=True, turns=True, without=_OWN_LOSS, strength=1.0),
        "Shen 2018",
    ),
    "pada": Row(
        _pada,
        "as dann, for a target with some of the classes alone",
        Adapting(one_source=True, without=_BY_CLASS, strength=1.0),
        "Cao 2018",
    ),
    "osbp": Row(
        _on_pairs(jt.adaptation.osbp),
        "set apart what is of no class of the source",
        Adapting(one_source=True, unknown=True, strength=1.0),
        "Saito 2018b",
    ),
    "mcd": Row(
        _in_turns(jt.adaptation.mcd),
        _RIVALS,
        Adapting(one_source=True, turns=True, without=_OWN_LOSS, strength=1.0),
        "Saito 2018",
    ),
    "swd": Row(
        _in_turns(jt.adaptation.swd),
        _RIVALS,
        Adapting(one_source=True, turns=True, without=_OWN_LOSS, strength=1.0),
        "Lee 2019",
    ),
    "dan": Row(_on_pairs(jt.adaptation.dan), _ALIKE, Adapting(strength=1.0), "Long 2015"),
    "jan": Row(_on_pairs(jt.adaptation.jan), _ALIKE, Adapting(strength=1.0), "Long 2017"),
    "deep-coral": Row(_on_pairs(jt.adaptation.deep_coral), _ALIKE, Adapting(strength=1.0), "Sun 2016"),
    "m3sda": Row(
        lambda make: make.adapted(jt.adaptation.m3sda(make.model, make.sources, target=make.target)),
        "make the features of several sources and the target alike",
        Adapting(several=True, strength=0.01),
        "Peng 2019",
    ),
    "afn": Row(_on_pairs(jt.adaptation.afn), "lengthen the features of both", Adapting(strength=0.05), "Xu 2019"),
    "mcc": Row(_on_target(jt.adaptation.mcc), "confuse no classes on the target", Adapting(strength=1.0), "Jin 2020"),
    "bnm": Row(_on_target(jt.adaptation.bnm), _SURE, Adapting(strength=1.0), "Cui 2020"),
    "vat": Row(_vat, "let small changes of the image change nothing", Adapting(strength=1.0), "Miyato 2018"),
    "pseudo-label": Row(_on_target(jt.adaptation.pseudo_label), _GUESSES, Adapting(strength=1.0), "Lee 2013"),
    "fixmatch": Row(_on_views(jt.adaptation.fixmatch), _GUESSES, Adapting(strength=1.0), "Sohn 2020"),
    "flexmatch": Row(
        lambda make: make.adapted(
            jt.adaptation.flexmatch(make.model, examples=make.examples, target=make.target), transform=make.views()
        ),
        _GUESSES,
        Adapting(strength=1.0),
        "Zhang 2021",
    ),
    "uda": Row(_on_views(jt.adaptation.uda), _GUESSES, Adapting(strength=1.0), "Xie 2020"),
    "shot": Row(
        _shot,
        "go on from a run without its source, its head as it is",
        Adapting(source_free=True, without=_NO_LABELS, strength=0.3),
        "Liang 2020",
    ),
    "tent": Row(
        _tent,
        "go on from a run without its source, by the scales and shifts of batch norm alone",
        Adapting(source_free=True, without=_NO_LABELS),
        "Wang 2021",
    ),
}


@dataclasses.dataclass(frozen=True)
class Choosing:
    """What the command knows of a way to choose the checkpoint.

    Attributes:
      metric: the metric by which it is chosen; None for the last one.
      source: whether it reads the source.
      target_labels: whether it reads the labels of the target.
    """

    metric: str | None = None
    source: bool = False
    target_labels: bool = False


LAST, TARGET_LABELS = "last", "target-labels"
SELECTIONS: dict[str, Row[Choosing]] = {
    LAST: Row(lambda: None, "take the last step", Choosing()),
    "source-accuracy": Row(
        lambda: selection.source_accuracy, "by held-out source examples", Choosing("source_accuracy", source=True)
    ),
    "entropy": Row(lambda: selection.entropy, "by how sure the target's predictions are", Choosing("entropy")),
    "information-maximization": Row(
        lambda: selection.information_maximization,
        "by how sure and how various they are",
        Choosing("information_maximization"),
        "Krause 2010",
    ),
    "bnm": Row(lambda: selection.bnm, "by how sure and how various they are", Choosing("bnm"), "Cui 2020"),
    "softmax-correlation": Row(
        lambda: selection.softmax_correlation,
        "by how sure and how various they are",
        Choosing("softmax_correlation"),
        "Tu 2024",
    ),
    "snd": Row(
        lambda: selection.snd, "by how dense the neighbourhoods of predictions are", Choosing("snd"), "Saito 2021"
    ),
    "dev": Row(
        lambda: selection.dev, "by the source's loss, weighed as the target", Choosing("dev", source=True), "You 2019"
    ),
    "reverse-validation": Row(
        lambda: selection.reverse_validation,
        "by whether the target's predictions teach the source",
        Choosing("reverse_validation", source=True),
        "Zhong 2010",
    ),
    "a-distance": Row(
        lambda: selection.a_distance,
        "by how close the domains' features are",
        Choosing("a_distance", source=True),
        "Ben-David 2007",
    ),
    TARGET_LABELS: Row(
        lambda: None,
        "by the accuracy on the target's labels, which adaptation does not have",
        Choosing("target/accuracy", target_labels=True),
    ),
}
