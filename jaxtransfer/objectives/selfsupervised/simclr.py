"""SimCLR: a view is told from all other examples by the other view of its own."""

import functools
from collections.abc import Sequence

from jaxtransfer import losses
from jaxtransfer.losses._numerics import check_temperature
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.objectives.selfsupervised.over_views import VIEWS, over_views


def simclr(
    model: Model, *, temperature: float = 0.5, views: Sequence[str] = VIEWS, tap: str = "projection"
) -> Objective:
    """Builds SimCLR (Chen et al. 2020, arXiv:2002.05709): see `jt.losses.nt_xent`; metric `simclr`.

    Args:
      model: an encoder with a projection, `jt.models.with_heads(encoder, projection=jt.models.head(512, 128))`.
      temperature: τ.
      views: the entries of the batch, two augmentations of each image.
      tap: the output that is compared.
    """
    check_temperature(temperature)
    loss = functools.partial(losses.nt_xent, temperature=temperature)
    return over_views("simclr", model, loss, views=views, tap=tap, apart=0, alone=False)
