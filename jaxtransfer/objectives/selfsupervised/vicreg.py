"""VICReg: views agree while every dimension keeps its variance and none repeats another."""

import functools
from collections.abc import Sequence

from jaxtransfer import losses
from jaxtransfer.losses._numerics import check_strength
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.objectives.selfsupervised.over_views import VIEWS, over_views


def vicreg(
    model: Model,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    views: Sequence[str] = VIEWS,
    tap: str = "projection",
) -> Objective:
    """Builds VICReg (Bardes et al. 2022, arXiv:2105.04906): see `jt.losses.vicreg`.

    Args:
      model: an encoder with a projection.
      invariance: λ.
      variance: μ.
      covariance: ν.
      views: the entries of the batch.
      tap: the output that is compared.
    """
    for name, weight in (("invariance", invariance), ("variance", variance), ("covariance", covariance)):
        check_strength(weight, name)
    loss = functools.partial(losses.vicreg, invariance=invariance, variance=variance, covariance=covariance)
    return over_views("vicreg", model, loss, views=views, tap=tap, alone=False)
