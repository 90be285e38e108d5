"""The heart: an objective is a pure function over pytrees, and objectives add up.

An `Objective` declares the forwards it needs, (model, view) pairs, and a loss over their outputs. A sum runs each
distinct forward once and adds the losses; a weight is a number or a schedule of the step. Everything that trains is
one of these, so one compiled step, one loop and one evaluation serve every method.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.context import Context, Mean, named_key
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward
from jaxtransfer.model import FROZEN, Model
from jaxtransfer.parts.learns import Learns
from jaxtransfer.parts.mixing import Task, mixed
from jaxtransfer.parts.view import view_of as view_of
from jaxtransfer.terms import Terms, Weight, check_weight, inverse, result_of, weight_of
from jaxtransfer.tree import check_arrays
from jaxtransfer.weights import Average, Frozen, Weights

Tree = Any
Batch = Mapping[str, Any]


def _no_setup(key, batch):
    return {}, {}


def _no_check(outputs, batch):
    pass


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """A differentiable loss with everything that it needs, as pure functions.

    Calling it, `objective(params, state, batch, ctx)`, gives `(loss, new_state, metrics)`: a scalar, the state after
    this batch, and a dict of `Mean`s. `params` and `state` are dicts keyed by model name.

    Attributes:
      name: the term's own metric; empty for a sum.
      forwards: the runs of models whose outputs the loss reads.
      loss: `loss(outputs, params, state, batch, ctx) -> (loss, state, metrics)`, `outputs` a dict by forward.
      setup: `setup(key, batch) -> (params, state)` of what is not a forward's model (an adapter, a queue).
      check: `check(outputs, batch)` raises `InputError` for a batch that the loss can't take; called once, at init,
        with the values of the batch and the shapes of the outputs.
      frozen: handles on the trees it reads through `ctx.read`; those of its models come along by themselves.
      models: trained models besides those of `forwards`, for an objective that runs them itself.
      peers: those of its models that it reads but doesn't train; another term of the sum must.
      per_update: entries of the state that move once per update, averages and queues: under gradient accumulation
        they stay until the batch that completes an update.
      kept: moving averages that it keeps without running them.
      apart: where a copy of an example counts as another one, how many examples besides those of the batch it is told
        from (0, or the length of a queue); None where copies do no harm. `fit` refuses data with fewer examples.
      task: where its gradient is not simply added: the task that it is part of, see `jt.balance`.
      pooled: whether the loss is the mean that it reports under its name; evaluation then divides it once, at the end.
      learns: what an output of its model comes to name by it, for a run to note; None for nothing.
    """

    name: str
    forwards: tuple[Forward, ...]
    loss: Callable[..., tuple[jax.Array, Tree, dict[str, Mean]]]
    setup: Callable[..., tuple[Tree, Tree]] = _no_setup
    check: Callable[[Mapping[Forward, Any], Batch], None] = _no_check
    frozen: tuple[Frozen, ...] = ()
    models: tuple[Model, ...] = ()
    peers: tuple[Model, ...] = ()
    per_update: tuple[str, ...] = ()
    kept: tuple[Average, ...] = ()
    apart: int | None = None
    pooled: bool = False
    task: Task | None = None
    learns: Learns | None = None

    __array_ufunc__ = None  # a NumPy scalar on the left leaves the product to __rmul__

    def __post_init__(self):
        own = [forward.weights for forward in self.forwards]
        trained = (*(weights.model for weights in own if weights.trained), *self.models)
        models = [one for model in trained for one in model.family]
        every = (*(weights.model for weights in own), *self.models, *self.peers)
        handles = (*self.frozen, *(handle for one in (*own, *every) for handle in one.handles))
        averages = [*(weights for weights in own if weights.entries), *self.kept]
        by_name: dict[str, Any] = {}
        for model in (*models, *averages):
            if by_name.setdefault(model.name, model) is not model:
                raise InputError(
                    f"two different models are named {model.name!r}; expected one object per name. To share weights "
                    f"pass the same model to both terms, else rename one: model.named('other')"
                )
        object.__setattr__(self, "forwards", tuple(dict.fromkeys(self.forwards)))
        object.__setattr__(self, "frozen", tuple(dict.fromkeys(handles)))
        object.__setattr__(self, "models", tuple(dict.fromkeys(models)))
        object.__setattr__(self, "kept", tuple(dict.fromkeys(self.kept)))
        object.__setattr__(self, "peers", tuple(dict.fromkeys(one for peer in self.peers for one in peer.family)))
        slow = (*self.per_update, *(entry for average in averages for entry in average.entries))
        object.__setattr__(self, "per_update", tuple(dict.fromkeys(slow)))

    @property
    def terms(self) -> tuple[tuple[Weight, "Objective"], ...]:
        """What it adds up, from left to right: (weight, term), the weight a number or a schedule of the step.

        A single objective is one term of weight 1.
        """
        return tuple((weight_of(factors), term) for factors, term in self.summed.parts)

    @property
    def is_sum(self) -> bool:
        """Whether it was made by adding or scaling, and its functions are still those that it was made with."""
        total = self.loss
        return isinstance(total, Terms) and self.setup == total.setup and self.check == total.check

    @property
    def summed(self) -> Terms:
        """The sum that it is; of itself alone where it is none."""
        return self.loss if self.is_sum and isinstance(self.loss, Terms) else Terms((((), self),))

    @property
    def trained(self) -> set[Model]:
        """The models that its loss changes."""
        return set(self.models) - set(self.peers)

    @property
    def averages(self) -> tuple[Weights, ...]:
        """The weights that the state holds and the step moves, whether it runs them or not: moving averages."""
        return tuple(dict.fromkeys((*self._run_averages, *self.kept)))

    @property
    def _run_averages(self) -> list[Weights]:
        return [forward.weights for forward in self.forwards if forward.weights.entries]

    def init(self, key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        """Returns fresh `(params, state)`; every model's key depends on its name alone.

        Raises:
          InputError: for a peer, or the model of an average, that no term trains.
        """
        if self.peers:
            name = self.peers[0].name
            raise InputError(
                f"model {name!r} teaches as a peer, but nothing here trains it: add a term that does, "
                f"jt.classification(model) say, or take it as it is, jt.frozen(model, variables)"
            )
        params, state = self.setup(key, batch)
        params, state = dict(params), dict(state)
        for forward in self.forwards:
            for model in forward.model.family if forward.trained else ():
                if model.name not in params:
                    params[model.name], state[model.name] = fresh(model, key, view_of(batch, forward.view))
        for average in self.averages:
            state = {**average.init(params, state), **state}
        return params, state

    def __call__(self, params: Tree, state: Tree, batch: Batch, ctx: Context):
        """Runs each forward once, then the loss over the outputs."""
        if any(term.task is not None for _, term in self.summed.parts):
            return mixed(self, params, state, batch, ctx)
        outputs, state = self.run(params, state, batch, ctx)
        return result_of(self, outputs, params, state, batch, ctx)

    def run(self, params: Tree, state: Tree, batch: Batch, ctx: Context):
        """Runs each forward once, state threading from left to right; returns the outputs by forward and the state."""
        outputs, state = {}, self._averaged(params, state, ctx)
        for forward in self.forwards:
            outputs[forward], state = _run(forward, params, state, batch, ctx)
        return outputs, state

    def _averaged(self, params: Tree, state: Tree, ctx: Context) -> Tree:
        """Returns the state with its moving averages brought up to this step."""
        moved = {}
        if ctx.train:
            run, step = self._run_averages, jnp.maximum(ctx.step, 1) if ctx.later else ctx.step
            for average in self.averages:
                moved |= average.advance(params, state, step, runs=average in run)
        return {**state, **jax.lax.stop_gradient(moved)}

    def __add__(self, other) -> "Objective":
        if isinstance(other, int | float) and other == 0:  # sum() starts from 0
            return self
        if not isinstance(other, Objective):
            return NotImplemented
        return _add(self, other)

    __radd__ = __add__

    def __mul__(self, weight: Weight) -> "Objective":
        if isinstance(weight, Objective):
            raise TypeError("an objective times an objective has no meaning; weights are numbers or schedules")
        return _scale(self, weight)

    __rmul__ = __mul__

    def __truediv__(self, weight: Weight) -> "Objective":
        if callable(weight):
            return _scale(self, inverse(weight))
        return _scale(self, 1 / weight)

    def __neg__(self) -> "Objective":
        return _scale(self, -1.0)

    def __sub__(self, other) -> "Objective":
        return self + (-other) if isinstance(other, Objective) else NotImplemented

    def on(self, key: str) -> "Objective":
        """Returns the same objective over `batch[key]`, its metrics under `key/`."""
        return _on(self, key)

    def named(self, name: str) -> "Objective":
        """Returns the same objective with its own metric called `name` and the others `name/...`.

        What keeps apart the terms of a sum that would report metrics of one name; those of a sum are all `name/...`.
        """
        return _named(self, name)

    def __repr__(self):
        """The formula: `0.1 * classification(student) + 0.9 * distillation(student)`, schedules by their names."""
        return str(self.summed)


def fresh(model: Model, key: jax.Array, inputs: Any) -> tuple[Tree, Tree]:
    """Returns a model's fresh `(params, state)`, checked; its key depends on its name alone.

    Args:
      model: the model.
      key: of the objective's `init`.
      inputs: what it will see, arrays or their shapes, which are taken as zeros.

    Raises:
      InputError: where its `init` gives something else than arrays, `params` and state.
    """
    like = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, inputs)
    variables = model.init(named_key(key, model.name), like)
    what = f"the init of model {model.name!r}"
    if not isinstance(variables, Mapping) or "params" not in variables:
        found = sorted(variables) if isinstance(variables, Mapping) else f"a {type(variables).__name__}"
        raise InputError(
            f"{what} must return {{'params': ..., **state}}; got {found}. Modules of other libraries become models by "
            f"jt.models.linen, nnx and equinox"
        )
    if FROZEN in variables:
        raise InputError(
            f"{what} returns a collection {FROZEN!r}, a name that is kept for what no init returns: give it as "
            f"Model(frozen={{...: jt.Frozen(tree)}}), or call it something else"
        )
    for kind, values in variables.items():
        check_arrays(values, f"{what}: {kind}", floating=kind == "params")
    variables = jax.tree.map(jnp.asarray, dict(variables))
    return variables.pop("params"), variables


def _run(forward: Forward, params, state, batch, ctx: Context):
    views = [view_of(batch, view) for view in forward.views]
    inputs = forward.join(views)
    weights = forward.weights
    variables = weights.model.complete(weights.read(params, state, ctx.read), ctx.read)
    if weights.inference:
        how: dict[str, Any] = {"train": False, "key": None}
    else:
        drawn = ctx.key_of(weights.model, weights.name, *(part for view in forward.views for part in view))
        how = {"key": drawn, **ctx.how(weights.model, variables["params"])}
    outputs, new = forward.apply(variables, inputs, **how)
    outputs = outputs if weights.trained else jax.lax.stop_gradient(outputs)
    return forward.split(outputs, views), weights.keep(state, new)


def _scale(objective: Objective, weight: Weight) -> Objective:
    check_weight(weight)
    total = objective.summed.scaled(weight)
    return dataclasses.replace(objective, loss=total, setup=total.setup, check=total.check)


def _add(left: Objective, right: Objective) -> Objective:
    total = Terms(left.summed.parts + right.summed.parts)
    return Objective(
        name="",
        forwards=left.forwards + right.forwards,
        loss=total,
        setup=total.setup,
        check=total.check,
        frozen=left.frozen + right.frozen,
        models=left.models + right.models,
        peers=tuple(model for model in left.peers + right.peers if model not in left.trained | right.trained),
        per_update=left.per_update + right.per_update,
        kept=left.kept + right.kept,
        apart=max((one.apart for one in (left, right) if one.apart is not None), default=None),
    )


def _named(objective: Objective, name: str) -> Objective:
    own = objective.name

    def renamed(metric: str) -> str:
        return name if metric == own else f"{name}/{metric}"

    if not objective.is_sum:
        return _metrics_renamed(objective, name, renamed)
    total = objective.summed.each(lambda term: _metrics_renamed(term, renamed(term.name), renamed))
    return dataclasses.replace(objective, name=name, loss=total, setup=total.setup, check=total.check)


def _metrics_renamed(term: Objective, name: str, renamed: Callable[[str], str]) -> Objective:
    def loss(*args):
        value, state, metrics = result_of(term, *args)
        return value, state, {renamed(metric): mean for metric, mean in metrics.items()}

    return dataclasses.replace(term, name=name, loss=loss)


def _on(objective: Objective, key: str) -> Objective:
    moved = {forward: forward.within(key) for forward in objective.forwards}
    name = f"{key}/{objective.name}" if objective.name else ""
    if objective.is_sum:
        total = objective.summed.each(lambda term: _on(term, key))
        functions = {"loss": total, "setup": total.setup, "check": total.check}
        return dataclasses.replace(objective, name=name, forwards=tuple(moved.values()), **functions)

    def own(outputs):
        return {inner: outputs[outer] for inner, outer in moved.items()}

    def loss(outputs, params, state, batch, ctx):
        value, state, metrics = result_of(objective, own(outputs), params, state, view_of(batch, (key,)), ctx)
        return value, state, {f"{key}/{name}": metric for name, metric in metrics.items()}

    return dataclasses.replace(
        objective,
        name=name,
        forwards=tuple(moved.values()),
        loss=loss,
        setup=lambda rng, batch: objective.setup(rng, view_of(batch, (key,))),
        check=lambda outputs, batch: objective.check(own(outputs), view_of(batch, (key,))),
    )
