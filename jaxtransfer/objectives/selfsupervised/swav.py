"""SwAV: a view predicts to which prototypes the others were assigned."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_temperature
from jaxtransfer.model import Model
from jaxtransfer.objective import Context, Objective, named_key
from jaxtransfer.objectives.selfsupervised.crops import all_views, dimension, multi_crop
from jaxtransfer.objectives.selfsupervised.over_views import VIEWS
from jaxtransfer.parts.rows import check_several, gathered, mean_of_all, unit


def swav(
    model: Model,
    *,
    prototypes: int = 3000,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    freeze: int = 0,
    views: Sequence[str] = VIEWS,
    crops: Sequence[str] = (),
    tap: str = "projection",
) -> Objective:
    """Builds SwAV: each view predicts to which prototypes the others were assigned: see `jt.losses.swav`.

    (Caron et al. 2020, arXiv:2006.09882.) The assignment balances the global batch.

    Args:
      model: an encoder with a projection.
      prototypes: K, learned vectors of length 1.
      temperature: τ of the predictions.
      epsilon: of the assignment.
      iterations: of the assignment.
      freeze: updates for which the prototypes stay; the paper holds them for the first epoch.
      views: the entries of the batch that are assigned.
      crops: further, smaller views, of one size, which only predict.
      tap: the output that is compared; brought to length 1.

    Returns:
      An objective with the metric `swav`.

    Raises:
      InputError: for a temperature, ε or count that no run can have.
    """
    check_temperature(temperature)
    check_temperature(epsilon, "epsilon")
    for what, count, least in (("prototypes", prototypes, 1), ("iterations", iterations, 1), ("freeze", freeze, 0)):
        if count < least:
            raise InputError(f"swav: {what} must be at least {least}; got {count}")
    forwards, name = multi_crop(model, views, crops), f"{model.name}_prototypes"

    def setup(key, batch):
        dim = dimension(forwards[0], tap, batch)
        kernel = jax.random.normal(named_key(key, name), (prototypes, dim))
        return {name: {"vectors": unit(kernel)}}, {}

    def term(outputs, params, state, batch, ctx: Context):
        vectors = params[name]["vectors"]
        if freeze:
            vectors = jnp.where(jnp.asarray(ctx.step) < freeze, jax.lax.stop_gradient(vectors), vectors)
        found = all_views(forwards, outputs, tap, model)
        check_several(found[0], ctx, "swav")
        rows, mask = gathered({"z": found}, batch, ctx)
        scores = [unit(z) @ unit(vectors).T for z in rows["z"]]
        options = {"temperature": temperature, "epsilon": epsilon, "iterations": iterations}
        value = mean_of_all(losses.swav(scores, codes=len(views), mask=mask, **options), mask)
        return value.value, state, {"swav": value}

    return Objective("swav", forwards, term, setup=setup)
