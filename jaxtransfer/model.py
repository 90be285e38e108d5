"""A model is a pair of pure functions without weights; whoever writes it in which library stays inside it."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.parts.twins import apart, joined

Variables = Mapping[str, Any]
Outputs = Mapping[str, Any]
FROZEN = "frozen"  # the kind of variables that no init returns and no state holds


class Recipe(NamedTuple):
    """How a model was made, so that another process can make it again: noted by the constructors of `jt.models`.

    Attributes:
      build: the name of the constructor.
      arguments: what it was called with, but for the model's name.
      apply: the function that this holds of. A model with another one is another model, and has no recipe.
      mean: what its inputs are normalised by, a list; None for inputs as they are.
      std: likewise.
      heads: whether heads stand on it, which belong to a method and not to the model.
      bare: whether it is as its constructor made it; false where another model was made from it.
    """

    build: str
    arguments: Mapping[str, Any]
    apply: Callable[..., Any]
    mean: list[float] | None = None
    std: list[float] | None = None
    heads: bool = False
    bare: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A pair of pure functions under a name.

    Two terms of an objective share a model when they hold the same object: models compare by identity.

    Attributes:
      init: `init(key, inputs) -> variables`, a dict with `"params"` and, where the model has running state
        (batch statistics, say), further collections.
      apply: `apply(variables, inputs, *, train, key) -> (outputs, state)`. `outputs` is a dict of named arrays
        (`"logits"` [B, C], `"features"` [B, D], intermediate maps); `state` holds the collections besides
        `"params"` after this call (unchanged when `train` is false). A model in which examples meet (batch norm)
        also takes `axis=None`, the name of the device axis to average over; it is passed only under `pmap`. One
        whose layers can be frozen one by one takes `still=None`, a tree like the parameters, of bools or traced
        scalars: layers whose parameters are all still run in inference mode. It is passed only in training, where
        some are. `jt.models.linen` takes both; an `apply` with `**kwargs` is given both, to hand on.
      name: the key of the model's weights in `params` and `state`.
      stages: path patterns of the layers from the input to the head, for layer-wise rates and unfreezing; each
        parameter matches one of them, and the last one is the head.
      frozen: what it reads and nobody trains, a tree of `jt.Frozen` handles: the base of a delta, a fixed encoder, a
        random map. `apply` gets the trees behind them, in the same nesting, as `variables["frozen"]`. In training they
        are an argument of the compiled step that is not donated; they are no part of the state or of checkpoints.
        Elsewhere `complete` puts them beside the other variables. Models that are made of models pass them on.
      shares: with which model it shares parameters, and which are its own; see `twin`.
      recipe: how it was made, where that is known; what wraps a model of the same weights hands it on by `made_from`.
      shares_key: whether `apply` gets the key that all devices share, for what is drawn once for the whole batch; with
        an `axis` it folds the device in by itself for what is drawn by row. Otherwise the key is a device's own.
    """

    init: Callable[..., Variables]
    apply: Callable[..., tuple[Outputs, Variables]]
    name: str = "model"
    stages: tuple[str, ...] = ()
    frozen: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shares: "Shared | None" = None
    recipe: Recipe | None = None
    shares_key: bool = False

    def __post_init__(self):
        parameters = inspect.signature(self.apply).parameters
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            if "axis" not in parameters:
                object.__setattr__(self, "apply", _without_axis(self.apply, self.name))
            if "still" not in parameters:
                object.__setattr__(self, "apply", _without_still(self.apply, self.name))
        if self.frozen:
            _check_handles(self.frozen, self.name)
            object.__setattr__(self, "apply", _completed(self.apply, self.name))
        if self.recipe is not None and self.recipe.apply is not self.apply:
            object.__setattr__(self, "recipe", None)

    def named(self, name: str) -> "Model":
        """Returns the same pair of functions as another model, with weights of its own, under `name`."""
        return dataclasses.replace(self, name=name)

    def twin(self, name: str, own: tree.Patterns = ()) -> "Model":
        """Returns a model that shares all parameters with this one but those of its own, and has statistics of its own.

        Domain-specific batch norm (Chang et al. 2019, arXiv:1906.03950) is `model.twin("target", own="norm.*")` beside
        the model, ADDA's target encoder (Tzeng et al. 2017, arXiv:1702.05464) a twin with an encoder of its own and the
        shared head. What is shared is in `params` once, under this model's name, so that it decays, freezes and is
        saved once, and learns from both; under `name` are the twin's own leaves, drawn anew, and its running state. An
        objective with the twin alone trains the shared parameters, too.

        Args:
          name: of the twin.
          own: path patterns of the parameters that it has of its own; none by default, but for its statistics.

        Raises:
          InputError: for this model's own name, and for a model that is a twin itself; at init, for a pattern that
            selects no parameter.
        """
        if name == self.name:
            raise InputError(f"a twin needs another name than its model's, {name!r}")
        if self.shares is not None:
            first = self.shares.first.name
            raise InputError(f"model {self.name!r} is a twin of {first!r} itself; make {name!r} of {first!r}, too")
        patterns = tree.as_patterns(own)

        def init(key, inputs):
            variables = self.init(key, inputs)
            return {**variables, "params": apart(variables["params"], patterns, f"the twin {name!r}")}

        return dataclasses.replace(self, name=name, init=init, shares=Shared(self, patterns), recipe=None)

    @property
    def family(self) -> tuple["Model", ...]:
        """The model, and the one that it shares parameters with."""
        return (self,) if self.shares is None else (self, self.shares.first)

    def own(self, params: Any) -> Any:
        """Returns what of a tree like the parameters that it runs on is kept under its name: a twin's own leaves."""
        return params if self.shares is None else apart(params, self.shares.own, f"the twin {self.name!r}")

    def whole(self, params: Mapping[str, Any]) -> Any:
        """Returns the parameters that it runs on, of those of all models by name: a twin's with the shared ones."""
        if self.shares is None:
            return params[self.name]
        shared = self.shares.first.whole(params)
        return joined(shared, params[self.name]) if self.shares.own else shared

    def spread(self, params: Mapping[str, Any], whole: Any) -> dict[str, Any]:
        """Returns parameters by name with which it runs on `whole`: of a twin, those that it shares are the model's."""
        if self.shares is None:
            return {**params, self.name: whole}
        first, own = self.shares.first, tree.leaves_by_path(self.own(whole))
        shared = {path: leaf for path, leaf in tree.leaves_by_path(whole).items() if path not in own}
        spread = first.spread(params, joined(first.whole(params), tree.nested(shared)))
        return {**spread, self.name: self.own(whole)}

    def held_still(self, still: Mapping[str, Any], params: Any) -> Any:
        """Returns `Context.still` for the parameters that it runs on, or None where all of them move."""
        if self.shares is None:
            return still.get(self.name)
        if all(one.name not in still for one in self.family):
            return None
        moves = jax.tree.map(lambda _: False, params)
        shared = self.shares.first.held_still(still, params)
        return joined(moves if shared is None else shared, still.get(self.name, self.own(moves)))

    @property
    def handles(self) -> tuple[Any, ...]:
        """The handles in `frozen`, in the tree's order."""
        return tuple(jax.tree.leaves(self.frozen))

    def complete(self, variables: Variables, read: Callable[[Any], Any] = lambda handle: handle.tree) -> dict[str, Any]:
        """Returns what `apply` takes: the variables, and beside them what is `frozen`, as it is in memory.

        An objective does this by itself; code that applies a model outside of one calls it, as all of the library does.
        Give the result to a compiled function as an argument, or the frozen trees become constants of the program.

        Args:
          variables: `{"params": ..., **state}`, with or without what is frozen.
          read: what gives the tree behind a handle; within a step `ctx.read`.
        """
        return {**variables, FROZEN: jax.tree.map(read, dict(self.frozen))} if self.frozen else dict(variables)

    def made_from(self, recipe: Recipe | None, **changes: Any) -> "Model":
        """Returns the same model with a recipe: that of the model which it wraps, with some `changes`."""
        known = None if recipe is None else recipe._replace(apply=self.apply, bare=False, **changes)
        return dataclasses.replace(self, recipe=known)

    @property
    def head(self) -> str:
        """The pattern of the last layer's parameters."""
        return self.stages[-1] if self.stages else "head"

    def inference(self, stages: tree.Patterns | None = None) -> "Model":
        """Returns the same model run in inference mode: running statistics, no dropout; its state stays.

        For linear probes and for frozen feature extractors.

        Args:
          stages: path patterns of the layers that do; all by default. The others run as they are told. `jt.optim.only`
            and `freeze` do this by themselves.
        """

        patterns = () if stages is None else tree.as_patterns(stages)

        def whole(variables, inputs, *, train, key, axis=None, still=None):
            outputs, _ = self.apply(variables, inputs, train=False, key=None)
            return outputs, state_of(variables)

        def partly(variables, inputs, *, train, key, axis=None, still=None):
            if not train:
                return whole(variables, inputs, train=False, key=None)
            mine = tree.mask(variables["params"], patterns)
            still = mine if still is None else jax.tree.map(lambda a, b: a | b, mine, still)
            return self.apply(variables, inputs, train=train, key=key, still=still, **given(axis=axis))

        return dataclasses.replace(self, apply=whole if stages is None else partly).made_from(self.recipe)


class Shared(NamedTuple):
    """What a twin shares.

    Attributes:
      first: the model under whose name the shared parameters are.
      own: path patterns of those that are not shared.
    """

    first: Model
    own: tuple[str, ...]


def given(**arguments: Any) -> dict[str, Any]:
    """Returns the arguments that are not None: a model need not know `axis` and `still`."""
    return {name: value for name, value in arguments.items() if value is not None}


def without_frozen(variables: Variables) -> dict[str, Any]:
    """Returns a model's variables without what is frozen: those of a module inside, which reads none of it."""
    return {kind: value for kind, value in variables.items() if kind != FROZEN}


def state_of(variables: Variables) -> dict[str, Any]:
    """Returns the running state among a model's variables: what is neither trained nor frozen."""
    return {kind: value for kind, value in variables.items() if kind not in ("params", FROZEN)}


def _check_handles(frozen: Any, name: str) -> None:
    what = f"the frozen part of model {name!r} is a dict, nested or not, of handles jt.Frozen(tree)"
    if not isinstance(frozen, Mapping):
        raise InputError(f"{what}; got a {type(frozen).__name__}")
    for path, leaf in tree.leaves_by_path(frozen).items():
        if not hasattr(leaf, "tree"):
            raise InputError(f"{what}; {path!r} is a {type(leaf).__name__}")


def _completed(apply, name):
    """Returns `apply` that wants what is frozen and gives back none of it."""

    def wrapped(variables, inputs, *, train, key, axis=None, still=None):
        if FROZEN not in variables:
            raise InputError(f"model {name!r} has a frozen part: apply it to model.complete(variables)")
        outputs, state = apply(variables, inputs, train=train, key=key, **given(axis=axis, still=still))
        return outputs, {kind: values for kind, values in state.items() if kind != FROZEN}

    return wrapped


def _without_axis(apply, name):
    """Returns `apply` with an argument `axis` that it has no use for, as no examples meet in it."""

    def wrapped(variables, inputs, *, train, key, axis=None):
        if axis is not None and train and any(state_of(variables).values()):
            raise InputError(
                f"model {name!r} has running state, but its apply takes no axis: under pmap each device would keep its "
                f"own. Give apply the argument axis=None and average over it, or train with mode='jit'"
            )
        return apply(variables, inputs, train=train, key=key)

    return wrapped


def _without_still(apply, name):
    """Returns `apply` with an argument `still`; only a model as a whole can then be frozen, or one without state."""

    def wrapped(variables, inputs, *, train, key, axis=None, still=None):
        flags = jax.tree.leaves(still)
        if train and flags and all(flag is True for flag in flags):
            outputs, _ = apply(variables, inputs, train=False, key=None)
            return outputs, state_of(variables)
        if train and any(flag is not False for flag in flags) and jax.tree.leaves(state_of(variables)):
            raise InputError(
                f"a part of model {name!r} is frozen, and it has running state ({', '.join(state_of(variables))}), but "
                f"its apply takes no argument still, so that the statistics of the frozen layers would drift. Train "
                f"model.inference(), which keeps all of them, or let them move: jt.optim.only(..., "
                f"adapt_statistics=True)"
            )
        return apply(variables, inputs, train=train, key=key, **given(axis=axis))

    return wrapped
