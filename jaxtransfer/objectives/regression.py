"""Supervised regression."""

from jaxtransfer import losses
from jaxtransfer.forward import Forward, FrozenModel
from jaxtransfer.masks import mask_of
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective, view_of


def regression(
    model: Model | FrozenModel, *, view: str = "input", target: str = "value", output: str = "logits"
) -> Objective:
    """Builds (1/n) Σᵢ ‖f(xᵢ; w) − yᵢ‖² / d, the mean squared error.

    Args:
      model: what gives the predictions.
      view: entry of the batch with the inputs [B, ...].
      target: entry with the true values [B, d]; `mask` [B] leaves examples out, where there is one.
      output: the name of the model's output [B, d].

    Returns:
      An objective with the metric `regression`.
    """
    forward = Forward.of(model, view)

    def loss(outputs, params, state, batch, ctx):
        errors = losses.squared_error(outputs[forward][output], view_of(batch, (target,)))
        value = ctx.mean(errors, mask_of(batch))
        return value.value, state, {"regression": value}

    return Objective("regression", (forward,), loss)
