"""Margin disparity discrepancy: an adversarial classifier that departs from the first one on the target alone."""

import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.adaptation.adversarial import networks
from jaxtransfer.adaptation.adversarial.domains import (
    Coefficient,
    Domains,
    Pair,
    at,
    check_coefficient,
    run_on_both,
    setup_of,
)
from jaxtransfer.adaptation.domain import whole
from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_strength
from jaxtransfer.losses.adversarial import disparity_on_source, disparity_on_target, gradient_reversal
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.schedules import warm_start


def mdd(
    model: Model,
    *,
    classifier: Model | None = None,
    margin: float = 4.0,
    coefficient: Coefficient | None = None,
    tap: str = "features",
    output: str = "logits",
    view: str = "image",
    source: str = "source",
    target: str = "target",
) -> Objective:
    """Builds −`jt.losses.mdd`, γ mean_s CE(f'(s), h(s)) − mean_t log(1 − σ(f'(t))_h(t)) (Zhang et al. 2019).

    (arXiv:1904.05801.) h is what the model predicts, f' a second classifier behind a gradient reversal: it agrees with
    the model on the source and departs from it on the target, where the features let it; they learn not to. It goes
    beside the source's labels, from which alone the model's own classifier learns:

        objective = jt.together(jt.classification(net).on("source") + jt.adaptation.mdd(net))

    The margin keeps it stable: a large γ holds the adversary to the source's labels, so that it departs only where
    there is room. So does the small reversal (0.1 at most, as released) that begins at 0, while h is still noise.

    Args:
      model: what gives features and logits.
      classifier: f', a model of the features with `logits` [B, C]; by default a linear one, as on the released digits,
        under the name `<model>_mdd`; `jt.adaptation.classifier(classes, hidden=(1024,))` is the one for photographs.
        Under a classifier of two layers the model's own should have two as well.
      margin: γ.
      coefficient: λ of the gradient reversal, a number or a schedule; `jt.schedules.warm_start(0.1)` by default.
      tap: the output that the second classifier sees, flattened; what the model's own classifier sees.
      output: the output that holds the model's logits.
      view: the entry of a domain's batch that the model sees.
      source: the entry of the batch that holds the source's.
      target: that of the target.

    Returns:
      An objective with the metrics `mdd`, and `mdd/agreement`, the share of the target on which both classifiers agree.

    Raises:
      InputError: for a margin or coefficient that is negative or not finite, and one name for both domains; at init,
        for a batch without them, an unknown output and a classifier that gives no logits like the model's.
    """
    check_strength(margin, "margin")
    domains = Domains.of(model, source, target, view)
    coefficient = warm_start(0.1) if coefficient is None else coefficient
    check_coefficient(coefficient)
    own = classifier or networks.classifier_like(domains.named(model.name, "mdd"))

    def setup(key, batch):
        features, logits = domains.shapes(batch, tap, output)
        return setup_of(own, key, features if classifier else (features, logits))

    def loss(outputs, params, state, batch, ctx):
        masks = domains.masks(batch)
        features, clear = (domains.rows(outputs, name, batch) for name in (tap, output))
        reverse = at(coefficient, ctx)
        hidden = Pair(*(gradient_reversal(rows, reverse) for rows in features))
        adversarial, state = run_on_both(own, hidden, params, state, ctx)
        check_same_classes(own, adversarial, clear)
        near = ctx.mean(disparity_on_source(clear.source, adversarial.source), masks.source)
        far = ctx.mean(disparity_on_target(clear.target, adversarial.target), masks.target)
        agree = losses.top_k(adversarial.target, jnp.argmax(clear.target, axis=-1))
        value = margin * near.value - far.value
        return value, state, {"mdd": whole(value, ctx, *masks), "mdd/agreement": ctx.mean(agree, masks.target)}

    def check(outputs, batch):
        domains.check(outputs, tap, output)

    return Objective("mdd", domains.forwards, loss, setup=setup, check=check, models=(own,))


def check_same_classes(network: Model, logits: Pair, clear: Pair) -> None:
    """Raises where a second classifier tells other classes apart than the model's."""
    if logits.source.shape != clear.source.shape:
        raise InputError(
            f"classifier {network.name!r} must give logits {clear.source.shape[1:]} as the model does; got "
            f"{logits.source.shape[1:]}: build it with as many classes"
        )
