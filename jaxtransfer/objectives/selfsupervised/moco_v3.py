"""MoCo v3: predictions of a view are told from the other examples of the batch by a slow network's key of the other."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward, ema
from jaxtransfer.losses._numerics import check_temperature
from jaxtransfer.model import Model
from jaxtransfer.objective import Context, Objective
from jaxtransfer.objectives.selfsupervised.over_views import VIEWS
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.outputs import pick
from jaxtransfer.parts.rows import check_several, kept


def moco_v3(
    model: Model,
    *,
    temperature: float = 0.2,
    decay: float | Callable[[Any], Any] = 0.99,
    views: Sequence[str] = VIEWS,
    prediction: str = "prediction",
    projection: str = "projection",
) -> Objective:
    """Builds ctr(q₁, k₂) + ctr(q₂, k₁), ctr(q, k) = −2τ log exp(qᵢ·kᵢ/τ) / Σ_j exp(qᵢ·kⱼ/τ), the mean over the batch.

    (Chen, Xie and He 2021, arXiv:2104.02057, algorithm 1.) q are the predictions of a view, k the projections that a
    moving average of the network gives of the other one, both of length 1; no gradient flows through k. There is no
    queue: the negatives are the keys of the whole global batch, which is large therefore (4,096 in the paper). The slow
    network runs in training mode, on both views at once as the other does, and lives in the state as `<model>_ema`, in
    float32 at least.

    The paper holds the patch projection of a vision transformer fixed, which keeps its training stable:
    `jt.optim.freeze(optimizer, "stem_.*")`.

    Args:
      model: an encoder with a projection and a prediction of it, `with_heads(encoder, projection=head(4096, 4096, 256,
        last_norm=True), prediction=("projection", head(4096, 256, last_norm=True)))`.
      temperature: τ; the factor 2τ keeps the gradient's size as it changes.
      decay: of the slow network; the paper raises it from 0.99 to 1 along a cosine, which a schedule of the step does.
      views: the entries of the batch, two.
      prediction: the output that is told apart.
      projection: the output of the slow network that it is told apart by.

    Returns:
      An objective with the metric `moco_v3`.

    Raises:
      InputError: for a temperature or decay out of range, and for other than two views; at init, for a batch of one
        example, or an output that does not exist.
    """
    check_temperature(temperature)
    if len(views) != 2:
        raise InputError(f"expected the names of two views; got {list(views)}")
    fast, slow = Forward.of(model, views), Forward.of(ema(model, decay), views)

    def term(outputs, params, state, batch, ctx: Context):
        mask, who = mask_of(batch), f"model {model.name!r}"
        q1, q2 = (kept(pick(who, one, prediction), mask) for one in outputs[fast])
        k1, k2 = (kept(jax.lax.stop_gradient(pick(who, one, projection)), mask) for one in outputs[slow])
        check_several(q1, ctx, "moco_v3")
        options: dict[str, Any] = {"temperature": temperature, "normalize": True, "mask": mask, "axis_name": ctx.axis}
        ways = losses.info_nce(q1, k2, **options) + losses.info_nce(q2, k1, **options)
        value = ctx.mean(2 * temperature * ways, mask)
        return value.value, state, {"moco_v3": value}

    return Objective("moco_v3", (fast, slow), term, apart=0)
