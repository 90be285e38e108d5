"""What a sum is made of: a flat list of terms with their weights, and the formula that they spell."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxtransfer.context import Context, Mean
from jaxtransfer.errors import InputError

Tree = Any
Weight = Any  # a number, an array scalar, or a schedule: step -> number


@dataclasses.dataclass(frozen=True, eq=False)
class Terms:
    """The weighted sum of objectives, as the functions that an objective is made of: loss, `setup` and `check`.

    Attributes:
      parts: (factors, term) from left to right. Factors, numbers and schedules, are applied one after another, each in
        the type of the loss; no term is a sum that was made by adding or scaling.
    """

    parts: tuple[tuple[tuple[Weight, ...], Any], ...]

    def __call__(self, outputs, params, state, batch, ctx: Context):
        """Returns the loss, the state after the terms from left to right, and the metrics of all."""
        values, state, metrics = self.values(outputs, params, state, batch, ctx)
        total, *others = values
        for value in others:
            total = total + value
        return total, state, metrics

    def values(self, outputs, params, state, batch, ctx: Context):
        """Returns the weighted loss of each term instead of their sum.

        Raises:
          InputError: where two terms report a metric of one name.
        """
        values, metrics = [], {}
        for factors, term in self.parts:
            value, state, more = result_of(term, outputs, params, state, batch, ctx)
            for factor in factors:
                known = factor(ctx.step) if callable(factor) else factor
                value = jnp.asarray(known).astype(value.dtype) * value
            if both := sorted(metrics.keys() & more.keys()):
                raise InputError(f"two terms of a sum report the metric {both[0]!r}; rename one: term.named('other')")
            values.append(value)
            metrics |= more
        return values, state, metrics

    def setup(self, key: jax.Array, batch: Mapping[str, Any]) -> tuple[Tree, Tree]:
        """Returns what the terms keep besides their models.

        Raises:
          InputError: where two of them keep something under one name, unless it is the state of a shared model.
        """
        params, state, known = {}, {}, set()
        for _, term in self.parts:
            more_params, more_state = term.setup(key, batch)
            own = {model.name for model in term.models}
            twice = (params.keys() & more_params.keys()) | (state.keys() & more_state.keys())
            if shared := sorted(twice - (known & own)):
                raise InputError(f"two terms of a sum keep {shared[0]!r}; give one of them a model of another name")
            params, state, known = {**params, **more_params}, {**state, **more_state}, known | own
        return params, state

    def check(self, outputs, batch: Mapping[str, Any]) -> None:
        """Raises what a term raises for a batch that it can't take."""
        for _, term in self.parts:
            term.check(outputs, batch)

    def scaled(self, weight: Weight) -> "Terms":
        """Returns the sum with every term times a weight."""
        return Terms(tuple(((*factors, weight), term) for factors, term in self.parts))

    def each(self, change: Callable[[Any], Any]) -> "Terms":
        """Returns the sum of changed terms."""
        return Terms(tuple((factors, change(term)) for factors, term in self.parts))

    def __str__(self):
        """The formula; tasks that are mixed by a rule stand together: `balance(left, right, pcgrad) + 0.1 * l2`."""
        text = ""
        for mixing, parts in itertools.groupby(self.parts, key=lambda part: part[1].task and part[1].task.mixing):
            if mixing is None:
                text += _sum_of(parts)
            else:
                by_task = sorted(parts, key=lambda part: part[1].task.number)  # one may be seen on several domains
                tasks = itertools.groupby(by_task, key=lambda part: part[1].task.number)
                own = [_without_plus(_sum_of(task)) for _, task in tasks]
                text += f" + balance({', '.join([*own, str(mixing)])})"
        return _without_plus(text)


def _sum_of(parts: Iterable[tuple[tuple[Weight, ...], Any]]) -> str:
    text = ""
    for factors, term in parts:
        number, symbols = _split(factors)
        sign, number = ("-", -number) if number < 0 else ("+", number)
        shown = [f"{number:g}"] if number != 1 else []
        text += f" {sign} " + " * ".join([*shown, *symbols, _text(term)])
    return text


def _without_plus(text: str) -> str:
    return f"-{text[3:]}" if text.startswith(" - ") else text.removeprefix(" + ")


def result_of(objective: Any, *arguments: Any) -> tuple[jax.Array, Tree, dict[str, Mean]]:
    """Returns what an objective's loss gives: `(loss, state, metrics)`, checked as it is traced.

    Raises:
      InputError: for anything else than a scalar, the state, and a dict of `Mean`s; for a name that isn't there.
    """
    try:
        found = objective.loss(*arguments)
    except KeyError as error:  # a term of somebody's own reads outputs, state and batch by their names
        if (told := _absent(objective, error, *arguments)) is None:
            raise
        raise told from error
    what = f"the loss of objective {objective.name or 'of no name'!r} returns (a scalar, the state, {{name: Mean}})"
    if not isinstance(found, tuple) or len(found) != 3 or isinstance(found, Mean):
        several = isinstance(found, tuple) and not isinstance(found, Mean)
        came = f"{len(found)} values" if several else f"a {type(found).__name__}"
        raise InputError(f"{what}; got {came}")
    value, state, metrics = found
    if isinstance(value, Mean):
        raise InputError(f"{what}; got a Mean as the first: return its .value")
    if jnp.shape(value) != ():
        raise InputError(f"{what}; got a loss of shape {jnp.shape(value)}: ctx.mean(values, mask).value is their mean")
    if not isinstance(state, Mapping) or not isinstance(metrics, Mapping):
        raise InputError(f"{what}; got a {type(state).__name__} and a {type(metrics).__name__} as the last two")
    for name, mean in metrics.items():
        if not isinstance(mean, Mean):
            raise InputError(f"{what}; metric {name!r} is a {type(mean).__name__}: keep what ctx.mean(...) gives")
    return value, state, dict(metrics)


class NoEntryError(InputError, KeyError):
    """A name that a term's loss reads and that isn't there; still the `KeyError` that it was."""

    __str__ = Exception.__str__  # that of a KeyError quotes the message


def _absent(objective: Any, error: KeyError, outputs: Any, params: Any, state: Any, batch: Any, *_: Any) -> Any:
    """Returns the error of a term that asks its outputs or the batch for a name that isn't there; None for others."""
    name = error.args[0] if error.args else None
    models = {one.name for one in objective.models}
    if isinstance(error, InputError) or not isinstance(name, str) or name in {*models, *objective.per_update}:
        return None  # a state that lacks a model is told of elsewhere
    given = [*((f"model {run.model.name!r} gives", found) for run, found in outputs.items()), ("the batch has", batch)]
    listed = "; ".join(f"{what} {', '.join(map(str, found))}" for what, found in given if isinstance(found, Mapping))
    return NoEntryError(f"objective {objective.name or 'of no name'!r} reads {name!r}, which isn't there: {listed}")


def weight_of(factors: tuple[Weight, ...]) -> Weight:
    """Returns the product of factors: a number where all are numbers, else a schedule of the step."""
    if len(factors) == 1:
        return factors[0]
    if not any(callable(factor) or isinstance(factor, jax.core.Tracer) for factor in factors):
        return _split(factors)[0]

    def product(step):
        value = 1.0
        for factor in factors:
            known: Any = factor(step) if callable(factor) else factor
            value = known * value
        return value

    return product


def inverse(weight: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns the schedule of 1 / weight."""

    def one_over(step):
        return 1 / weight(step)

    one_over.__name__ = f"(1 / {_name(weight)})"
    return one_over


def check_weight(weight: Weight) -> None:
    """Raises for a weight that is neither a schedule nor a finite number."""
    if callable(weight):
        return
    if np.shape(weight) != ():
        raise InputError(f"a weight is a scalar or a schedule of the step; got one of shape {np.shape(weight)}")
    if not isinstance(weight, jax.core.Tracer) and not np.isfinite(weight):
        raise InputError(f"a weight must be finite; got {weight}")


def _split(factors: tuple[Weight, ...]) -> tuple[float, list[str]]:
    """Returns the product of the known numbers, and the names of the other factors, the outer first."""
    number, symbols = 1.0, []
    for factor in reversed(factors):
        if callable(factor):
            symbols.append(_name(factor))
        elif isinstance(factor, jax.core.Tracer):
            symbols.append("weight")
        else:
            number *= float(factor)
    return number, symbols


def _name(schedule: Callable) -> str:
    name = getattr(schedule, "__name__", "schedule")
    return "schedule" if name == "<lambda>" else name


def _text(term: Any) -> str:
    """The name of a term with the models that it trains, else those that it runs: `distillation(student)`."""
    trained = [forward.model.name for forward in term.forwards if forward.trained]
    run = [forward.weights.name for forward in term.forwards]
    names = trained or [model.name for model in term.models] or run or [average.name for average in term.kept]
    return (term.name or "objective") + (f"({', '.join(dict.fromkeys(names))})" if names else "")


def check_total(metrics: Mapping[str, Any]) -> None:
    """Raises for a metric that would take the place of the total loss in the records, which guard against NaN."""
    if "loss" in metrics:
        raise InputError(
            "a metric can't be called 'loss', as the total of all terms is; rename it: term.named('other')"
        )
