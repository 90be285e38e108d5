"""Scores of a model while it trains: what `jt.fit(measure=)` takes, for `monitor=` to choose by."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch
from jaxtransfer.parts.masking import check_masks
from jaxtransfer.parts.outputs import pick

Score = Callable[..., float]
_DOMAINS, _PARTS = ("source", "target", "train"), ("logits", "labels", "features")


class Seen(NamedTuple):
    """What a model says of a domain's examples.

    Attributes:
      logits: float32 [N, C].
      features: float32 [N, D].
      labels: integers [N]; None where the batches have none.
    """

    logits: np.ndarray
    features: np.ndarray
    labels: np.ndarray | None


def seen_by(
    model: Model, *, tap: str = "features", output: str = "logits", view: str = "image"
) -> Callable[[Any, Iterable[Batch]], Seen]:
    """Compiles what a model says of examples in inference mode: `run(variables, batches) -> Seen`.

    Args:
      model: the model.
      tap: the output that are its features, flattened.
      output: the output that are its logits.
      view: the entry of the batch that it reads.

    Raises:
      InputError: when it runs, for an output that does not exist, and where there is no example.
    """

    @jax.jit
    def compiled(variables: Any, inputs: Any) -> Any:
        outputs, _ = model.apply(variables, inputs, train=False, key=None)
        logits, features = (pick(f"model {model.name!r}", outputs, name) for name in (output, tap))
        return logits.astype(jnp.float32), features.reshape(len(features), -1).astype(jnp.float32)

    def run(variables: Any, batches: Iterable[Batch]) -> Seen:
        found: list[tuple[np.ndarray, ...]] = []
        variables = jax.device_put(model.complete(variables))
        for batch in batches:
            check_masks(batch)
            kept = np.asarray(batch.get("mask", np.ones(len(batch[view])))) > 0
            own = (*compiled(variables, batch[view]), *([batch["label"]] if "label" in batch else []))
            found.append(tuple(np.asarray(one)[kept] for one in own))
        if not sum(len(rows[0]) for rows in found):
            raise InputError("expected at least one example of each domain, got none; is the split empty?")
        logits, features, *labels = (np.concatenate(rows) for rows in zip(*found, strict=True))
        return Seen(logits, features, labels[0] if labels else None)

    return run


def watched(
    model: Model,
    scores: Sequence[Score] | Mapping[str, Score],
    *,
    source: Iterable[Batch] | None = None,
    target: Iterable[Batch] | None = None,
    train: Iterable[Batch] | None = None,
    tap: str = "features",
    output: str = "logits",
    view: str = "image",
) -> Callable[[Any], dict[str, float]]:
    """Makes the `measure=` of `jt.fit` from scores; `monitor=` names one, by which the best checkpoint is kept.

        chosen = jt.adaptation.selection
        watch = chosen.watched(model, [chosen.snd, chosen.dev], source=held_out, target=unlabelled)
        jt.fit(objective, optimizer, batches, steps=2000, measure=watch, monitor="snd", out="runs/a")

    A score is a function of arrays, whose parameters tell what it wants: `source_logits`, `source_labels`,
    `source_features`, `target_logits`, `target_features`, `train_features` and so on; keyword-only ones are its own
    settings, which `functools.partial` fills in. Each set of examples is run once, in inference mode, for all scores,
    and only where one of them wants it. Every score of this module is the larger the better.

    Args:
      model: one of those that the objective trains.
      scores: functions, noted under their names; or functions by the names to be noted.
      source: labelled source examples that are not trained on, `jt.data.eval_batches(...)`.
      target: target examples; their labels, if any, are read only by a score that asks for `target_labels`.
      train: source examples that are trained on, for `dev`.
      tap: the model's output that are its features.
      output: the output that are its logits.
      view: the entry of the batches that it reads.

    Returns:
      `measure(state) -> {name: value}`, of a training state; usable outside of `fit`, too.

    Raises:
      InputError: for a score that wants what is not given, or is no function of arrays.
    """
    sets = {"source": source, "target": target, "train": train}
    named, wants = _checked(scores, [name for name, batches in sets.items() if batches is not None])
    needed = {one.partition("_")[0] for found in wants.values() for one in found}
    run = seen_by(model, tap=tap, output=output, view=view)

    def measure(state: Any) -> dict[str, float]:
        if model.name not in state.params:
            raise InputError(f"the state has no model {model.name!r}; it has {', '.join(sorted(state.params))}")
        variables = {"params": model.whole(state.params), **state.state.get(model.name, {})}
        return _values(named, wants, {name: run(variables, sets[name] or ()) for name in sorted(needed)})

    return measure


def scored(
    scores: Sequence[Score] | Mapping[str, Score],
    *,
    source: Seen | None = None,
    target: Seen | None = None,
    train: Seen | None = None,
) -> dict[str, float]:
    """Computes scores of what a model was seen to say; `watched` does both while it trains.

        run = jt.load_run("runs/a")
        said = scores.seen_by(run.model)(run.variables, jt.data.eval_batches(unlabelled, 256))
        scores.scored([scores.snd, scores.entropy], target=said)

    Args:
      scores: as for `watched`.
      source: of labelled source examples that are not trained on.
      target: of target examples.
      train: of source examples that are trained on.

    Returns:
      The scores by name.

    Raises:
      InputError: for a score that wants what is not given, or is no function of arrays.
    """
    sets = {"source": source, "target": target, "train": train}
    given = {name: seen for name, seen in sets.items() if seen is not None}
    named, wants = _checked(scores, list(given))
    return _values(named, wants, given)


def _checked(scores: Any, there: Sequence[str]) -> tuple[dict[str, Score], dict[str, tuple[str, ...]]]:
    """Returns the scores by name, and which arrays each of them is given; `there` are the sets of examples."""
    named = dict(scores) if isinstance(scores, Mapping) else {_name_of(score): score for score in scores}
    return named, {name: _wanted(name, score, there) for name, score in named.items()}


def _values(
    named: Mapping[str, Score], wants: Mapping[str, tuple[str, ...]], seen: Mapping[str, Seen]
) -> dict[str, float]:
    found = {}
    for name, score in named.items():
        given = {one: getattr(seen[one.partition("_")[0]], one.partition("_")[2]) for one in wants[name]}
        if lacking := [one for one, value in given.items() if value is None]:
            raise InputError(f"{name} reads {lacking[0]}, and these batches have no 'label'")
        found[name] = float(score(**given))
    return found


def _name_of(score: Score) -> str:
    inner = score.func if isinstance(score, functools.partial) else score
    name = getattr(inner, "__name__", None)
    if name in (None, "<lambda>"):
        raise InputError(f"a score without a name, {score!r:.60}: pass a mapping, {{'name': score}}")
    return str(name)


def _wanted(name: str, score: Score, there: Sequence[str]) -> tuple[str, ...]:
    """Returns the parameters of a score that are given to it, of the sets of examples that are there."""
    if not callable(score):
        raise InputError(f"scores are functions of arrays, such as selection.snd; {name!r} is a {type(score).__name__}")
    known = [f"{domain}_{part}" for domain in _DOMAINS for part in _PARTS]
    filled = score.keywords if isinstance(score, functools.partial) else {}
    found = []
    for one in inspect.signature(score).parameters.values():
        optional = one.default is not one.empty
        if one.name in filled or (one.name not in known and (optional or one.kind == one.VAR_KEYWORD)):
            continue
        if one.name not in known:
            raise InputError(f"the score {name!r} wants {one.name!r}, which nothing gives; known: {', '.join(known)}")
        if one.name.partition("_")[0] in there:
            found.append(one.name)
        elif not optional:
            raise InputError(f"the score {name!r} reads {one.name}; pass {one.name.partition('_')[0]}=")
    return tuple(found)
