"""Minimum class confusion of what the model predicts on the target."""

from jaxtransfer import losses
from jaxtransfer.adaptation.domain import Domain, whole
from jaxtransfer.losses._numerics import check_temperature
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective


def mcc(
    model: Model, *, temperature: float = 2.5, output: str = "logits", view: str = "image", target: str = "target"
) -> Objective:
    """Builds how much the model confuses classes on the target, weighted by how sure it is (Jin et al. 2020).

    arXiv:1912.03699. The value is `jt.losses.mcc` of the target's examples on all devices; the source is not read.

        objective = jt.classification(model).on("source") + jt.adaptation.mcc(model)

    Args:
      model: what trains.
      temperature: T > 0 of the predictions, 2.5 as in the released script.
      output: the model's output that holds the logits [B, C].
      view: the entry of the target's batch that the model sees.
      target: the entry of the batch that holds the target's, with `mask` where examples are left out.

    Returns:
      An objective with the metric `mcc`.

    Raises:
      InputError: for a temperature that isn't positive; at init, for a batch without the target.
    """
    check_temperature(temperature)
    domain = Domain.of(model, target, view)

    def loss(outputs, params, state, batch, ctx):
        logits, mask = domain.gathered(outputs, output, batch, ctx)
        value = losses.mcc(logits, temperature=temperature, mask=mask)
        return value, state, {"mcc": whole(value, ctx, mask)}

    return Objective("mcc", (domain.forward,), loss)
