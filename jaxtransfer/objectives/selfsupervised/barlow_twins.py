"""Barlow Twins: the cross-correlation of the views' embeddings becomes the identity."""

import functools
from collections.abc import Sequence

from jaxtransfer import losses
from jaxtransfer.losses._numerics import check_strength
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.objectives.selfsupervised.over_views import VIEWS, over_views


def barlow_twins(
    model: Model, *, strength: float = 5e-3, views: Sequence[str] = VIEWS, tap: str = "projection"
) -> Objective:
    """Builds Barlow Twins (Zbontar et al. 2021, arXiv:2103.03230): see `jt.losses.barlow_twins`.

    Args:
      model: an encoder with a projection.
      strength: λ of the off-diagonal.
      views: the entries of the batch.
      tap: the output that is compared.
    """
    check_strength(strength)
    loss = functools.partial(losses.barlow_twins, strength=strength)
    return over_views("barlow_twins", model, loss, views=views, tap=tap, alone=False)
