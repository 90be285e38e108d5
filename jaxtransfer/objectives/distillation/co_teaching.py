"""Co-teaching: two networks that choose for each other what to learn from labels that may be wrong."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from jaxtransfer import losses
from jaxtransfer.context import Context
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective, view_of
from jaxtransfer.objectives.supervised.classification import check_labels
from jaxtransfer.parts.learns import CLASSES, Learns
from jaxtransfer.parts.masking import check_weight, mask_of, weights_of
from jaxtransfer.parts.outputs import pick
from jaxtransfer.parts.rows import kept, ranked


def co_teaching(
    models: Sequence[Model],
    *,
    forget_rate: float | optax.Schedule,
    ramp: int = 0,
    exponent: float = 1.0,
    disagreement: int | None = None,
    output: str = "logits",
    label: str = "label",
    view: str = "image",
) -> Objective:
    """Builds Σ_k (1/|S_j|) Σ_{i∈S_j} CE(y_i, f_k(x_i)), S_j the examples that the other network j finds easiest.

    (Han et al. 2018, arXiv:1804.06872.) For labels of which a share is wrong: networks learn wrong ones last, so the
    examples with a small loss are mostly right, and two networks that choose for each other don't amplify their own
    errors. S_j are the ⌊R(t) n⌋ examples of the smallest loss under f_j among the n of the global batch, at least one,
    with R(t) = 1 − τ · min((t / T_k)^c, 1): at first all of them. Choosing is not differentiated. In evaluation all
    examples count. (The paper counts t in epochs.)

        nets = [jt.models.small_cnn(10, name=name) for name in "ab"]
        objective = jt.co_teaching(nets, forget_rate=0.2, ramp=10 * steps_of_an_epoch)

    With `disagreement` it is co-teaching+ (Yu et al. 2019, arXiv:1901.04215): from that step on the networks choose
    among the examples on which they predict different classes, which keeps them from becoming one; where there is none,
    nothing is learned.

    Args:
      models: two, under different names: `model.named("b")`.
      forget_rate: τ in [0, 1), the share of wrong labels as far as it is known; or 1 − R as a schedule of the step.
      ramp: T_k in steps; 0 forgets from the first on.
      exponent: c > 0, 0.5, 1 or 2 in the paper.
      disagreement: the first step of co-teaching+; None for co-teaching.
      output: the models' output that holds the logits [B, C].
      label: the entry of the batch that holds the labels, integers [B] or probabilities [B, C].
      view: the entry of the batch that both see.

    Returns:
      An objective over both, for each `<name>`, the loss of what was chosen for it, `<name>/accuracy` of all examples
      on their labels as they are, and `<name>/kept`, the share chosen. `mask` and `weight` of the batch count as in
      `classification`; an example of weight 0 is not chosen.

    Raises:
      InputError: for another number of models, or two of one name; for a rate, ramp, exponent or step out of range; at
        init, for an unknown output and for labels that a model has no class for.
    """
    if len(models) != 2 or models[0].name == models[1].name:
        raise InputError(
            f"co-teaching needs two models of different names; got {[one.name for one in models]}: rename with "
            f"model.named('other')"
        )
    forgotten = _forgotten(forget_rate, ramp, exponent)
    if disagreement is not None and disagreement < 0:
        raise InputError(f"disagreement is the step from which co-teaching+ begins, 0 or later; got {disagreement}")
    runs = {model: Forward.of(model, view) for model in models}

    def term(model: Model, other: Model) -> Objective:
        def loss(outputs, params, state, batch, ctx):
            labels, weights = view_of(batch, (label,)), weights_of(batch, besides=(view, label))
            mine, theirs = (kept(pick(one.name, outputs[runs[one]], output), weights) for one in (model, other))
            counted = jnp.ones(len(mine)) if weights is None else weights
            chosen, failed = counted > 0, jnp.zeros((), bool)
            if ctx.train:
                candidates = chosen
                if disagreement is not None:
                    differ = jnp.argmax(mine, -1) != jnp.argmax(theirs, -1)
                    candidates &= differ | (ctx.step < disagreement)
                easy = losses.cross_entropy(jax.lax.stop_gradient(theirs), labels)
                failed = ctx.sum(jnp.isnan(easy) & candidates) > 0  # or it would be left out in silence, as not easy
                chosen = _easiest(easy, candidates, 1 - jnp.asarray(forgotten(ctx.step)), ctx)
            value = ctx.mean(jnp.where(failed, jnp.nan, losses.cross_entropy(mine, labels)), counted * chosen)
            mask = mask_of(batch)
            shown = jax.lax.stop_gradient(kept(pick(model.name, outputs[runs[model]], output), mask))
            metrics = {"co_teaching": value, "accuracy": ctx.mean(losses.top_k(shown, labels), mask)}
            metrics["kept"] = ctx.mean(chosen.astype(jnp.float32), counted > 0)
            return value.value, state, metrics

        def check(outputs, batch):
            found = pick(f"model {model.name!r}", outputs[runs[model]], output)
            check_labels(model.name, found.shape[-1], batch, label)
            check_weight(batch, besides=(view, label))

        forwards, learns = (runs[model], runs[other]), Learns(CLASSES, output, (label,))
        made = Objective("co_teaching", forwards, loss, check=check, peers=(other,), pooled=True, learns=learns)
        return made.named(model.name)

    one, two = models
    return term(one, two) + term(two, one)


def _easiest(values: jax.Array, candidates: jax.Array, share: jax.Array, ctx: Context) -> jax.Array:
    """Returns which of this device's rows are among the given share of the smallest values of all candidates."""
    total = ctx.sum(candidates.astype(values.dtype))
    count = jnp.maximum(jnp.floor(total * (share + 1e-6)), 1)  # 0.7 · 10 is 7, as it is rounded, too
    return candidates & (ranked(jnp.where(candidates, values, jnp.inf), ctx) < count)


def _forgotten(rate: float | optax.Schedule, ramp: int, exponent: float) -> optax.Schedule:
    """Returns 1 − R as a function of the step."""
    if callable(rate):
        if ramp or exponent != 1:
            raise InputError("forget_rate is a schedule already; leave ramp and exponent out")
        return rate
    if not 0 <= rate < 1:
        raise InputError(f"forget_rate must be in [0, 1), the share of examples that are left out; got {rate}")
    if ramp < 0 or not exponent > 0:
        raise InputError(f"ramp must be 0 steps or more, and exponent positive; got {ramp} and {exponent}")
    if not ramp:
        return lambda step: jnp.asarray(rate, jnp.float32)
    return lambda step: rate * jnp.minimum(jnp.asarray(step, jnp.float32) / ramp, 1) ** exponent
