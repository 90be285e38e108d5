"""Joint adaptation network: the joint distribution of features and predictions is made alike in both domains."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.adaptation.alignment.dan import ALPHAS
from jaxtransfer.adaptation.alignment.distance import distance_term
from jaxtransfer.adaptation.domain import Domain
from jaxtransfer.losses._numerics import check_temperature
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.parts.outputs import Tap


def jan(
    model: Model,
    *,
    alphas: Sequence[float] = ALPHAS,
    sigma: float | None = 0.92,
    linear: bool = False,
    tap: Tap = "features",
    output: str = "logits",
    view: str = "image",
    source: str = "source",
    target: str = "target",
) -> Objective:
    """Builds the discrepancy of (f(x), softmax(logits)) between the domains, JMMD (Long et al. 2017, arXiv:1605.06636).

    See `jt.losses.jmmd`; the kernel is the product of those of the layers. Defaults are those with which
    Transfer-Learning-Library trains it. Used as `jt.adaptation.dan`.

    Args:
      model: what gives the features and the logits.
      alphas: the kernels of the features, widths in units of the mean squared distance of the batch.
      sigma: σ of the one kernel of the probabilities; None for kernels like those of the features.
      linear: whether to take the estimate of linear time, for batches of one size.
      tap: the output, or several, that are made alike together with the probabilities; each is flattened to [B, D].
      output: the logits.
      view: the entry of a domain's batch that the model sees.
      source: the entry of the batch that holds the source's.
      target: that of the target.

    Returns:
      An objective with the metric `jan`; it holds the constant of `jt.losses.mmd`, 1/(n−1) + 1/(m−1).

    Raises:
      InputError: as for `dan`, and for a sigma that isn't positive.
    """
    if sigma is not None:
        check_temperature(sigma, "sigma")
    taps = (tap,) if isinstance(tap, str) else tuple(tap)

    def distance(rows, masks, axis_name):
        layers = [(*features, _probabilities(logits)) for *features, logits in rows]
        return losses.jmmd(
            *layers,
            alphas=(tuple(alphas),) * len(layers[0]),
            sigmas=(*(None for _ in taps), sigma),
            linear=linear,
            source_mask=masks[0],
            target_mask=masks[1],
            axis_name=axis_name,
        )

    domains = [Domain.of(model, name, view) for name in (source, target)]
    return distance_term("jan", domains, (*taps, output), distance)


def _probabilities(logits: jax.Array) -> jax.Array:
    return jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
