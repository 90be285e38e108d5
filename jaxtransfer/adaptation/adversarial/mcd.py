"""Maximum classifier discrepancy: features on which two classifiers can't help but agree."""

import optax

from jaxtransfer import losses
from jaxtransfer.adaptation.adversarial.rivals import rivals
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.tree import Patterns


def mcd(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    classifier: Model | None = None,
    classifier_optimizer: optax.GradientTransformation | None = None,
    head: Patterns | None = None,
    repeat: int = 4,
    trade_off: float = 1.0,
    balance: float = 0.01,
    tap: str = "features",
    output: str = "logits",
    view: str = "image",
    source: str = "source",
    target: str = "target",
) -> tuple[Objective, optax.GradientTransformation]:
    """Builds maximum classifier discrepancy (Saito et al. 2018, arXiv:1712.02560), three kinds of updates in turn.

    The model is an encoder with a classifier, its head; a second classifier stands on the same features. Each step
      fit: everything lowers the source's cross-entropy of both classifiers,
      apart: the classifiers alone do so while they raise their discrepancy d on the target,
      near: the encoder alone lowers d, `repeat` times,
    with d = mean (1/C) Σ_c |p1_c − p2_c|. Target features far from the source's are where two classifiers that agree on
    the source can differ; the encoder moves them to where they can't. The source's cross-entropy is part of it:

        objective, optimizer = jt.adaptation.mcd(net, optax.adam(1e-3))
        jt.fit(objective, optimizer, jt.data.zipped(source=labelled, target=unlabelled), steps=5000)

    As released, and not in the paper, the first two turns also lower `balance` times −mean_c log(mean_i p_c + 10⁻⁶) of
    either classifier on the target, which keeps classes from dying out. Both domains are one run of the model in every
    turn. Each turn's optimiser has a state of its own, where the released code has one for the encoder and one for the
    classifiers over all turns; its momentum no longer carries the ascent of one turn into the descent of the next.

    Args:
      model: encoder and first classifier; it is the one that is evaluated.
      optimizer: of every turn.
      classifier: the second one, a model of the features with `logits` [B, C]; by default a linear one, under the name
        `<model>_mcd`. Built as the model's own, the two are rivals of one strength.
      classifier_optimizer: of the turn `apart`; `optimizer` by default.
      head: path patterns of the model's own classifier; the last of its stages by default. `tap` is what it sees.
      repeat: how often the encoder moves.
      trade_off: weight of the discrepancy.
      balance: weight of the released term that balances the classes.
      tap: the output that the second classifier sees, flattened.
      output: the output that holds the model's logits.
      view: the entry of a domain's batch that the model sees.
      source: the entry of the batch that holds the source's, with its `label`.
      target: that of the target.

    Returns:
      An objective and an optimiser that belong together, see `jt.alternate`; metrics under `fit/`, `apart/`, `near/`:
      `mcd` (what the turn lowers), `discrepancy`, `accuracy` of the model and `accuracy2` of the second classifier on
      the source.

    Raises:
      InputError: for a weight that is negative or not finite, and one name for both domains; at init, for a batch
        without them, an unknown output, labels out of range and a classifier that gives no logits like the model's.
    """

    def discrepancy(p1, p2, mask, ctx):
        return ctx.mean(losses.classifier_discrepancy(p1, p2), mask)

    return rivals(
        "mcd",
        discrepancy,
        model,
        optimizer,
        classifier=classifier,
        classifier_optimizer=classifier_optimizer,
        head=head,
        repeat=repeat,
        trade_off=trade_off,
        balance=balance,
        tap=tap,
        output=output,
        view=view,
        source=source,
        target=target,
    )
