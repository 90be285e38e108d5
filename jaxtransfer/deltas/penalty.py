"""A penalty on what a delta adds to the weights, whatever its parameters are."""

import math
from typing import Any

import jax.numpy as jnp

from jaxtransfer.deltas.model import BASE, FIXED, merged_params, of_delta
from jaxtransfer.deltas.weight import weights_of
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.objective import Mean, Objective


def l2_sp(model: Model, *, strength: float = 1.0) -> Objective:
    """Builds strength · ½‖W_Δ − W‖² over the parameters that the delta changes: L2-SP in the space of the weights.

    (Li et al. 2018, arXiv:1802.01483.) `jt.l2` on the parameters of a delta is another penalty: of LoRA it shrinks the
    factors, of DoRA it pulls the lengths to 0.

    Args:
      model: as `delta` made it; its term is a part of the objective too.
      strength: the weight.

    Raises:
      InputError: for a model that is no delta, and for a strength that is negative or not finite.
    """
    net = of_delta(model)
    if not 0 <= strength < math.inf:
        raise InputError(f"strength must be finite and not negative; got {strength}")

    def loss(outputs, params, state, batch, ctx):
        read: dict[str, Any] = {kind: ctx.read(net.frozen[kind]) for kind in (BASE, FIXED) if kind in net.frozen}
        base, own = read[BASE], net.whole(params)
        before = weights_of(base)
        after = weights_of(merged_params(net.part, base, own, read.get(FIXED, {})))
        total = jnp.zeros((), jnp.float32)
        for path in net.part.merge(net.part.chosen(before), own, read.get(FIXED, {})):
            total = total + 0.5 * jnp.sum(jnp.square(after[path].value - before[path].value))
        value = strength * total
        return value, state, {"l2_sp": Mean(value, jnp.ones((), value.dtype))}

    return Objective("l2_sp", (), loss, frozen=net.handles)
