"""Adaptive feature norm: features of both domains grow in length, step by step."""

import jax

from jaxtransfer import losses
from jaxtransfer.adaptation.domain import Domain, whole
from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_strength, norm, wide
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.rows import kept


def afn(
    model: Model,
    *,
    delta: float = 1.0,
    tap: str = "features",
    view: str = "image",
    source: str = "source",
    target: str = "target",
) -> Objective:
    """Builds Σ_domains (1/n) Σᵢ (‖f(xᵢ)‖ − sg[‖f(xᵢ)‖] − Δ)², stepwise adaptive feature norm (Xu et al. 2019).

    See `jt.losses.afn` (arXiv:1811.07456): target features are too short to be told apart, and are lengthened together
    with the source's. The source's labels are learned beside it; the released weight is 0.05, with Δ = 0.3 for MNIST →
    USPS, 0.1 for USPS → MNIST and 1 else, and the entropy of the target's predictions with weight 0.03 for digits:

        objective = jt.classification(net).on("source") + 0.05 * jt.adaptation.afn(net, delta=0.3)

    Its value is 2Δ² throughout; what it does shows in the lengths, `afn/source_norm` and `afn/target_norm`. Reads
    `batch[source]` and `batch[target]`, their `mask`s too, no labels. Batches may differ in size.

    Args:
      model: what gives the features.
      delta: Δ, by how much they grow.
      tap: the output that grows, flattened to [B, D].
      view: the entry of a domain's batch that the model sees.
      source: the entry of the batch that holds the source's.
      target: that of the target.

    Returns:
      An objective with the metrics `afn`, `afn/source_norm` and `afn/target_norm`.

    Raises:
      InputError: for a Δ that is negative or not finite, and one name for both domains; at init, for a batch without
        them and an unknown output.
    """
    check_strength(delta, "delta")
    if source == target:
        raise InputError(f"afn: domains are different entries of the batch; got {source!r} for both")
    domains = {side: Domain.of(model, name, view) for side, name in (("source", source), ("target", target))}

    def loss(outputs, params, state, batch, ctx):
        values, masks, metrics = [], [], {}
        for side, domain in domains.items():
            mask = mask_of(domain.part(batch))
            masks.append(mask)
            rows = kept(domain.read(outputs, tap), mask)
            values.append(ctx.mean(losses.afn(rows, delta=delta), mask).value)
            (flat,) = wide(jax.lax.stop_gradient(rows.reshape(len(rows), -1)))
            metrics[f"afn/{side}_norm"] = ctx.mean(norm(flat)[:, 0], mask)
        value = values[0] + values[1]
        return value, state, {"afn": whole(value, ctx, *masks), **metrics}

    def check(outputs, batch):
        for domain in domains.values():
            domain.part(batch)
            if len(shape := domain.read(outputs, tap).shape) < 2:
                raise InputError(f"afn lengthens features [batch, ...]; output {tap!r} has shape {shape}")

    return Objective("afn", tuple(domain.forward for domain in domains.values()), loss, check=check)
