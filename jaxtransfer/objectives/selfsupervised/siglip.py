"""SigLIP: every pair by itself, matching or not."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_temperature
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.objectives.selfsupervised.over_views import VIEWS, over_views


def siglip(
    phi: Model,
    psi: Model | None = None,
    *,
    temperature: float = 0.1,
    bias: float = -10.0,
    views: Sequence[str] = VIEWS,
    tap: str = "projection",
) -> Objective:
    """Builds the sigmoid loss of pairs (Zhai et al. 2023, arXiv:2303.15343), temperature and bias learned.

    Args:
      phi: the tower of the first view.
      psi: that of the second; the same by default.
      temperature: the first value of τ.
      bias: the first value of b.
      views: the entries of the batch.
      tap: the output that is compared; brought to length 1.

    Returns:
      An objective with the metric `siglip`.

    Raises:
      InputError: for a temperature that isn't positive.
    """
    check_temperature(temperature)
    if not np.isfinite(bias):
        raise InputError(f"bias must be finite; got {bias}")
    scale, first = f"{phi.name}_siglip", {"log_scale": np.float32(-np.log(temperature)), "bias": np.float32(bias)}

    def at(learned) -> Objective:
        def loss(z1, z2, mask=None, axis_name=None):
            options = {"temperature": jnp.exp(-learned["log_scale"]), "bias": learned["bias"]}
            return losses.siglip(z1, z2, normalize=True, mask=mask, axis_name=axis_name, **options)

        return over_views("siglip", phi, loss, other=psi, views=views, tap=tap, apart=0, alone=False)

    def term(outputs, params, state, batch, ctx):
        return at(params[scale]).loss(outputs, params, state, batch, ctx)

    def setup(key, batch):
        return {scale: jax.tree.map(jnp.asarray, first)}, {}

    return dataclasses.replace(at(first), loss=term, setup=setup)
