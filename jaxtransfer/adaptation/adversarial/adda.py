"""Adversarial discriminative adaptation: an encoder for the target alone, which the source's fixed one teaches."""

import dataclasses
import re

import jax
import optax

from jaxtransfer import optim
from jaxtransfer.adaptation.adversarial import networks
from jaxtransfer.adaptation.adversarial.domains import Domains, Pair, domain_entropy, run_on_both, setup_of
from jaxtransfer.adaptation.domain import whole
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.train.turns import Turn, alternate


def adda(
    model: Model,
    twin: Model,
    optimizer: optax.GradientTransformation,
    *,
    discriminator: Model | None = None,
    discriminator_optimizer: optax.GradientTransformation | None = None,
    tap: str = "features",
    view: str = "image",
    source: str = "source",
    target: str = "target",
) -> tuple[Objective, optax.GradientTransformation]:
    """Builds adversarial discriminative domain adaptation (Tzeng et al. 2017, arXiv:1702.05464), two updates in turn.

    A model that was trained on the source stays as it is; a twin of it, with an encoder of its own and the same head,
    begins as a copy and learns to give features on the target that a discriminator takes for the model's on the source:
      tell: the discriminator lowers ½ mean_s log(1 + exp(−d)) + ½ mean_t log(1 + exp(d)),
      deceive: the twin's encoder lowers mean_t log(1 + exp(−d)), the labels the other way round.

        trained = jt.fit(jt.classification(net), optax.adam(1e-3), labelled, steps=1000).state
        twin = net.twin("adapted", own="^(?!head).*")  # all but the head
        objective, optimizer = jt.adaptation.adda(net, twin, optax.adam(1e-4))
        params, state = trained.params[net.name], trained.state[net.name]
        params, state = {net.name: params, "adapted": twin.own(params)}, {net.name: state, "adapted": state}
        fitted = jt.fit(objective, optimizer, batches, steps=1000, params=params, state=state)
        jt.evaluate(jt.classification(twin), fitted.state, test)

    The model runs in inference mode, as released (there with a
    gradient reversal in place of turns). Nothing ties the twin to the classes but where it begins, so small rates are
    what keeps it: one some ten times smaller than in training. The discriminator sees both domains in one run.

    Args:
      model: trained on the source; not changed.
      twin: `model.twin(name, own=...)` with the encoder's parameters as its own.
      optimizer: of the encoder.
      discriminator: a model of features with `logits` [B, 1] above 0 for the source; by default
        `jt.adaptation.discriminator()`, under the name `<twin>_adda`.
      discriminator_optimizer: `optimizer` by default.
      tap: the output that is made alike, flattened.
      view: the entry of a domain's batch that is seen.
      source: the entry of the batch that holds the source's.
      target: that of the target.

    Returns:
      An objective and an optimiser that belong together, see `jt.alternate`; metrics `tell/adda`, `tell/accuracy` (the
      discriminator's) and `deceive/adda`.

    Raises:
      InputError: where the second model is no twin of the first, or shares all with it, and for one name for both
        domains; at init, for a batch without them, and an unknown output.
    """
    if twin.shares is None or twin.shares.first is not model or not twin.shares.own:
        raise InputError(
            f"adda adapts a twin of model {model.name!r} with an encoder of its own; got {twin.name!r}: make it by "
            f"model.twin('adapted', own=...), own the patterns of all parameters but the head's"
        )
    fixed = model.inference()  # of the same name and weights, but for the statistics, which stay
    adapted = dataclasses.replace(twin, shares=twin.shares._replace(first=fixed))
    domains = Domains.of(fixed, source, target, view, on_target=adapted)
    own = discriminator or networks.discriminator(name=domains.named(twin.name, "adda"))

    def setup(key, batch):
        return setup_of(own, key, *domains.shapes(batch, tap))

    def check(outputs, batch):
        domains.check(outputs, tap)

    def tell(outputs, params, state, batch, ctx):
        rows = Pair(*jax.lax.stop_gradient(tuple(domains.rows(outputs, tap, batch))))
        logits, state = run_on_both(own, rows, params, state, ctx)
        masks = domains.masks(batch)
        value, right = domain_entropy(own, logits, masks, ctx)
        told = {"adda": value, "accuracy": right}
        return value, state, {metric: whole(number, ctx, *masks) for metric, number in told.items()}

    def deceive(outputs, params, state, batch, ctx):
        logits, state = run_on_both(own, domains.rows(outputs, tap, batch), params, state, ctx)
        value = ctx.mean(jax.nn.softplus(-logits.target[:, 0]), domains.masks(batch).target)
        return value.value, state, {"adda": value}

    terms = [
        Objective("adda", domains.forwards, loss, setup=setup, check=check, models=(own,)) for loss in (tell, deceive)
    ]
    names = {one: f"^{re.escape(one.name)}" for one in (model, twin, own)}

    def alone(optimizer: optax.GradientTransformation, one: Model) -> optax.GradientTransformation:
        """Moves one of the three; batch norm of the other networks sees the batch all the same."""
        others = [pattern for other, pattern in names.items() if other is not one]
        return optim.freeze(optimizer, others, adapt_statistics=True)

    second = optimizer if discriminator_optimizer is None else discriminator_optimizer
    return alternate(
        Turn("tell", terms[0], alone(second, own)),
        Turn("deceive", terms[1], alone(optimizer, twin)),
    )
