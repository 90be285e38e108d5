"""What adversarial methods share: the rows of two domains, and a discriminator that is to tell them apart."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtransfer.adaptation.domain import Domain
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward
from jaxtransfer.losses._numerics import check_strength
from jaxtransfer.losses.adversarial import gradient_reversal
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch, Context, fresh
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.outputs import shapes_of
from jaxtransfer.parts.rows import kept

Tree = Any
Coefficient = Any  # a number, or a schedule: step -> number


class Pair(NamedTuple):
    """Rows of both domains, this device's, or a mask of each."""

    source: Any
    target: Any


EVERY_ROW_ALIKE = Pair(None, None)


@dataclasses.dataclass(frozen=True)
class Domains:
    """A model's runs on the two domains of a batch.

    Attributes:
      source: the labelled one.
      target: the other.
    """

    source: Domain
    target: Domain

    @classmethod
    def of(cls, model: Model, source: str, target: str, view: str, *, on_target: Model | None = None) -> "Domains":
        """Returns the runs of `model` on `batch[source][view]` and `batch[target][view]`; there maybe of another one.

        Raises:
          InputError: for domains of one name.
        """
        if source == target:
            raise InputError(f"source and target are two entries of the batch; got {source!r} for both")
        return cls(Domain.of(model, source, view), Domain.of(on_target or model, target, view))

    @property
    def forwards(self) -> tuple[Forward, Forward]:
        """Both runs."""
        return self.source.forward, self.target.forward

    def rows(self, outputs: Any, tap: str, batch: Batch) -> Pair:
        """Returns what the model gives as `tap` on this device's rows, 0 where a mask leaves them out."""
        masks = self.masks(batch)
        found = (self.source.read(outputs, tap), self.target.read(outputs, tap))
        return Pair(*(kept(rows, mask) for rows, mask in zip(found, masks, strict=True)))

    def masks(self, batch: Batch) -> Pair:
        """Returns the mask [B] of each domain, or None."""
        return Pair(mask_of(self.source.part(batch)), mask_of(self.target.part(batch)))

    def shapes(self, batch: Batch, *taps: str) -> list[jax.ShapeDtypeStruct]:
        """Returns the shapes [B, D] of outputs on the source, flattened."""
        found = {self.source.forward: shapes_of(self.source.forward, batch)}
        rows = [self.source.read(found, tap) for tap in taps]
        return [jax.ShapeDtypeStruct((x.shape[0], math.prod(x.shape[1:])), x.dtype) for x in rows]

    def check(self, outputs: Any, *taps: str) -> None:
        """Raises where the model lacks an output, or gives one that is no batch of vectors or maps."""
        for domain in (self.source, self.target):
            for tap in taps:
                if domain.read(outputs, tap).ndim < 2:
                    shape = domain.read(outputs, tap).shape
                    raise InputError(f"an adversary sees features [batch, ...]; {tap!r} of the model has shape {shape}")

    def named(self, model: str, method: str) -> str:
        """Returns a name for a network of a method's own, that differs where the domains do."""
        others = [one.name for one, usual in ((self.source, "source"), (self.target, "target")) if one.name != usual]
        return "_".join((model, method, *(name.replace("/", "_") for name in others)))


def setup_of(network: Model, key: jax.Array, inputs: Any) -> tuple[Tree, Tree]:
    """Returns the fresh weights and the state of a network that a term runs itself, by its name."""
    params, state = fresh(network, key, inputs)
    return {network.name: params}, {network.name: state}


def run_on_both(network: Model, rows: Pair, params: Tree, state: Tree, ctx: Context) -> tuple[Pair, Tree]:
    """Runs a network once on the rows of both domains, so that its batch norm sees them together; returns its logits.

    Domains that are normalised each by itself have equal means and variances: a discriminator would tell them apart by
    what is left, and what it says in evaluation, by the running statistics of both, would be something else.
    """
    flat = [one.reshape(one.shape[0], -1) for one in rows]
    outputs, state = ctx.run(network, params, state, jnp.concatenate(flat))
    if "logits" not in outputs:
        raise InputError(f"model {network.name!r} must give 'logits'; it gives {sorted(outputs)}")
    return Pair(*jnp.split(outputs["logits"], [len(flat[0])])), state


def at(coefficient: Coefficient, ctx: Context) -> Any:
    """Returns a number or the value of a schedule at this step."""
    return coefficient(ctx.step) if callable(coefficient) else coefficient


def check_coefficient(coefficient: Coefficient) -> None:
    """Raises for a number that is negative or not finite: the features would help the adversary."""
    if not callable(coefficient):
        check_strength(coefficient, "coefficient")


def told_apart(
    network: Model,
    rows: Pair,
    coefficient: Coefficient,
    params: Tree,
    state: Tree,
    ctx: Context,
    *,
    masks: Pair,
    weights: Pair = EVERY_ROW_ALIKE,
) -> tuple[jax.Array, jax.Array, Tree]:
    """Lets a discriminator tell the domains of rows apart that are behind a gradient reversal.

    Returns:
      The loss and the accuracy of `domain_entropy`, and the new state.
    """
    reverse = at(coefficient, ctx)
    hidden = Pair(*(gradient_reversal(one, reverse) for one in rows))
    logits, state = run_on_both(network, hidden, params, state, ctx)
    return *domain_entropy(network, logits, masks, ctx, weights), state


def domain_entropy(
    network: Model, logits: Pair, masks: Pair, ctx: Context, weights: Pair = EVERY_ROW_ALIKE
) -> tuple[jax.Array, jax.Array]:
    """Computes ½ mean_s w log(1 + exp(−d)) + ½ mean_t w log(1 + exp(d)) of a discriminator's logits d.

    The binary cross-entropy with 1 for the source, each domain half, whatever the sizes of the batches.

    Returns:
      The loss, and the discriminator's accuracy, the mean of that on either domain.
    """
    if logits.source.shape[1:] != (1,):
        raise InputError(f"discriminator {network.name!r} must give logits [batch, 1]; got {logits.source.shape}")
    losses, right = [], []
    for sign, scores, mask, weight in zip((1, -1), logits, masks, weights, strict=True):
        margin = sign * scores[:, 0]
        values = jax.nn.softplus(-margin)
        losses.append(ctx.mean(values if weight is None else weight * values, mask).value)
        answers = margin >= 0 if sign > 0 else margin > 0  # a tie counts as source, as released
        right.append(ctx.mean(answers.astype(jnp.float32), mask).value)
    return (losses[0] + losses[1]) / 2, (right[0] + right[1]) / 2


def class_means(probabilities: jax.Array, mask: jax.Array | None, ctx: Context) -> jax.Array:
    """Returns the mean [C] of probabilities [B, C] over the rows of all devices; zeros where none counts."""
    rows = ctx.gather(probabilities)
    weights = jnp.ones(rows.shape[0], rows.dtype) if mask is None else ctx.gather(mask).astype(rows.dtype)
    return jnp.sum(weights[:, None] * rows, axis=0) / jnp.maximum(jnp.sum(weights), 1)
