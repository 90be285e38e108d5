"""SimSiam: a view predicts what the network itself, held fixed, says of the other."""

from collections.abc import Sequence

from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.objectives.selfsupervised.over_views import VIEWS
from jaxtransfer.objectives.selfsupervised.prediction import of_each_other


def simsiam(
    model: Model, *, views: Sequence[str] = VIEWS, prediction: str = "prediction", projection: str = "projection"
) -> Objective:
    """Builds SimSiam: −cos(prediction of one view, projection of the other held fixed), the mean over the two ways.

    (Chen and He 2021, arXiv:2011.10566.)

    Args:
      model: an encoder with a projection and a prediction of it.
      views: the entries of the batch.
      prediction: the output that predicts.
      projection: the output that is predicted; no gradient flows through it.

    Returns:
      An objective with the metric `simsiam`.
    """
    return of_each_other(
        "simsiam", model, model, views, prediction, projection, lambda negative_cosine: negative_cosine
    )
