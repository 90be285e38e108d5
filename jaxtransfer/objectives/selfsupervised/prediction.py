"""Views that predict each other without negatives: what BYOL and SimSiam share."""

from collections.abc import Callable, Sequence

import jax

from jaxtransfer import losses
from jaxtransfer.forward import Average, Forward
from jaxtransfer.model import Model
from jaxtransfer.objective import Context, Objective
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.outputs import pick
from jaxtransfer.parts.rows import kept


def of_each_other(
    name: str,
    model: Model,
    slow: Model | Average,
    views: Sequence[str],
    prediction: str,
    projection: str,
    shown: Callable[[jax.Array], jax.Array],
) -> Objective:
    """Builds the mean over the two ways of shown(−cos(prediction of a view, projection of the other held fixed)).

    Args:
      name: of the objective and its metric.
      model: an encoder with a projection and a prediction of it.
      slow: what projects: the model itself, or its average.
      views: the entries of the batch, two.
      prediction: the output that predicts.
      projection: the output that is predicted.
      shown: of the negative cosine [B] the value.
    """
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
