"""Batch spectral penalisation, beside an adversary: no direction of the features outweighs the others."""

from jaxtransfer import losses
from jaxtransfer.adaptation.adversarial.domains import Domains
from jaxtransfer.adaptation.domain import whole
from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_strength
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective


def bsp(
    model: Model,
    *,
    k: int = 1,
    strength: float = 2e-4,
    tap: str = "features",
    view: str = "image",
    source: str = "source",
    target: str = "target",
) -> Objective:
    """Builds strength · Σ_{i ≤ k} σᵢ(F_s)² + σᵢ(F_t)² (Chen et al. 2019, ICML): see `jt.losses.bsp`.

    It is added to an adversary, which alone would align the strongest directions at the cost of those that tell the
    classes apart:

        adversary = jt.adaptation.dann(net) + jt.adaptation.bsp(net)
        objective = jt.together(jt.classification(net).on("source") + adversary)

    F holds the rows of all devices that a domain's mask keeps. σ² grows with the number of rows and the scale of the
    features, so a strength that suits a batch of 32 (the default, as released) is a larger one for 128.

    Args:
      model: what trains.
      k: how many singular values of each domain.
      strength: η.
      tap: the output that is F, flattened to [B, D].
      view: the entry of a domain's batch that the model sees.
      source: the entry of the batch that holds the source's.
      target: that of the target.

    Returns:
      An objective with the metric `bsp`.

    Raises:
      InputError: for a strength that is negative or not finite, k below 1, and one name for both domains; at init, for
        a batch without them, k above min(B, D) and an unknown output.
    """
    check_strength(strength)
    if k < 1:
        raise InputError(f"k must be at least 1; got {k}")
    domains = Domains.of(model, source, target, view)

    def loss(outputs, params, state, batch, ctx):
        found = [domain.gathered(outputs, tap, batch, ctx) for domain in (domains.source, domains.target)]
        rows, masks = zip(*found, strict=True)
        flat = [one.reshape(one.shape[0], -1) for one in rows]
        value = strength * losses.bsp(*flat, k=k, source_mask=masks[0], target_mask=masks[1])
        return value, state, {"bsp": whole(value, ctx, *masks)}

    def check(outputs, batch):
        domains.check(outputs, tap)
        for domain in (domains.source, domains.target):
            rows = domain.read(outputs, tap)
            shape = rows.shape[0], rows.size // rows.shape[0]
            if k > min(shape):
                raise InputError(f"bsp takes k={k} singular values, and {tap!r} on {domain.name!r} is {shape}")

    return Objective("bsp", domains.forwards, loss, check=check)
