"""The term that a distance between features of two domains or more makes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxtransfer.adaptation.domain import Domain, whole
from jaxtransfer.errors import InputError
from jaxtransfer.objective import Batch, Objective
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.outputs import Tap
from jaxtransfer.parts.rows import kept

Layers = tuple[Any, ...]  # features [B, ...] of one domain at each tap
Distance = Callable[[Sequence[Layers], Sequence[jax.Array | None], str | None], jax.Array]


def distance_term(name: str, domains: Sequence[Domain], tap: Tap, distance: Distance) -> Objective:
    """Builds the term that lowers a distance between domains, each seen at one output of the model or several.

    Args:
      name: of its metric.
      domains: in the order in which the distance takes them.
      tap: the output, or a tuple of them.
      distance: from the layers of each domain [B, D], the masks of its rows [B] or None, and the name of the axis over
        which both are split under `pmap`, to a scalar.
    """
    taps = (tap,) if isinstance(tap, str) else tuple(tap)
    if not taps:
        raise InputError(f"{name}: tap names one output of the model or more; got none")
    if len({domain.name for domain in domains}) < len(domains):
        raise InputError(f"{name}: domains are different entries of the batch; got {[one.name for one in domains]}")

    def layers(outputs, domain: Domain, mask=None) -> Layers:
        return tuple(kept(_flat(x), mask) for x in domain.read(outputs, taps))

    def loss(outputs, params, state, batch, ctx):
        masks = [mask_of(domain.part(batch)) for domain in domains]
        rows = [layers(outputs, domain, mask) for domain, mask in zip(domains, masks, strict=True)]
        value = distance(rows, masks, ctx.axis)
        return value, state, {name: whole(value, ctx, *masks, least=2)}

    def check(outputs, batch: Batch):
        shapes = []
        for domain in domains:
            domain.part(batch)
            found = domain.read(outputs, taps)
            for output, x in zip(taps, found, strict=True):
                if len(x.shape) < 2:
                    raise InputError(f"{name} compares features [batch, ...]; output {output!r} has shape {x.shape}")
            if found[0].shape[0] < 2:
                raise InputError(
                    f"{name} compares distributions, and the batch of {domain.name!r} has {found[0].shape[0]} example; "
                    f"choose batches of two or more, the larger the better"
                )
            shapes.append(tuple(jax.ShapeDtypeStruct(_flat_shape(x.shape), x.dtype) for x in found))
        jax.eval_shape(lambda rows: distance(rows, [None] * len(rows), None), shapes)

    return Objective(name, tuple(domain.forward for domain in domains), loss, check=check)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(_flat_shape(x.shape))


def _flat_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])
