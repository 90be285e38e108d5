"""Two classifiers on one encoder that are driven apart on the target, and the encoder that brings them together."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxtransfer import losses, optim
from jaxtransfer.adaptation.adversarial import networks
from jaxtransfer.adaptation.adversarial.domains import Domains, class_means, run_on_both, setup_of
from jaxtransfer.adaptation.adversarial.mdd import check_same_classes
from jaxtransfer.adaptation.domain import whole
from jaxtransfer.losses._numerics import check_strength
from jaxtransfer.model import Model
from jaxtransfer.objective import Context, Mean, Objective, view_of
from jaxtransfer.objectives.supervised.classification import check_labels
from jaxtransfer.parts.together import together
from jaxtransfer.train.turns import Turn, alternate
from jaxtransfer.tree import Patterns, as_patterns

_OFFSET = 1e-6  # under the logarithm, as released
Discrepancy = Callable[[jax.Array, jax.Array, jax.Array | None, Context], Mean]


def rivals(
    method: str,
    discrepancy: Discrepancy,
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    classifier: Model | None,
    classifier_optimizer: optax.GradientTransformation | None,
    head: Patterns | None,
    repeat: int,
    trade_off: float,
    balance: float,
    tap: str,
    output: str,
    view: str,
    source: str,
    target: str,
) -> tuple[Objective, optax.GradientTransformation]:
    """Builds the turns fit, apart and near of `mcd`, with any discrepancy.

    Args:
      method: its name, that of the metric of what a turn lowers, and in the second classifier's.
      discrepancy: of the probabilities [B, C] that both give the target's rows of this device, their mask [B] or None,
        and the context, to that of the rows of all devices.
      model: as for `mcd`, like all that follows.
    """
    check_strength(trade_off, "trade_off")
    check_strength(balance, "balance")
    domains = Domains.of(model, source, target, view)
    own = classifier or networks.classifier_like(domains.named(model.name, method))
    second_optimizer = optimizer if classifier_optimizer is None else classifier_optimizer
    heads = tuple(f"^{re.escape(model.name)}/(?:.*/)?(?:{one})" for one in as_patterns(head or model.head))
    classifiers = (*heads, f"^{re.escape(own.name)}")

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
            gap = discrepancy(p1, p2, masks.target, ctx)
            value = apart * trade_off * gap.value
            right = {}
            for name, logits, p in (("accuracy", first, p1), ("accuracy2", second, p2)):
                right[name] = ctx.mean(losses.top_k(logits.source, labels), masks.source)
                if fitting:
                    error = ctx.mean(losses.cross_entropy(logits.source, labels), masks.source).value
                    value = value + error + balance * _unbalance(p, masks.target, ctx)
            return value, state, {method: whole(value, ctx, *masks), "discrepancy": gap, **right}

        return together(Objective(method, domains.forwards, loss, setup=setup, check=check, models=(own,)))

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
    return -jnp.mean(jnp.log(class_means(probabilities, mask, ctx) + _OFFSET))
