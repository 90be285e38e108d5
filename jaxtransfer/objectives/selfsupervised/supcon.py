"""Supervised contrastive learning: all views of a class attract each other."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.losses._numerics import check_temperature
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.objectives.selfsupervised.over_views import VIEWS, over_views
from jaxtransfer.parts.rows import unit


def supcon(
    model: Model,
    *,
    temperature: float = 0.07,
    inside: bool = False,
    views: Sequence[str] = VIEWS,
    tap: str = "projection",
) -> Objective:
    """Builds supervised contrastive learning (Khosla et al. 2020, arXiv:2004.11362): see `jt.losses.supcon`.

    Args:
      model: an encoder with a projection.
      temperature: τ.
      inside: whether the mean over the positives is taken inside of the logarithm, L_in of the paper.
      views: the entries of the batch; it also reads `label`.
      tap: the output that is compared; brought to length 1.

    Returns:
      An objective with the metric `supcon`.
    """

    check_temperature(temperature)

    def loss(z1, z2, labels, mask=None, axis_name=None):
        z = unit(jnp.stack([z1, z2], axis=1))
        return losses.supcon(z, labels, temperature=temperature, inside=inside, mask=mask, axis_name=axis_name)

    return over_views("supcon", model, loss, views=views, tap=tap, alone=False)
