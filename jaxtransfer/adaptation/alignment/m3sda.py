"""Moment matching for several sources: their moments are drawn to the target's and to each other's."""

from collections.abc import Sequence

from jaxtransfer import losses
from jaxtransfer.adaptation.alignment.distance import distance_term
from jaxtransfer.adaptation.domain import Domain
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective


def m3sda(
    model: Model,
    sources: Sequence[str],
    *,
    moments: int = 2,
    central: bool = False,
    tap: str = "features",
    view: str = "image",
    target: str = "target",
) -> Objective:
    """Builds the moment distance between N sources and a target, M³SDA (Peng et al. 2019, arXiv:1812.01754).

    See `jt.losses.moment_distance`. Each source's labels are learned beside it, in the same run of the model:

        labels = sum(jt.classification(net).on(name) for name in ("a", "b", "c"))
        objective = labels / 3 + 0.01 * jt.adaptation.m3sda(net, ("a", "b", "c"))
        data = jt.data.zipped(a=first, b=second, c=third, target=unlabelled)

    The released weight is 0.0005, for 2,048 features whose distances are large. Batches may differ in size.

    Args:
      model: what gives the features.
      sources: the entries of the batch that hold the sources', one or more.
      moments: K, up to which power they are compared.
      central: whether powers from the second on are those of the distance to the mean.
      tap: the output that is made alike, flattened to [B, D].
      view: the entry of a domain's batch that the model sees.
      target: the entry of the batch that holds the target's.

    Returns:
      An objective with the metric `m3sda`.

    Raises:
      InputError: for no source, a domain that is named twice, and `moments` below 1; at init, for a batch without one
        of them or with a single example, and for an unknown output.
    """
    if isinstance(sources, str) or not sources or moments < 1:
        raise InputError(f"m3sda takes the names of one source or more, and a moment or more; got {sources}, {moments}")

    def distance(rows, masks, axis_name):
        *own, aim = (layers[0] for layers in rows)
        options = {"source_masks": masks[:-1], "target_mask": masks[-1], "axis_name": axis_name}
        return losses.moment_distance(own, aim, moments=moments, central=central, **options)

    return distance_term("m3sda", [Domain.of(model, name, view) for name in (*sources, target)], tap, distance)
