"""DELTA: the feature maps of a model that trains are held where those of the pretrained network are."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward, FrozenModel
from jaxtransfer.losses._numerics import check_strength
from jaxtransfer.model import Model
from jaxtransfer.objective import Mean, Objective
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.outputs import pick
from jaxtransfer.parts.rows import kept


def delta(
    model: Model,
    source: FrozenModel,
    *,
    taps: str | Sequence[str],
    strength: float = 0.01,
    weights: Mapping[str, Any] | None = None,
    view: str = "image",
) -> Objective:
    """Builds strength · (1/n) Σᵢ Σ_l ½ Σ_c C w_c mean_p (m_pc − s_pc)², behavioural regularisation of the maps l.

    (Li et al. 2019, arXiv:1901.09229: DELTA; without `weights` its plain form.) m are the maps of the model that
    trains, s those of the pretrained network, which runs frozen and in inference mode on the same inputs. The paper
    also decays the new head: add `jt.l2(only="head")`.

        before = jt.frozen(model.named("source"), pretrained.variables)
        objective = jt.classification(model) + jt.delta(model, before, taps=("stage2", "stage3"))

    Args:
      model: what trains.
      source: the pretrained network, `jt.frozen(model, variables)`; another head than the model's does no harm.
      taps: names of the outputs that are compared, maps [B, H, W, C] or features [B, C].
      strength: α of the paper.
      weights: w by tap, [C] each, of sum 1: attention as `jt.filter_weights` estimates it; a tap that isn't there has
        w = 1/C.
      view: the entry of the batch that both see.

    Returns:
      An objective with the metric `delta`.

    Raises:
      InputError: for a strength that is negative or not finite, no tap, weights that are negative, not finite or of a
        tap that isn't compared; at init, for an output that does not exist and for maps of another shape.
    """
    check_strength(strength)
    names = (taps,) if isinstance(taps, str) else tuple(taps)
    if not names:
        raise InputError("delta compares one output or more, got none: taps=('stage3',)")
    known = _checked(weights or {}, names)
    own, before = Forward.of(model, view), Forward.of(source, view)
    if before.trained:
        raise InputError(f"the source is frozen: jt.frozen(model.named('source'), variables); got {source!r:.60}")

    def pairs(outputs):
        told = (f"model {model.name!r}", f"source {before.model.name!r}")
        return {tap: (pick(told[0], outputs[own], tap), pick(told[1], outputs[before], tap)) for tap in names}

    def term(outputs, params, state, batch, ctx):
        mask = mask_of(batch)
        values = jnp.zeros(())
        for tap, maps in pairs(outputs).items():
            here, there = (kept(one, mask) for one in maps)
            values = values + losses.delta(here, there, weight=jnp.asarray(known[tap]) if tap in known else None)
        mean = ctx.mean(strength * values, mask)
        return mean.value, state, {"delta": Mean(mean.total, mean.count)}

    def check(outputs, batch):
        for tap, (here, there) in pairs(outputs).items():
            if here.shape != there.shape:
                raise InputError(
                    f"delta compares maps of one shape; {tap!r} of model {model.name!r} has {here.shape}, of source "
                    f"{before.model.name!r} {there.shape}"
                )
            if tap in known and known[tap].shape != here.shape[-1:]:
                raise InputError(f"weights[{tap!r}] must be [{here.shape[-1]}], one a channel; got {known[tap].shape}")

    return Objective("delta", (own, before), term, check=check, pooled=False)


def _checked(weights: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    if extra := sorted(set(weights) - set(names)):
        raise InputError(f"weights are of the taps {', '.join(names)}; got one of {extra[0]!r}")
    known = {}
    for tap, weight in weights.items():
        known[tap] = np.asarray(weight, np.float32)
        if known[tap].ndim != 1 or not np.all(np.isfinite(known[tap]) & (known[tap] >= 0)):
            raise InputError(f"weights[{tap!r}] must be finite and not negative, one number a channel; got {weight!r}")
    return known
