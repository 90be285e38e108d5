"""Batch nuclear-norm maximisation of what the model predicts on the target."""

from jaxtransfer import losses
from jaxtransfer.adaptation.domain import Domain, whole
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective


def bnm(model: Model, *, output: str = "logits", view: str = "image", target: str = "target") -> Objective:
    """Builds −‖softmax(f(x))‖_* / B on the target: sure predictions, of many classes (Cui et al. 2020).

    arXiv:2003.12237. The value is `jt.losses.bnm` of the target's examples on all devices; the source is not read.

        objective = jt.classification(model).on("source") + jt.adaptation.bnm(model)

    Args:
      model: what trains.
      output: the model's output that holds the logits [B, C].
      view: the entry of the target's batch that the model sees.
      target: the entry of the batch that holds the target's, with `mask` where examples are left out.

    Returns:
      An objective with the metric `bnm`.

    Raises:
      InputError: at init, for a batch without the target.
    """
    domain = Domain.of(model, target, view)

    def loss(outputs, params, state, batch, ctx):
        logits, mask = domain.gathered(outputs, output, batch, ctx)
        value = losses.bnm(logits, mask=mask)
        return value, state, {"bnm": whole(value, ctx, mask)}

    return Objective("bnm", (domain.forward,), loss)
