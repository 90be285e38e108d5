"""Methods of `merge` by name: what each needs, which options it takes, and how it is called.

A method is built from a `Making` into a `Made`; all of them are functions of `jt.fusion`, whose forms the options name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jaxtransfer as jt
from jaxtransfer.cli.registry.row import Row
from jaxtransfer.errors import InputError


class Made(NamedTuple):
    """What a method made.

    Attributes:
      variables: the merged network's.
      told: what it found, a sentence or none.
      untouched: whether they are one of the runs as it was, whose statistics belong to its weights.
    """

    variables: Any
    told: str = ""
    untouched: bool = False


@dataclasses.dataclass(frozen=True)
class Making:
    """What a method is built from.

    Attributes:
      model: the architecture, that of all runs.
      runs: variables of each, NumPy arrays.
      names: of the runs, for what is told.
      base: variables of what they were fine-tuned from; None where the method has none.
      weights: one number a run, or None.
      options: of the command line, what isn't given left out.
      view: the entry of a batch that the model sees.
      own: evaluation batches of a run's own data, by its number; labels among them.
      streams: unlabelled batches of each data set, by name, endless.
      score: mean accuracy of variables on the validation examples, in [0, 1].
      renew: gives variables batch statistics of their own.
      seed: of what is drawn.
    """

    model: jt.Model
    runs: list[Any]
    names: tuple[str, ...]
    base: Any
    weights: tuple[float, ...] | None
    options: Mapping[str, Any]
    view: str
    own: Callable[[int], Any]
    streams: Callable[[int], dict[str, Any]]
    score: Callable[[Any], float]
    renew: Callable[[Any], Any]
    seed: int

    def chosen(self, **names: str) -> dict[str, Any]:
        """Returns options that were given, by the names of the function's arguments."""
        return {argument: self.options[option] for argument, option in names.items() if option in self.options}


@dataclasses.dataclass(frozen=True)
class Merging:
    """What the command knows of a method.

    Attributes:
      base: whether it takes a base.
      least: how many runs it takes at least.
      most: and at most; None for any number.
      weights: whether runs can be weighted.
      data: whether it looks at examples.
      labels: whether at their labels, those of training.
      validation: whether it chooses by validation examples.
      classes: whether it looks at the probabilities that the runs give classes.
      options: those of the command line that it takes.
      plain: whether it is the plain average, which others are compared with.
      deltas: whether the runs are a base and deltas on it.
    """

    base: bool = False
    least: int = 2
    most: int | None = None
    weights: bool = False
    data: bool = False
    labels: bool = False
    validation: bool = False
    classes: bool = False
    options: tuple[str, ...] = ()
    plain: bool = False
    deltas: bool = False


CONSENSUS: dict[str, Row[None]] = {
    "sum": Row(lambda: jt.fusion.weighted_sum, "add changes up", None),
    "mean": Row(lambda: jt.fusion.weighted_mean, "and divide by the sum of the weights", None),
    "disjoint-mean": Row(lambda: jt.fusion.disjoint_mean, "where signs agree, peft's form", None),
    "weighted-disjoint-mean": Row(lambda: jt.fusion.weighted_disjoint_mean, "likewise, mergekit's form", None),
    "weighted-disjoint-sum": Row(lambda: jt.fusion.weighted_disjoint_sum, "mergekit's without a division", None),
}
"""How the changes of several runs become one."""


def _average(make: Making) -> Made:
    return Made(jt.fusion.average(make.runs, weights=make.weights))


def _wise_ft(make: Making) -> Made:
    given = make.chosen(alpha="t")
    return Made(jt.fusion.wise_ft(make.base, make.runs[0], **given), untouched=given.get("alpha") in (0, 1))


def _slerp(make: Making) -> Made:
    given = make.chosen(t="t")
    return Made(jt.fusion.slerp(*make.runs, **given), untouched=given.get("t") in (0, 1))


def _of_changes(method: Callable[..., Any], *, draws: bool = False, **names: str) -> Callable[[Making], Made]:
    """A method of task vectors: of a base, runs, weights, a scale, a consensus and options of its own."""

    def build(make: Making) -> Made:
        given = make.chosen(scale="scale", **names)
        if "consensus" in make.options:
            given["consensus"] = CONSENSUS[make.options["consensus"]].build()
        if draws:
            given["key"] = make.seed
        return Made(method(make.base, make.runs, weights=make.weights, **given))

    return build


def _deltas(make: Making) -> Made:
    if len(make.runs) == 1:
        return Made(make.runs[0], untouched=True)
    params = jax.tree.map(
        lambda w, *runs: w + sum(one - w for one in runs), *(one["params"] for one in (make.base, *make.runs))
    )
    return Made({**jt.fusion.average(make.runs), "params": params})


def _model_stock(make: Making) -> Made:
    return Made(jt.fusion.model_stock(make.base, make.runs))


def _fisher(make: Making) -> Made:
    objective, name = jt.classification(make.model, view=make.view), make.model.name
    information = []
    for number, variables in enumerate(make.runs):
        state = {kind: value for kind, value in variables.items() if kind != "params"}
        found = jt.fisher_diagonal(objective, {name: variables["params"]}, {name: state}, make.own(number))
        information.append(found[name])
    return Made(jt.fusion.fisher(make.runs, information, weights=make.weights))


def _regmean(make: Making) -> Made:
    seen = jt.models.linear_inputs(make.model)
    first = next(iter(make.own(0)))
    paths = jax.eval_shape(lambda v, x: seen.apply(v, x, train=False, key=None)[0], make.runs[0], first[make.view])
    taps = {path: path for path in paths}
    grams = [
        jt.fusion.gram_matrices(seen, variables, make.own(number), taps, view=make.view)
        for number, variables in enumerate(make.runs)
    ]
    merged = jt.fusion.regmean(make.runs, grams, **make.chosen(off_diagonal="off-diagonal"))
    return Made(merged, f"{len(taps)} linear layers are least squares fits to all runs, the rest is their mean.")


def _greedy_soup(make: Making) -> Made:
    soup = jt.fusion.greedy_soup(make.runs, make.score, renew=make.renew)
    members = ", ".join(make.names[number] for number in soup.members)
    alone = ", ".join(f"{name} {score:.4g}" for name, score in zip(make.names, soup.scores, strict=True))
    told = f"The soup is of {members}: {soup.score:.4g} on the validation examples; alone {alone}."
    return Made(soup.tree, told, untouched=len(soup.members) == 1)


def _ada_merging(make: Making, runs: list[Any]) -> Made:
    streams, steps = make.streams(make.options.get("batch-size", 128)), make.options.get("steps", 200)
    merger = jt.fusion.merger(make.model, make.base, runs, **make.chosen(start="scale"))
    terms = [jt.fusion.ada_merging(merger.model, view=make.view).on(key) for key in streams]
    fitted = jt.fit(
        jt.together(sum(terms[1:], start=terms[0])),
        optax.adam(make.options.get("lr", 1e-2)),
        jt.data.zipped(streams),
        steps=steps,
        key=make.seed,
        progress=False,
    )
    learned = fitted.state.params[merger.model.name]["coefficients"]
    means = np.mean([np.asarray(leaf) for leaf in jt.tree.leaves_by_path(learned).values()], axis=0)
    shares = ", ".join(f"{name} {share:.2f}" for name, share in zip(make.names, means, strict=True))
    return Made(
        merger.variables(fitted.state), f"{steps} steps without labels; coefficients, means over leaves: {shares}."
    )


def _ada_merging_pp(make: Making) -> Made:
    return _ada_merging(make, jt.fusion.agreeing(make.base, make.runs, **make.chosen(density="density")))


def _rebasin(make: Making) -> Made:
    first, *others = make.runs
    try:
        specification = jt.fusion.specification(first)
    except InputError as error:
        raise InputError(f"--method rebasin: {error}") from None
    aligned = [first, *(jt.fusion.rebasin(first, other, specification) for other in others)]
    return Made(jt.fusion.average(aligned, weights=make.weights))


_CHANGES = ("scale", "consensus")
_SUM = "add up what fine-tuning changed"
_CHANCE = "so, with entries left out by chance"
_ADAPTED = "learn a coefficient for each layer and run from unlabelled --data"
METHODS: dict[str, Row[Merging]] = {
    "average": Row(_average, "the mean of the weights", Merging(weights=True, plain=True), "Wortsman 2022"),
    "greedy-soup": Row(
        _greedy_soup,
        "the mean of those runs that make it better on --val-split",
        Merging(data=True, validation=True),
        "Wortsman 2022",
    ),
    "wise-ft": Row(
        _wise_ft,
        "a point between --base and a run, --t of the way",
        Merging(base=True, least=1, most=1, options=("t",)),
        "Wortsman 2022b",
    ),
    "slerp": Row(
        _slerp, "a point on the arc between two runs, --t of the way", Merging(most=2, options=("t",)), "Shoemake 1985"
    ),
    "task-arithmetic": Row(
        _of_changes(jt.fusion.task_arithmetic),
        _SUM,
        Merging(base=True, least=1, weights=True, options=_CHANGES),
        "Ilharco 2023",
    ),
    "ties": Row(
        _of_changes(jt.fusion.ties, density="density"),
        "so, with the largest changes alone and where signs agree",
        Merging(base=True, least=1, weights=True, options=(*_CHANGES, "density")),
        "Yadav 2023",
    ),
    "dare": Row(
        _of_changes(jt.fusion.dare, draws=True, density="density"),
        _CHANCE,
        Merging(base=True, least=1, weights=True, options=(*_CHANGES, "density")),
        "Yu 2024",
    ),
    "della": Row(
        _of_changes(jt.fusion.della, draws=True, density="density", epsilon="epsilon"),
        _CHANCE,
        Merging(base=True, least=1, weights=True, options=(*_CHANGES, "density", "epsilon")),
        "Deep 2024",
    ),
    "breadcrumbs": Row(
        _of_changes(jt.fusion.breadcrumbs, density="density", gamma="gamma"),
        "so, without the smallest and the largest changes",
        Merging(base=True, least=1, weights=True, options=(*_CHANGES, "density", "gamma")),
        "Davari 2024",
    ),
    "knots": Row(
        _of_changes(jt.fusion.knots, density="density"),
        "ties in common directions, for changes of low rank",
        Merging(base=True, least=1, weights=True, options=(*_CHANGES, "density")),
        "Stoica 2025",
    ),
    "delta": Row(_deltas, "a base, and deltas of it in its weights", Merging(deltas=True)),
    "model-stock": Row(
        _model_stock, "the mean, drawn to --base by how little runs agree", Merging(base=True), "Jang 2024"
    ),
    "fisher": Row(
        _fisher,
        "a mean weighted by what each run's own data say of a weight",
        Merging(weights=True, data=True, labels=True),
        "Matena 2022",
    ),
    "regmean": Row(
        _regmean,
        "layers that answer each run's own data as it did",
        Merging(data=True, options=("off-diagonal",)),
        "Jin 2023",
    ),
    "ada-merging": Row(
        lambda make: _ada_merging(make, make.runs),
        _ADAPTED,
        Merging(base=True, data=True, classes=True, options=("scale", "steps", "lr", "batch-size")),
        "Yang 2024",
    ),
    "ada-merging-pp": Row(
        _ada_merging_pp,
        "so, of the changes that ties keeps",
        Merging(base=True, data=True, classes=True, options=("scale", "density", "steps", "lr", "batch-size")),
        "Yang 2024",
    ),
    "rebasin": Row(
        _rebasin,
        "the mean of runs trained apart, units in the order of the first",
        Merging(weights=True),
        "Ainsworth 2023",
    ),
}
