"""InfoNCE of two views or two towers: CPC, CLIP."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_temperature
from jaxtransfer.micro_batches import micro_batched
from jaxtransfer.model import Model
from jaxtransfer.objective import Mean, Objective
from jaxtransfer.objectives.selfsupervised.over_views import VIEWS, over_views

_LEAST_TEMPERATURE = 0.01  # of CLIP: the scores are scaled by 100 at most


def info_nce(
    phi: Model,
    psi: Model | None = None,
    *,
    temperature: float = 0.07,
    learn_temperature: bool = False,
    symmetric: bool = True,
    normalize: bool = True,
    views: Sequence[str] = VIEWS,
    tap: str = "projection",
    micro_batch: int | None = None,
    chunk: int | None = None,
) -> Objective:
    """Builds −log exp(φ(x)ᵀψ(y)/τ) / Σ_z exp(φ(x)ᵀψ(z)/τ), z over the global batch.

    (van den Oord et al. 2018, arXiv:1807.03748; with two towers, both directions and a learned temperature it is CLIP,
    Radford et al. 2021, arXiv:2103.00020.) See `jt.losses.info_nce` for its memory.

    Args:
      phi: the tower of the first view.
      psi: that of the second; the same by default.
      temperature: τ, or its first value.
      learn_temperature: learn log 1/τ with the towers, τ held above 0.01 as in CLIP. Metric: `info_nce/temperature`.
      symmetric: whether to take the mean of both directions.
      normalize: whether to bring the embeddings to length 1.
      views: the entries of the batch.
      tap: the output of the towers that is compared.
      micro_batch: run the towers on so many rows at a time, with exact gradients (`jt.models.micro_batched`); a
        shared tower sees both views together, so twice the batch.
      chunk: the largest side of a tile of the scores; by size if None.

    Returns:
      An objective with the metric `info_nce`.

    Raises:
      InputError: for a temperature that isn't positive, or is to be learned from below 0.01.
    """
    check_temperature(temperature)
    if learn_temperature and temperature < _LEAST_TEMPERATURE:
        raise InputError(f"temperature must be at least {_LEAST_TEMPERATURE} to be learned; got {temperature}")
    if psi is phi:
        psi = None
    if micro_batch is not None:
        phi, psi = micro_batched(phi, micro_batch), psi and micro_batched(psi, micro_batch)
    scale, options = f"{phi.name}_temperature", {"symmetric": symmetric, "normalize": normalize, "chunk": chunk}

    def at(value: Any) -> Objective:
        def loss(z1, z2, mask=None, axis_name=None):
            return losses.info_nce(z1, z2, temperature=value, mask=mask, axis_name=axis_name, **options)

        return over_views("info_nce", phi, loss, other=psi, views=views, tap=tap, apart=0, alone=False)

    fixed = at(temperature)
    if not learn_temperature:
        return fixed

    def term(outputs, params, state, batch, ctx):
        value = jnp.exp(-_at_most(params[scale]["log_scale"], -np.log(_LEAST_TEMPERATURE)))
        loss, state, metrics = at(value).loss(outputs, params, state, batch, ctx)
        return loss, state, {**metrics, "info_nce/temperature": Mean(value, jnp.ones(()))}

    def setup(key, batch):
        return {scale: {"log_scale": jnp.asarray(-np.log(temperature), jnp.float32)}}, {}

    return dataclasses.replace(fixed, loss=term, setup=setup)


@jax.custom_vjp
def _at_most(x: jax.Array, bound: float) -> jax.Array:
    """Returns min(x, bound), whose derivative beyond the bound is that of x for a step back and 0 for one further."""
    return jnp.minimum(x, bound)


_at_most.defvjp(
    lambda x, bound: (jnp.minimum(x, bound), (x < bound, bound)),
    lambda kept, change: (jnp.where(kept[0] | (change > 0), change, 0), jnp.zeros_like(kept[1])),
)
