"""What an objective runs: a model on a view of the batch, its weights trained, frozen, or a moving average."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.parts.split_statistics import Parts
from jaxtransfer.tree import leaves_by_path
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
      more: paths of further views, which run together with the first: batch norm sees them all.
      parts: how the batch is split in training, where batch norm is to see parts of it alone.
    """

    model: Model
    view: tuple[str, ...] = ("image",)
    variables: Frozen | Average | None = None
    more: tuple[tuple[str, ...], ...] = ()
    parts: Parts | None = None

    @classmethod
    def of(cls, model: "Model | FrozenModel | Average", view: str | Sequence[str] = "image") -> "Forward":
        """Returns the forward of a trained, a frozen or an averaged model on `batch[view]`, or on several views.

        A view is the path of an entry, `"image"` or `"source/image"`.
        """
        first, *more = (tuple(path.split("/")) for path in ([view] if isinstance(view, str) else view))
        own = weights_of(model)
        return cls(own.model, first, own.held, tuple(more))

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
        """Returns the inputs of all views as one batch, in which no row changes its device.

        Views of one example stand together. Views of different examples may differ in size: they interleave in
        gcd(sizes) groups, two rows of the one and one of the other say, as each device has as many groups of its own.

        Raises:
          InputError: for views that differ in more than their number of rows; in their type, say.
        """
        if len(inputs) == 1:
            return inputs[0]
        self._check_alike(inputs)
        sizes = _sizes(inputs)
        if len(set(sizes)) == 1:
            return jax.tree.map(lambda *x: jnp.stack(x, 1).reshape(-1, *x[0].shape[1:]), *inputs)
        groups = math.gcd(*sizes)

        def together(*views):
            parts = [jnp.reshape(x, (groups, -1, *x.shape[1:])) for x in views]
            return jnp.concatenate(parts, 1).reshape(-1, *views[0].shape[1:])

        return jax.tree.map(together, *inputs)

    def split(self, outputs: Any, inputs: Sequence[Any]) -> Any:
        """Returns what the joined batch gave as a tuple, an entry for each view; that itself where there is one.

        Args:
          outputs: of the model.
          inputs: of the views, which tell how many rows each of them has.
        """
        count = len(self.views)
        if count == 1:
            return outputs
        sizes = _sizes(inputs)
        if len(set(sizes)) == 1:
            apart = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]), outputs)
            return tuple(jax.tree.map(lambda x, n=number: x[:, n], apart) for number in range(count))
        groups = math.gcd(*sizes)
        ends = [sum(sizes[: number + 1]) // groups for number in range(count)]
        apart = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), outputs)

        def of_view(first, last):
            return jax.tree.map(lambda x: x[:, first:last].reshape(-1, *x.shape[2:]), apart)

        return tuple(of_view(first, last) for first, last in zip((0, *ends), ends, strict=False))

    def _check_alike(self, inputs: Sequence[Any]) -> None:
        """Raises for views that no model can see as one batch."""
        rows = [leaves_by_path(view) for view in inputs]
        for path, view in zip(self.views[1:], rows[1:], strict=True):
            for name in {**rows[0], **view}:
                told = [_row_of(one[name]) if name in one else "nothing" for one in (rows[0], view)]
                if told[0] != told[1]:
                    entries = ["/".join(filter(None, (*whose, name))) for whose in (self.views[0], path)]
                    raise InputError(
                        f"model {self.model.name!r} runs once on views that join into one batch, so they may differ in "
                        f"their number of rows alone; got {told[0]} a row of {entries[0]!r} and {told[1]} of "
                        f"{entries[1]!r}. Make them alike (resize images, scale those of uint8), or let it run on each "
                        f"by itself"
                    )

    def apply(self, variables: Tree, inputs: Any, *, train: bool, key: Any, **how: Any) -> tuple[Any, Tree]:
        """Runs the model; in training on each part of the batch by itself, where it has `parts`."""
        if self.parts is None or not train:
            return self.model.apply(variables, inputs, train=train, key=key, **how)
        return self.parts.apply(self.model.apply, variables, inputs, key=key, **how)

    @property
    def trained(self) -> bool:
        """Whether it runs on the weights that train."""
        return self.weights.trained


def _row_of(leaf: Any) -> str:
    """What a row is: its type and shape. Bytes among floats would lose what tells a model their scale."""
    return f"{jnp.result_type(leaf)} {jnp.shape(leaf)[1:]}"


def _sizes(inputs: Sequence[Any]) -> list[int]:
    """The rows of each view."""
    return [jax.tree.leaves(view)[0].shape[0] for view in inputs]
