"""Decoupled contrastive learning: NT-Xent without the positive in the denominator."""

import functools
from collections.abc import Sequence

from jaxtransfer import losses
from jaxtransfer.losses._numerics import check_temperature
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.objectives.selfsupervised.over_views import VIEWS, over_views


def decoupled(
    model: Model,
    *,
    temperature: float = 0.1,
    sigma: float | None = None,
    views: Sequence[str] = VIEWS,
    tap: str = "projection",
) -> Objective:
    """Builds decoupled contrastive learning (Yeh et al. 2022, arXiv:2110.06848): see `jt.losses.dcl`; metric `dcl`.

    Args:
      model: an encoder with a projection.
      temperature: τ.
      sigma: of the weights; None for none.
      views: the entries of the batch.
      tap: the output that is compared.
    """
    check_temperature(temperature)
    if sigma is not None:
        check_temperature(sigma, "sigma")
    loss = functools.partial(losses.dcl, temperature=temperature, sigma=sigma)
    return over_views("dcl", model, loss, views=views, tap=tap, apart=0, alone=False)
