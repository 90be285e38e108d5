"""Unsupervised data augmentation: predictions on strongly changed examples follow sharpened ones on weak views."""

import jax
import jax.numpy as jnp

from jaxtransfer.adaptation.domain import Domain
from jaxtransfer.adaptation.self_training.guesses import check_logits, check_threshold, guessed, logits_of
from jaxtransfer.losses._numerics import check_temperature
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.parts.masking import mask_of


def uda(
    model: Model,
    *,
    temperature: float = 0.4,
    threshold: float = 0.8,
    output: str = "logits",
    view: str = "image",
    strong: str = "image2",
    target: str = "target",
) -> Objective:
    """Builds (1/B) Σ 1[max p(x) > τ] · KL(softmax(f(x) / T) ‖ softmax(f(x'))) on the target (Xie et al. 2020).

    arXiv:1904.12848. x is a weak view, which is not differentiated, and x' a stronger one. As their code does, T
    sharpens the weak view alone, p is not sharpened, and the mean is over all examples; the defaults are theirs for
    CIFAR-10. The Transfer-Learning-Library divides the logits of the strong view by T instead, and averages over the
    examples that are kept. The annealing of the training signal is a term of its own in place of the source's
    cross-entropy:

        rises = jt.schedules.linear_ramp(1 / classes, 1.0, steps)
        objective = jt.adaptation.signal_annealing(model, rises).on("source") + jt.adaptation.uda(model)

    Args:
      model: what trains; run once on both views within `jt.together`.
      temperature: T > 0.
      threshold: τ in [0, 1]; 0 keeps all.
      output: the model's output that holds the logits [B, C].
      view: the entry of the target's batch with the weak view.
      strong: the entry with the strong view.
      target: the entry of the batch that holds the target's, with `mask` where examples are left out.

    Returns:
      An objective with the metrics `uda` and `uda/kept`, the share above the threshold.

    Raises:
      InputError: for a temperature or threshold out of range; at init, for a batch without the target or one of its
        views.
    """
    check_temperature(temperature)
    check_threshold(threshold)
    weak, hard = Domain.of(model, target, view), Domain.of(model, target, strong)

    def loss(outputs, params, state, batch, ctx):
        guess, mask = guessed(weak, outputs, output, batch), mask_of(weak.part(batch))
        logits = logits_of(hard, outputs, output, batch)
        keep = (guess.sure > threshold).astype(logits.dtype)
        value = ctx.mean(_divergence(guess.logits / temperature, logits) * keep, mask)
        return value.value, state, {"uda": value, "uda/kept": ctx.mean(keep, mask)}

    def check(outputs, batch):
        check_logits(weak, outputs, output)

    return Objective("uda", (weak.forward, hard.forward), loss, check=check, pooled=True)


def _divergence(given: jax.Array, logits: jax.Array) -> jax.Array:
    """Computes KL(softmax(given) ‖ softmax(logits)) [B]."""
    logs = jax.nn.log_softmax(given)
    return jnp.sum(jnp.exp(logs) * (logs - jax.nn.log_softmax(logits)), axis=-1)
