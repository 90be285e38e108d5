"""Domain-adversarial training: features by which a discriminator can't tell source from target."""

from jaxtransfer.adaptation.adversarial import networks
from jaxtransfer.adaptation.adversarial.domains import Coefficient, Domains, check_coefficient, setup_of, told_apart
from jaxtransfer.adaptation.domain import whole
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.schedules import warm_start


def dann(
    model: Model,
    *,
    discriminator: Model | None = None,
    coefficient: Coefficient | None = None,
    tap: str = "features",
    view: str = "image",
    source: str = "source",
    target: str = "target",
) -> Objective:
    """Builds domain-adversarial training (Ganin et al. 2016, arXiv:1505.07818): min_D max_f BCE(D(f(x)), domain of x).

    A discriminator learns to tell the domains apart, and behind a gradient reversal the features learn that it can't,
    in one update. The source's labels are learned beside it:

        objective = jt.together(jt.classification(net).on("source") + jt.adaptation.dann(net))
        jt.fit(objective, optax.adam(1e-3), jt.data.zipped(source=labelled, target=unlabelled), steps=5000)

    What decides whether it is stable: batch norm in the discriminator, over the rows of both domains in one run; a
    reversal that begins at 0 and rises (`jt.schedules.warm_start`); a bottleneck of a few hundred features with batch
    norm as the tap, not a wide ReLU map; and `jt.together`, as a model with batch norm that runs on each domain by
    itself aligns means and variances there and not in evaluation. A `dann/accuracy` of ½ says that the discriminator
    is lost, one of 1 that the features don't follow: the reversal is too weak, or it came too late. Several sources
    are several terms: `dann(net, source="a").named("a") + dann(net, source="b").named("b")`.

    Reads `batch[source]` and `batch[target]`, their `mask`s too, no labels. Batches may differ in size; each domain is
    half of the loss. Source is 1, as released.

    Args:
      model: what gives the features.
      discriminator: a model of features whose `logits` [B, 1] are above 0 for the source; by default
        `jt.adaptation.discriminator()`, under the name `<model>_dann`.
      coefficient: λ of the gradient reversal, a number or a schedule; `jt.schedules.warm_start()` by default. It
        weighs what reaches the features; a weight of the term scales the discriminator's own gradient, too.
      tap: the output that is made alike, flattened to [B, D].
      view: the entry of a domain's batch that the model sees.
      source: the entry of the batch that holds the source's.
      target: that of the target.

    Returns:
      An objective with the metrics `dann` and `dann/accuracy`, the discriminator's.

    Raises:
      InputError: for a coefficient that is negative or not finite, and one name for both domains; at init, for a batch
        without them, an unknown output and a discriminator that gives no [B, 1].
    """
    domains = Domains.of(model, source, target, view)
    coefficient = warm_start() if coefficient is None else coefficient
    check_coefficient(coefficient)
    own = discriminator or networks.discriminator(name=domains.named(model.name, "dann"))

    def setup(key, batch):
        return setup_of(own, key, *domains.shapes(batch, tap))

    def loss(outputs, params, state, batch, ctx):
        rows, masks = domains.rows(outputs, tap, batch), domains.masks(batch)
        value, right, state = told_apart(own, rows, coefficient, params, state, ctx, masks=masks)
        told = {"dann": value, "dann/accuracy": right}
        return value, state, {metric: whole(number, ctx, *masks) for metric, number in told.items()}

    def check(outputs, batch):
        domains.check(outputs, tap)

    return Objective("dann", domains.forwards, loss, setup=setup, check=check, models=(own,))
