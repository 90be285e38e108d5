"""Test-time adaptation by entropy minimisation."""

from jaxtransfer import losses
from jaxtransfer.adaptation.domain import Domain
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.rows import kept


def tent(model: Model, *, output: str = "logits", view: str = "image", target: str = "target") -> Objective:
    """Builds (1/B) Σ H(softmax(f(x))) on the target, for batch norm's scales and shifts alone (Wang et al. 2021).

    arXiv:2006.10726. The method is this loss with an optimiser that moves nothing else; batch norm then normalises by
    the batch, whose predictions the metric is of, and other layers run in inference mode:

        scales = jt.adaptation.norm_parameters(model, variables)
        optimizer = jt.optim.only(optax.adam(1e-3), scales)
        batches = jt.data.zipped(target=jt.data.pipeline(target, 64))
        fitted = jt.fit(jt.adaptation.tent(model), optimizer, batches, steps=100, params=..., state=...)

    A `mask` leaves rows out of the loss, but not out of what batch norm normalises by: batches are of real examples.
    For predictions one by one afterwards, `ada_bn` gives the statistics of the whole target under the new weights. With
    any other optimiser it is entropy minimisation (Grandvalet & Bengio 2004), beside other terms too.

    Args:
      model: what trains.
      output: the model's output that holds the logits [B, C].
      view: the entry of the target's batch that the model sees.
      target: the entry of the batch that holds the target's, with `mask` where examples are left out.

    Returns:
      An objective with the metric `tent`, the mean entropy in nats.

    Raises:
      InputError: at init, for a batch without the target, and an unknown output.
    """
    domain = Domain.of(model, target, view)

    def loss(outputs, params, state, batch, ctx):
        mask = mask_of(domain.part(batch))
        value = ctx.mean(losses.entropy(kept(domain.read(outputs, output), mask)), mask)
        return value.value, state, {"tent": value}

    def check(outputs, batch):
        domain.read(outputs, output)

    return Objective("tent", (domain.forward,), loss, check=check, pooled=True)
