"""A model is a pair of pure functions without weights; whoever writes it in which library stays inside it."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxtransfer import tree
from jaxtransfer.errors import InputError

Variables = Mapping[str, Any]
Outputs = Mapping[str, Any]


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
    """

    init: Callable[..., Variables]
    apply: Callable[..., tuple[Outputs, Variables]]
    name: str = "model"
    stages: tuple[str, ...] = ()

    def __post_init__(self):
        parameters = inspect.signature(self.apply).parameters
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            if "axis" not in parameters:
                object.__setattr__(self, "apply", _without_axis(self.apply, self.name))
            if "still" not in parameters:
                object.__setattr__(self, "apply", _without_still(self.apply, self.name))

    def named(self, name: str) -> "Model":
        """Returns the same pair of functions as another model, with weights of its own, under `name`."""
        return dataclasses.replace(self, name=name)

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
            return outputs, _state(variables)

        def partly(variables, inputs, *, train, key, axis=None, still=None):
            if not train:
                return whole(variables, inputs, train=False, key=None)
            mine = tree.mask(variables["params"], patterns)
            still = mine if still is None else jax.tree.map(lambda a, b: a | b, mine, still)
            return self.apply(variables, inputs, train=train, key=key, still=still, **given(axis=axis))

        return dataclasses.replace(self, apply=whole if stages is None else partly)


def given(**arguments: Any) -> dict[str, Any]:
    """Returns the arguments that are not None: a model need not know `axis` and `still`."""
    return {name: value for name, value in arguments.items() if value is not None}


def _state(variables: Variables) -> dict[str, Any]:
    return {kind: value for kind, value in variables.items() if kind != "params"}


def _without_axis(apply, name):
    """Returns `apply` with an argument `axis` that it has no use for, as no examples meet in it."""

    def wrapped(variables, inputs, *, train, key, axis=None):
        if axis is not None and train and any(_state(variables).values()):
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
            return outputs, _state(variables)
        if train and any(flag is not False for flag in flags) and jax.tree.leaves(_state(variables)):
            raise InputError(
                f"a part of model {name!r} is frozen, and it has running state ({', '.join(_state(variables))}), but "
                f"its apply takes no argument still, so that the statistics of the frozen layers would drift. Train "
                f"model.inference(), which keeps all of them, or let them move: jt.optim.only(..., "
                f"adapt_statistics=True)"
            )
        return apply(variables, inputs, train=train, key=key, **given(axis=axis))

    return wrapped
