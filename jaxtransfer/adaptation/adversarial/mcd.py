"""Maximum classifier discrepancy: features on which two classifiers can't help but agree."""

import re

import jax
import jax.numpy as jnp
import optax

from jaxtransfer import losses, optim
from jaxtransfer.adaptation.adversarial import networks
from jaxtransfer.adaptation.adversarial.domains import Domains, run_on_both, setup_of, single
from jaxtransfer.adaptation.adversarial.mdd import check_same_classes
from jaxtransfer.losses._numerics import check_strength
from jaxtransfer.model import Model
from jaxtransfer.objective import Context, Objective, view_of
from jaxtransfer.objectives.supervised.classification import check_labels
from jaxtransfer.parts.together import together
from jaxtransfer.train.turns import Turn, alternate
from jaxtransfer.tree import Patterns, as_patterns

_OFFSET = 1e-6  # under the logarithm, as released


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
    check_strength(trade_off, "trade_off")
    check_strength(balance, "balance")
    domains = Domains.of(model, source, target, view)
    own = classifier or networks.classifier_like(domains.named(model.name, "mcd"))
    second_optimizer = optimizer if classifier_optimizer is None else classifier_optimizer
    heads = tuple(f"{re.escape(model.name)}/(?:.*/)?(?:{one})" for one in as_patterns(head or model.head))
    classifiers = (*heads, re.escape(own.name))

    def setup(key, batch):
        features, logits = domains.shapes(batch, tap, output)
        return setup_of(own, key, features if classifier else (features, logits))

    def check(outputs, batch):
        domains.check(outputs, tap, output)
        check_labels(model.name, domains.source.read(outputs, output).shape[-1], domains.source.part(batch))

    def term(apart: int, *, fitting: bool) -> Objective:
        def loss(outputs, params, state, batch, ctx):
            masks = domains.masks(batch)
            features, first = (domains.rows(outputs, name, batch) for name in (tap, output))
            second, state = run_on_both(own, features, params, state, ctx)
            check_same_classes(own, second, first)
            labels = view_of(domains.source.part(batch), ("label",))
            p1, p2 = (_probabilities(logits.target) for logits in (first, second))
            gap = ctx.mean(losses.classifier_discrepancy(p1, p2), masks.target)
            value = apart * trade_off * gap.value
            right = {}
            for name, logits, p in (("accuracy", first, p1), ("accuracy2", second, p2)):
                right[name] = ctx.mean(losses.top_k(logits.source, labels), masks.source)
                if fitting:
                    error = ctx.mean(losses.cross_entropy(logits.source, labels), masks.source).value
                    value = value + error + balance * _unbalance(p, masks.target, ctx)
            return value, state, {"mcd": single(value), "discrepancy": gap, **right}

        return together(Objective("mcd", domains.forwards, loss, setup=setup, check=check, models=(own,)))

    all_in_training = {"adapt_statistics": True}  # batch norm sees the batch in every turn, whoever moves
    return alternate(
        Turn("fit", term(0, fitting=True), optimizer),
        Turn("apart", term(-1, fitting=True), optim.only(second_optimizer, classifiers, **all_in_training)),
        Turn("near", term(1, fitting=False), optim.freeze(optimizer, classifiers, **all_in_training), repeat=repeat),
    )


def _probabilities(logits: jax.Array) -> jax.Array:
    return jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)


def _unbalance(probabilities: jax.Array, mask: jax.Array | None, ctx: Context) -> jax.Array:
    """Returns −mean_c log(mean_i p_ic + 10⁻⁶), over the rows of all devices: least where all classes are as likely."""
    rows = ctx.gather(probabilities)
    weights = jnp.ones(rows.shape[0]) if mask is None else ctx.gather(mask)
    weights = weights.astype(rows.dtype)
    mean = jnp.sum(weights[:, None] * rows, axis=0) / jnp.maximum(jnp.sum(weights), 1)
    return -jnp.mean(jnp.log(mean + _OFFSET))
