"""What the methods of this folder share: the model's own label of an example, how sure it is, and what it is taught."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import losses
from jaxtransfer.adaptation.domain import Domain
from jaxtransfer.context import Context
from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_share
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch, Mean
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.rows import kept


class Guesses(NamedTuple):
    """What a model says of examples that nobody labelled; cut off from differentiation.

    Attributes:
      label: int32 [B], the class of the largest probability.
      sure: float [B], that probability.
      logits: float [B, C], in at least float32; 0 where the mask leaves an example out.
    """

    label: jax.Array
    sure: jax.Array
    logits: jax.Array


def guessed(domain: Domain, outputs: Any, output: str, batch: Batch) -> Guesses:
    """Returns the guesses for a domain's examples on this device."""
    logits = jax.lax.stop_gradient(logits_of(domain, outputs, output, batch))
    return Guesses(jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.max(jax.nn.softmax(logits), axis=-1), logits)


def logits_of(domain: Domain, outputs: Any, output: str, batch: Batch) -> jax.Array:
    """Returns the logits [B, C] in at least float32, 0 where the mask leaves an example out."""
    logits = kept(domain.read(outputs, output), mask_of(domain.part(batch)))
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def taught(
    name: str, logits: jax.Array, label: jax.Array, keep: jax.Array, mask: jax.Array | None, ctx: Context
) -> tuple[Mean, dict[str, Mean]]:
    """Returns the mean over all examples of 1[kept] · cross-entropy, and the metrics `name` and `name/kept`."""
    keep = keep.astype(logits.dtype)
    value = ctx.mean(losses.cross_entropy(logits, label) * keep, mask)
    return value, {name: value, f"{name}/kept": ctx.mean(keep, mask)}


def check_threshold(threshold: float) -> None:
    """Raises for a threshold of a probability that is none."""
    check_share(threshold, "threshold")


def check_logits(domain: Domain, outputs: Any, output: str) -> int:
    """Returns how many classes the logits tell apart.

    Raises:
      InputError: for an output that isn't [B, C].
    """
    shape = domain.read(outputs, output).shape
    if len(shape) != 2:
        raise InputError(
            f"self-training takes logits [batch, classes]; {output!r} of model {domain.forward.model.name!r} has shape "
            f"{shape}"
        )
    return shape[1]


def check_several_models(method: str, models: Sequence[Model], count: int) -> None:
    """Raises where there are not as many models as a method has, each under a name of its own."""
    names = [one.name for one in models]
    if len(names) != count or len(set(names)) < count:
        raise InputError(
            f"{method} needs {count} models of different names; got {names}: rename with model.named('other')"
        )


def check_same_classes(domains: Sequence[Domain], outputs: Any, output: str) -> int:
    """Returns how many classes models that label for each other tell apart.

    Raises:
      InputError: where they differ, and for outputs that are not [B, C].
    """
    counts = {domain.forward.model.name: check_logits(domain, outputs, output) for domain in domains}
    if len(set(counts.values())) > 1:
        raise InputError(f"models that label for each other must have the same classes; got {counts}")
    return next(iter(counts.values()))


def check_index(method: str, part: Batch, target: str, examples: int) -> None:
    """Raises where a domain's batch doesn't number its examples in [0, examples)."""
    if "index" not in part:
        raise InputError(
            f"{method} reads the number of each example as batch[{target!r}]['index']; add it to the data: "
            "dataset.with_columns({'index': np.arange(len(dataset))})"
        )
    index = part["index"]
    if isinstance(index, jax.Array) and not index.is_fully_addressable:
        return  # no process has them all
    index = np.asarray(index)
    if index.size and not 0 <= index.min() <= index.max() < examples:
        raise InputError(f"{method}: index must be in [0, {examples}); got {index.min()} to {index.max()}")


def if_numbered(value: jax.Array, index: jax.Array, mask: jax.Array, examples: int) -> jax.Array:
    """Returns a value, NaN where an example that counts has a number out of [0, examples).

    `check_index` sees the first batch alone, and a number beyond the memory would be read as the last one's, and not be
    written at all: a wrong result that nobody sees.

    Args:
      value: what becomes NaN.
      index: the numbers [B] of all devices' examples.
      mask: which count [B].
      examples: N.
    """
    fits = (index >= 0) & (index < examples)
    return jnp.where(jnp.all(fits | (mask <= 0)), value, jnp.nan)
