"""A model is a pair of pure functions without weights; whoever writes it in which library stays inside it."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

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
        also takes `axis=None`, the name of the device axis to average over; it is passed only under `pmap`.
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
        if "axis" not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            object.__setattr__(self, "apply", _without_axis(self.apply, self.name))

    def named(self, name: str) -> "Model":
        """Returns the same pair of functions as another model, with weights of its own, under `name`."""
        return dataclasses.replace(self, name=name)

    @property
    def head(self) -> str:
        """The pattern of the last layer's parameters."""
        return self.stages[-1] if self.stages else "head"

    def inference(self) -> "Model":
        """Returns the same model run in inference mode throughout: running statistics, no dropout; its state stays.

        For linear probes and for frozen feature extractors.
        """

        def apply(variables, inputs, *, train, key, axis=None):
            outputs, _ = self.apply(variables, inputs, train=False, key=None)
            return outputs, {name: value for name, value in variables.items() if name != "params"}

        return dataclasses.replace(self, apply=apply)


def _without_axis(apply, name):
    """Returns `apply` with an argument `axis` that it has no use for, as no examples meet in it."""

    def wrapped(variables, inputs, *, train, key, axis=None):
        if axis is not None and train and any(value for kind, value in variables.items() if kind != "params"):
            raise InputError(
                f"model {name!r} has running state, but its apply takes no axis: under pmap each device would keep its "
                f"own. Give apply the argument axis=None and average over it, or train with mode='jit'"
            )
        return apply(variables, inputs, train=train, key=key)

    return wrapped
