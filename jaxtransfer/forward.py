"""What an objective runs: a model on a view of the batch, its weights trained, frozen, or a moving average."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.model import Model
from jaxtransfer.parts import Parts
from jaxtransfer.weights import Average, Frozen, FrozenModel, Weights, ema, frozen, on, weights_of

__all__ = ["Average", "Forward", "Frozen", "FrozenModel", "ema", "frozen"]

Tree = Any


@dataclasses.dataclass(frozen=True)
class Forward:
    """One run of a model on one view of the batch, or on several joined: then its outputs are a tuple, one per view.

    Attributes:
      model: the model.
      view: the path of the inputs in the batch.
      variables: its weights, where they are not the trained ones: a frozen tree, or a moving average.
      more: paths of further views of the same examples, which run together with the first: batch norm sees them all.
      parts: how the batch is split in training, where batch norm is to see parts of it alone.
    """

    model: Model
    view: tuple[str, ...] = ("image",)
    variables: Frozen | Average | None = None
    more: tuple[tuple[str, ...], ...] = ()
    parts: Parts | None = None

    @classmethod
    def of(cls, model: "Model | FrozenModel | Average", view: str | Sequence[str] = "image") -> "Forward":
        """Returns the forward of a trained, a frozen or an averaged model on `batch[view]`, or on several views."""
        (first, *more) = [view] if isinstance(view, str) else view
        own = weights_of(model)
        return cls(own.model, (first,), own.held, tuple((name,) for name in more))

    @property
    def weights(self) -> Weights:
        """What it runs on: the model with the weights that train, with frozen ones, or with an average."""
        return on(self.model, self.variables)

    @property
    def views(self) -> tuple[tuple[str, ...], ...]:
        """The paths of all its views."""
        return (self.view, *self.more)

    def within(self, key: str) -> "Forward":
        """Returns the same forward on `batch[key]`."""
        moved = [(key, *view) for view in self.views]
        return dataclasses.replace(self, view=moved[0], more=tuple(moved[1:]))

    def join(self, inputs: Sequence[Any]) -> Any:
        """Returns the inputs of all views as one batch, views of one example together: no row changes its device."""
        if len(inputs) == 1:
            return inputs[0]
        return jax.tree.map(lambda *x: jnp.stack(x, 1).reshape(-1, *x[0].shape[1:]), *inputs)

    def split(self, outputs: Any) -> Any:
        """Returns what the joined batch gave as a tuple, an entry for each view; that itself where there is one."""
        count = len(self.views)
        if count == 1:
            return outputs
        apart = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]), outputs)
        return tuple(jax.tree.map(lambda x, n=number: x[:, n], apart) for number in range(count))

    def apply(self, variables: Tree, inputs: Any, *, train: bool, key: Any, **how: Any) -> tuple[Any, Tree]:
        """Runs the model; in training on each part of the batch by itself, where it has `parts`."""
        if self.parts is None or not train:
            return self.model.apply(variables, inputs, train=train, key=key, **how)
        return self.parts.apply(self.model.apply, variables, inputs, key=key, **how)

    @property
    def trained(self) -> bool:
        """Whether it runs on the weights that train."""
        return self.weights.trained
