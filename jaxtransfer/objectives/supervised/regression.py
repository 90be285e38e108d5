"""Supervised regression."""

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Average, Forward, FrozenModel
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective, view_of
from jaxtransfer.parts.masking import check_weight, weights_of
from jaxtransfer.parts.outputs import pick
from jaxtransfer.parts.rows import kept


def regression(
    model: Model | FrozenModel | Average,
    *,
    view: str = "input",
    label: str | None = None,
    output: str = "logits",
    target: str | None = None,
) -> Objective:
    """Builds (1/n) Σᵢ ‖f(xᵢ; w) − yᵢ‖² / d, the mean squared error; with weights Σᵢ mᵢ ‖f(xᵢ; w) − yᵢ‖² / d / Σᵢ mᵢ.

    mᵢ is the batch's `mask` [B] times its `weight` [B], where it has them and the term doesn't read that entry itself;
    the sums are over the global batch, in evaluation over all examples. Several heads or columns are several terms,
    each under a name of its own: `jt.regression(net, output="age", label="age").named("age")`.

    Args:
      model: what gives the predictions.
      view: entry of the batch with the inputs [B, ...].
      label: entry with the true values [B, d], of one number also [B]; `value` by default.
      output: the name of the model's output [B, d].
      target: another word for `label`.

    Returns:
      An objective with the metric `regression`.

    Raises:
      InputError: for `label` and `target` that differ; at init, for an unknown output, shapes that differ, and a
        `weight` of the batch that isn't [B], finite and not negative.
    """
    if label is not None and target is not None and label != target:
        raise InputError(f"label and target are two words for one entry of the batch; got {label!r} and {target!r}")
    forward, entry = Forward.of(model, view), label or target or "value"

    def loss(outputs, params, state, batch, ctx):
        weights = weights_of(batch, besides=(view, entry))
        predictions = pick(f"model {forward.model.name!r}", outputs[forward], output)
        values = view_of(batch, (entry,))
        if values.ndim == 1 and predictions.shape[1:] == (1,):  # a column of numbers, as tables have it
            values = values[:, None]
        errors = losses.squared_error(kept(predictions, weights), kept(values, weights))
        value = ctx.mean(errors, weights)
        return value.value, state, {"regression": value}

    def check(outputs, batch):
        check_weight(batch, besides=(view, entry))

    return Objective("regression", (forward,), loss, check=check, pooled=True)
