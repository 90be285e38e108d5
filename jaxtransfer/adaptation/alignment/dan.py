"""Deep adaptation network: features of both domains are drawn together by the maximum mean discrepancy."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.adaptation.alignment.distance import distance_term
from jaxtransfer.adaptation.domain import Domain
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.parts.outputs import Tap

ALPHAS = (0.125, 0.25, 0.5, 1.0, 2.0)  # as DAN and JAN are trained in Transfer-Learning-Library


def dan(
    model: Model,
    *,
    alphas: Sequence[float] = ALPHAS,
    linear: bool = False,
    tap: Tap = "features",
    view: str = "image",
    source: str = "source",
    target: str = "target",
) -> Objective:
    """Builds Σ_taps MMD²(f(s), f(t)) with several Gaussian kernels (Long et al. 2015, arXiv:1502.02791).

    See `jt.losses.mmd`. The source's labels are learned beside it, in the same run of the model:

        objective = jt.classification(net).on("source") + jt.adaptation.dan(net)
        jt.fit(objective, optax.adam(1e-3), jt.data.zipped(source=labelled, target=unlabelled), steps=5000)

    Its share grows best as the features do: `jt.schedules.warm_start() * jt.adaptation.dan(net)`. Several sources are
    several terms, `dan(net, source="a").named("a") + dan(net, source="b").named("b")`. Reads `batch[source]` and
    `batch[target]`, their `mask`s too, no labels. Batches may differ in size.

    Args:
      model: what gives the features.
      alphas: the kernels' widths, in units of the mean squared distance of the batch.
      linear: whether to take the estimate of linear time, as that library's script does by default, for batches of
        one size; the other has far less variance.
      tap: the output that is made alike, or several, whose discrepancies are added up; each is flattened to [B, D].
      view: the entry of a domain's batch that the model sees.
      source: the entry of the batch that holds the source's.
      target: that of the target.

    Returns:
      An objective with the metric `dan`; it holds the constant of `jt.losses.mmd`, 1/(n−1) + 1/(m−1) for each tap.

    Raises:
      InputError: for one name for both domains; at init, for a batch without them or with a single example, an unknown
        output, and `linear` with batches of two sizes.
    """

    def distance(rows, masks, axis_name):
        options = {"source_mask": masks[0], "target_mask": masks[1], "axis_name": axis_name}
        found = [losses.mmd(s, t, alphas=alphas, linear=linear, **options) for s, t in zip(*rows, strict=True)]
        return jnp.sum(jnp.stack(found))

    return distance_term("dan", [Domain.of(model, name, view) for name in (source, target)], tap, distance)
