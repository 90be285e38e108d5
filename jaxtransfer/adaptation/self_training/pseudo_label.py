"""Pseudo-labels: the model's own sure guesses, learned as if they were labels."""

from jaxtransfer.adaptation.domain import Domain
from jaxtransfer.adaptation.self_training.guesses import check_logits, check_threshold, guessed, logits_of, taught
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.parts.masking import mask_of


def pseudo_label(
    model: Model, *, threshold: float = 0.95, output: str = "logits", view: str = "image", target: str = "target"
) -> Objective:
    """Builds (1/B) Σ 1[max p(x) > τ] · CE(argmax p(x), f(x)) on the target (Lee 2013, ICML workshop).

    The paper has no threshold and a weight that grows over the run; the released code of the Transfer-Learning-Library
    has a threshold of 0.95 and a weight that stays. Here a weight is a number or a schedule of the step:

        ramp = jt.schedules.linear_ramp(0.0, 3.0, 1000)
        objective = jt.classification(model).on("source") + ramp * jt.adaptation.pseudo_label(model, threshold=0)

    Args:
      model: what trains, and guesses.
      threshold: τ in [0, 1]; the mean is over all examples, those that are left out count as 0.
      output: the model's output that holds the logits [B, C].
      view: the entry of the target's batch that the model sees.
      target: the entry of the batch that holds the target's, with `mask` where examples are left out.

    Returns:
      An objective with the metrics `pseudo_label` and `pseudo_label/kept`, the share above the threshold.

    Raises:
      InputError: for a threshold out of range; at init, for a batch without the target.
    """
    check_threshold(threshold)
    domain = Domain.of(model, target, view)

    def loss(outputs, params, state, batch, ctx):
        guess = guessed(domain, outputs, output, batch)
        logits, mask = logits_of(domain, outputs, output, batch), mask_of(domain.part(batch))
        value, metrics = taught("pseudo_label", logits, guess.label, guess.sure > threshold, mask, ctx)
        return value.value, state, metrics

    def check(outputs, batch):
        check_logits(domain, outputs, output)

    return Objective("pseudo_label", (domain.forward,), loss, check=check, pooled=True)
