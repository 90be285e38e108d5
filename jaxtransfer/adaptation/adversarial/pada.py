"""Partial adversarial adaptation: source classes that the target lacks are weighed down."""

import jax
import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.adaptation.adversarial import networks
from jaxtransfer.adaptation.adversarial.domains import (
    Coefficient,
    Domains,
    Pair,
    check_coefficient,
    class_means,
    setup_of,
    told_apart,
)
from jaxtransfer.adaptation.domain import whole
from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_share, check_strength, check_temperature
from jaxtransfer.model import Model
from jaxtransfer.objective import Mean, Objective, view_of
from jaxtransfer.objectives.supervised.classification import check_labels
from jaxtransfer.schedules import warm_start


def pada(
    model: Model,
    *,
    discriminator: Model | None = None,
    coefficient: Coefficient | None = None,
    temperature: float = 0.1,
    decay: float = 0.99,
    trade_off: float = 1.0,
    tap: str = "features",
    output: str = "logits",
    view: str = "image",
    source: str = "source",
    target: str = "target",
) -> Objective:
    """Builds partial adversarial adaptation (Cao et al. 2018, arXiv:1808.04205): source labels and a weighted `dann`.

    For a target that has only some of the source's classes, which ones is not known. A class weighs γ_c / max γ, with
    γ the mean over the target of softmax(logits / T): the source's cross-entropy is the weighted mean Σ γ_y L / Σ γ_y,
    and the discriminator weighs source rows by γ_y, target rows by the batch's mean of that. The cross-entropy is part
    of it, as it needs the weights, too:

        objective = jt.together(jt.adaptation.pada(net))

    γ is a running mean over batches in the state, as `<discriminator>_classes`, and begins as equal for all; what a
    step uses is that of the steps before. (The paper and the released code take it over all of the target every 500
    steps: `decay=1` leaves the state alone, for a `jt.Refresh` that does.) No gradient passes through it. For stability
    see `dann`; a small T makes γ follow the most likely class alone, so that what the classifier is unsure of counts
    for its guess.

    Args:
      model: what gives features and logits.
      discriminator: as for `dann`; by default under the name `<model>_pada`.
      coefficient: λ of the gradient reversal, a number or a schedule; `jt.schedules.warm_start()` by default.
      temperature: T.
      decay: of the running mean, the share of the old one.
      trade_off: weight of the adversary.
      tap: the output that is made alike, flattened.
      output: the output that holds the logits.
      view: the entry of a domain's batch that the model sees.
      source: the entry of the batch that holds the source's, with its `label` (integers).
      target: that of the target.

    Returns:
      An objective with the metrics `pada`, `pada/classification`, `pada/adversary`, `pada/accuracy` (the
      discriminator's) and `pada/classes`, Σγ / max γ: how many classes the target seems to have.

    Raises:
      InputError: for numbers out of range and one name for both domains; at init, as for `dann`, and for labels out of
        range.
    """
    check_temperature(temperature)
    check_share(decay, "decay")
    check_strength(trade_off, "trade_off")
    domains = Domains.of(model, source, target, view)
    coefficient = warm_start() if coefficient is None else coefficient
    check_coefficient(coefficient)
    own = discriminator or networks.discriminator(name=domains.named(model.name, "pada"))
    kept = f"{own.name}_classes"

    def setup(key, batch):
        features, logits = domains.shapes(batch, tap, output)
        params, state = setup_of(own, key, features)
        classes = logits.shape[1]
        return params, {**state, kept: {"share": jnp.full(classes, 1 / classes)}}

    def loss(outputs, params, state, batch, ctx):
        masks = domains.masks(batch)
        rows, logits = (domains.rows(outputs, name, batch) for name in (tap, output))
        labels = view_of(domains.source.part(batch), ("label",))
        share = state[kept]["share"]
        weight = share / jnp.max(share)
        ours = losses.class_weights(logits.source, labels, weight)
        theirs = jnp.full(len(logits.target), ctx.mean(ours, masks.source).value)
        errors = ctx.mean(losses.cross_entropy(logits.source, labels, weight=weight), masks.source)
        error = Mean(errors.total, ctx.mean(ours, masks.source).total)
        how = {"masks": masks, "weights": Pair(ours, theirs)}
        adversary, right, state = told_apart(own, rows, coefficient, params, state, ctx, **how)
        if ctx.train:
            state = {**state, kept: {"share": _moved(share, logits.target, masks.target, ctx)}}
        value = error.value + trade_off * adversary
        told = {"pada": value, "pada/adversary": adversary, "pada/accuracy": right}
        metrics = {metric: whole(number, ctx, *masks) for metric, number in told.items()}
        return value, state, {**metrics, "pada/classification": error, "pada/classes": whole(jnp.sum(weight), ctx)}

    def _moved(share, logits, mask, ctx):
        guesses = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature, axis=-1)
        seen = jax.lax.stop_gradient(class_means(guesses, mask, ctx)).astype(share.dtype)
        return jnp.where(jnp.sum(seen) > 0, decay * share + (1 - decay) * seen, share)

    def check(outputs, batch):
        domains.check(outputs, tap, output)
        part, classes = domains.source.part(batch), domains.source.read(outputs, output).shape[-1]
        check_labels(model.name, classes, part)
        if not jnp.issubdtype(jnp.result_type(view_of(part, ("label",))), jnp.integer):
            raise InputError("pada weighs source examples by their class: labels are integers [B]")

    return Objective("pada", domains.forwards, loss, setup=setup, check=check, models=(own,), per_update=(kept,))
