"""BYOL: a view predicts what a slow copy of the network says of the other."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtransfer.forward import ema
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.objectives.selfsupervised.over_views import VIEWS
from jaxtransfer.objectives.selfsupervised.prediction import of_each_other


def byol(
    model: Model,
    *,
    decay: float | Callable[[Any], Any] = 0.996,
    views: Sequence[str] = VIEWS,
    prediction: str = "prediction",
    projection: str = "projection",
) -> Objective:
    """Builds BYOL: 2 − 2 cos(prediction of one view, slow projection of the other), the mean over the two ways.

    (Grill et al. 2020, arXiv:2006.07733, where the two ways are added.) The slow network is a moving average of the
    trained one, runs in training mode, and lives in the state as `<model>_ema`.

    Args:
      model: an encoder with a projection and a prediction of it, `with_heads(encoder, projection=head(4096, 256),
        prediction=("projection", head(4096, 256)))`.
      decay: of the average; the paper raises it to 1 along a cosine, which a schedule of the step does.
      views: the entries of the batch.
      prediction: the output that predicts.
      projection: the output that is predicted.

    Returns:
      An objective with the metric `byol`.
    """
    return of_each_other("byol", model, ema(model, decay), views, prediction, projection, lambda cosine: 2 + 2 * cosine)
