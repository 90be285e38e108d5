"""One domain's part of a batch: what a model gives on it, and which of its examples count."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.errors import InputError
from jaxtransfer.forward import Average, Forward, FrozenModel
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch, Context, Mean, view_of
from jaxtransfer.parts.outputs import Tap, pick
from jaxtransfer.parts.rows import gathered


@dataclasses.dataclass(frozen=True)
class Domain:
    """A model's run on `batch[name]`, and what a loss reads of it.

    A run of its own for each domain, so that a term shares those of `classification(model).on("source")` beside it,
    and `jt.together` makes one of all.

    Attributes:
      name: the entry of the batch that holds the domain's own batch.
      forward: the run on its inputs.
    """

    name: str
    forward: Forward

    @classmethod
    def of(cls, model: Model | FrozenModel | Average, name: str, view: str = "image") -> "Domain":
        """Returns the domain on which `model` sees `batch[name][view]`."""
        return cls(name, Forward.of(model, f"{name}/{view}"))

    def part(self, batch: Batch) -> Batch:
        """Returns the domain's own batch, with its mask and labels.

        Raises:
          InputError: where there is none of this name, or it is no batch.
        """
        found = view_of(batch, (self.name,))
        if not hasattr(found, "keys"):
            raise InputError(
                f"batch[{self.name!r}] must be a domain's batch of its own, a dict with 'image'; got a "
                f"{type(found).__name__}. jt.data.zipped(source=pipeline, target=pipeline) makes such batches"
            )
        return found

    def read(self, outputs: Any, tap: Tap) -> Any:
        """Returns what the model gives as `tap` on this device's examples, or a tuple of several."""
        return pick(f"model {self.forward.model.name!r}", outputs[self.forward], tap)

    def gathered(self, outputs: Any, tap: Tap, batch: Batch, ctx: Context) -> tuple[Any, jax.Array]:
        """Returns what the model gives as `tap` on the examples of all devices, and their mask [B], ones without one.

        Rows that the mask leaves out are zero.
        """
        rows, mask = gathered({"rows": self.read(outputs, tap)}, self.part(batch), ctx)
        return rows["rows"], mask


def whole(value: jax.Array, ctx: Context, *masks: jax.Array | None, least: int = 1) -> Mean:
    """Returns a value of a whole batch, in which domains meet, as a metric.

    It counts nothing where one of them has too few examples: in evaluation the shorter of two zipped sets ends first,
    and what the batches after it say, of one domain alone, would be averaged with the rest.

    Args:
      value: a scalar, of the rows of all devices.
      ctx: the context.
      *masks: the mask [B] of each domain, or None.
      least: how many examples a domain needs, for the value to tell something.
    """
    counted = jnp.ones((), bool)
    for mask in masks:
        if mask is not None:
            counted &= ctx.sum(mask > 0) >= least
    return Mean(jnp.where(counted, value, 0), counted.astype(value.dtype))
