"""A moving average of the weights that train, for its own sake: nothing runs on it in training."""

from typing import Any

import jax.numpy as jnp

from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.weights import Average, averaged_with


def averaged(model: Model | Average, decay: Any = 0.999, *, name: str = "", warm_up: bool = False) -> Objective:
    """Builds a term of loss 0 that keeps w̄ ← decay · w̄ + (1 − decay) · w, Polyak's average of a model's weights.

    It runs no model: a step costs one pass over the weights more. The average is held in at least float32, moves once
    per update (at the start of the next step, so that it is one update behind) and is part of the state, so it is saved
    and restored with it. Where no other term runs the average, its running statistics are the moving average of the
    model's, by the same decay; `jt.recompute_statistics` gives those that belong to w̄.

        objective = jt.classification(model) + jt.averaged(model, 0.999)
        both = jt.classification(model) + jt.classification(jt.ema(model)).named("average")
        fitted = jt.fit(objective, ..., eval_objective=both, monitor="average/accuracy")
        teacher = jt.frozen(jt.ema(model), fitted.state)  # to predict with, or to distil from

    Args:
      model: what trains in another term; or the average of it that other terms run, `jt.ema(model)`.
      decay: as for `jt.ema`; by an average that is given it is known.
      name: of the average in the state; by default the model's with `_ema`.
      warm_up: as for `jt.ema`.

    Returns:
      An objective without metrics. It stands beside `jt.balance`, whose rules would take its gradient, which is 0, into
      account.

    Raises:
      InputError: for a decay outside of [0, 1]; at init, where no term trains the model.
    """
    kept = averaged_with(model, decay, name=name, warm_up=warm_up)

    def loss(outputs, params, state, batch, ctx):
        return jnp.zeros(()), state, {}

    return Objective("averaged", (), loss, kept=(kept,))
