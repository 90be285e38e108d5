"""Fishr: the gradients of single examples are to vary alike in all source domains."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.adaptation.generalization.sources import Sources, told
from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_share
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.parts.outputs import pick, shapes_of


def fishr(
    model: Model,
    *,
    domains: Sequence[str],
    decay: float = 0.95,
    tap: str = "features",
    output: str = "logits",
    view: str = "image",
    label: str = "label",
) -> Objective:
    """Builds (1/S) Σ_s ‖v_s − v̄‖² / n, v_s the variance in domain s of the gradients of the model's linear head.

    (Rame et al. 2022, arXiv:2109.02934; see `jt.losses.gradient_variance` and `jt.losses.fishr`.) The variances are
    moving averages, m_s ← γ m_s + (1 − γ) Var_s from m_s = 0 on, which are part of the model state; as in DomainBed
    v_s is m_s / (1 − γ), so that the gradient through this batch's variance doesn't depend on γ. A penalty, to be added
    to the mean of the domains' cross-entropies, from some step on:

        erm = sum(jt.classification(model).on(name) for name in names) / len(names)
        weight = jt.schedules.switch(0.0, 1000.0, at=1500)
        objective = jt.together(erm + weight * jt.adaptation.fishr(model, domains=names))

    Those are the weights released in DomainBed, which also starts Adam afresh at the switch. In evaluation the averages
    stay as they are, and the batch is taken into them for the value alone.

    Args:
      model: what gives `logits` as a linear function of `features`.
      domains: the entries of the batch that hold the domains' batches, two or more.
      decay: γ in [0, 1).
      tap: the output [B, D] that the linear head sees.
      output: the model's output that holds the logits.
      view: the entry of a domain's batch that holds the inputs.
      label: the one that holds the labels.

    Returns:
      An objective with the metric `fishr`.

    Raises:
      InputError: for fewer than two domains, and a decay out of range; at init, for an output, a domain or labels that
        aren't there.
    """
    check_share(decay, "decay")
    if decay == 1:
        raise InputError("decay must be below 1: averages of decay 1 never move")
    sources = Sources.of(model, domains, output=output, view=view, label=label, tap=tap)
    name = f"{model.name}_{tap}_fishr"

    def setup(key, batch):
        shapes = shapes_of(sources.forwards[0], batch)
        features, logits = (pick(f"model {model.name!r}", shapes, one).shape[-1] for one in (tap, output))
        count = len(sources.domains)
        averages = {"kernel": jnp.zeros((count, features, logits)), "bias": jnp.zeros((count, logits))}
        return {}, {name: averages}

    def loss(outputs, params, state, batch, ctx):
        rows = sources.rows(outputs, batch)
        found = [
            losses.gradient_variance(one.features, one.logits, one.labels, mask=one.weights, axis_name=ctx.axis)
            for one in rows
        ]
        now = jax.tree.map(lambda *own: jnp.stack(own), *found)
        moved = jax.tree.map(lambda old, new: decay * old.astype(new.dtype) + (1 - decay) * new, state[name], now)
        value = losses.fishr(jax.tree.map(lambda leaf: leaf / (1 - decay), moved))
        if ctx.train:
            kept = jax.tree.map(lambda old, new: new.astype(old.dtype), state[name], moved)
            state = {**state, name: jax.lax.stop_gradient(kept)}
        return value, state, {"fishr": told(value, rows, ctx)}

    return Objective("fishr", sources.forwards, loss, setup=setup, check=sources.check, per_update=(name,))
