"""Batch spectral shrinkage of the features of a model that trains."""

import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward
from jaxtransfer.losses._numerics import check_strength
from jaxtransfer.model import Model
from jaxtransfer.objective import Mean, Objective
from jaxtransfer.parts.outputs import pick
from jaxtransfer.parts.rows import gathered


def bss(
    model: Model, *, k: int = 1, strength: float = 1e-3, output: str = "features", view: str = "image"
) -> Objective:
    """Builds strength · Σ_{i ≤ k} σ_{−i}(F)², the k smallest squared singular values of the batch's features.

    (Chen et al. 2019, NeurIPS; their k and strength are the defaults.) F holds the rows of all devices that the
    batch's mask keeps. It goes beside any other term:

        objective = jt.classification(model) + jt.l2_sp(w0, strength=0.01, exclude="head") + jt.bss(model)

    Args:
      model: what trains.
      k: how many singular values, at most min(B, D).
      strength: η of the paper.
      output: the model's output [B, D] that is F.
      view: the entry of the batch that the model sees.

    Returns:
      An objective with the metric `bss`.

    Raises:
      InputError: for a strength that is negative or not finite, and k below 1; at init, for k above min(B, D) and for
        an output that is no [B, D].
    """
    check_strength(strength)
    if k < 1:
        raise InputError(f"k must be at least 1; got {k}")
    forward = Forward.of(model, view)

    def term(outputs, params, state, batch, ctx):
        rows, mask = gathered({"features": pick(f"model {model.name!r}", outputs[forward], output)}, batch, ctx)
        value = strength * losses.bss(rows["features"], k=k, mask=mask)
        return value, state, {"bss": Mean(value, jnp.any(mask > 0).astype(value.dtype))}

    def check(outputs, batch):
        shape = pick(f"model {model.name!r}", outputs[forward], output).shape
        if len(shape) != 2 or k > min(shape):
            raise InputError(
                f"bss takes an output [batch, dimensions] with {k} singular values or more (k={k}); {output!r} of "
                f"model {model.name!r} has shape {shape}"
            )

    return Objective("bss", (forward,), term, check=check)
