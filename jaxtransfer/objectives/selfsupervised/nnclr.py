"""NNCLR: the positive is the nearest of earlier examples."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.forward import Forward
from jaxtransfer.losses._numerics import check_temperature
from jaxtransfer.model import Model
from jaxtransfer.objective import Context, Objective
from jaxtransfer.objectives.selfsupervised.over_views import VIEWS
from jaxtransfer.objectives.selfsupervised.queue import enqueued, ids_of, queue_of
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.outputs import pick
from jaxtransfer.parts.rows import check_several, kept, unit


def nnclr(
    model: Model,
    *,
    queue: int = 16384,
    temperature: float = 0.1,
    views: Sequence[str] = VIEWS,
    prediction: str = "prediction",
    projection: str = "projection",
) -> Objective:
    """Builds NNCLR: the nearest earlier projection of one view against the predictions of the other view.

    (Dwibedi et al. 2021, arXiv:2104.14548): −log exp(nn(z₁)·p₂/τ) / Σ_k exp(nn(z₁)·p₂ₖ/τ), the mean over the two ways,
    nn in a queue that lives in the state as `<model>_queue` and takes in the projections of the first view.

    Args:
      model: an encoder with a projection and a prediction of it.
      queue: projections that are kept; not fewer than a batch has, and with a batch not more than there are examples.
        Where the batch holds each example's number as `index`, an example is not its own neighbour.
      temperature: τ.
      views: the entries of the batch.
      prediction: the output that is compared with a neighbour.
      projection: the output whose neighbour is looked up; both are brought to length 1.

    Returns:
      An objective with the metric `nnclr`.

    Raises:
      InputError: for a temperature that isn't positive; at init, for a batch of one or larger than the queue.
    """
    check_temperature(temperature)
    run, name = Forward.of(model, views), f"{model.name}_queue"

    def term(outputs, params, state, batch, ctx: Context):
        taps = {"p": prediction, "z": projection}
        found = {f"{k}{n}": pick(f"model {model.name!r}", one, tap) for k, tap in taps.items()
                 for n, one in enumerate(outputs[run], 1)}  # fmt: skip
        mask, support, ids = mask_of(batch), state[name]["keys"], ids_of(state[name], batch, ctx)
        rows = {name: kept(entry, mask) for name, entry in found.items()}
        check_several(rows["p1"], ctx, "nnclr")
        options: dict[str, Any] = {"temperature": temperature, "normalize": True, "mask": mask, "axis_name": ctx.axis}
        ways = []
        for z, p in (("z1", "p2"), ("z2", "p1")):
            scores = unit(jax.lax.stop_gradient(rows[z])) @ support.T
            if ids is not None:
                scores = jnp.where(ids[0][:, None] == ids[1][None], -jnp.inf, scores)
            ways.append(losses.info_nce(support[jnp.argmax(scores, axis=1)], rows[p], **options))
        value = ctx.mean((ways[0] + ways[1]) / 2, mask)
        if ctx.train:
            state = {**state, name: enqueued(state[name], rows["z1"], batch, ctx)}
        return value.value, state, {"nnclr": value}

    return Objective(
        "nnclr", (run,), term, setup=queue_of(run, projection, name, queue), per_update=(name,), apart=queue
    )
