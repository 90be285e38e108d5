"""Views that predict each other without negatives: BYOL and SimSiam."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxtransfer import losses
from jaxtransfer.forward import Average, Forward, ema
from jaxtransfer.masks import mask_of
from jaxtransfer.model import Model
from jaxtransfer.objective import Context, Objective
from jaxtransfer.objectives.rows import kept
from jaxtransfer.objectives.views import VIEWS
from jaxtransfer.outputs import pick


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
    return _prediction("byol", model, ema(model, decay), views, prediction, projection, lambda cosine: 2 + 2 * cosine)


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
    return _prediction("simsiam", model, model, views, prediction, projection, lambda negative_cosine: negative_cosine)


def _prediction(name, model: Model, slow: Model | Average, views, prediction, projection, shown) -> Objective:
    fast, target = Forward.of(model, views), Forward.of(slow, views)

    def found(outputs):
        ours = [pick(f"model {model.name!r}", one, prediction) for one in outputs[fast]]
        return ours, [pick(f"model {model.name!r}", one, projection) for one in outputs[target]]

    def term(outputs, params, state, batch, ctx: Context):
        mask = mask_of(batch)
        (p1, p2), (t1, t2) = jax.tree.map(lambda rows: kept(rows, mask), found(outputs))
        t1, t2 = jax.lax.stop_gradient((t1, t2))
        value = ctx.mean(shown((losses.negative_cosine(p1, t2) + losses.negative_cosine(p2, t1)) / 2), mask)
        return value.value, state, {name: value}

    return Objective(name, (fast, target), term)
