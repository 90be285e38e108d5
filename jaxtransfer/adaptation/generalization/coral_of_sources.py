"""CORAL between sources: means and covariances of the features are alike in all source domains."""

import itertools
from collections.abc import Sequence

from jaxtransfer import losses
from jaxtransfer.adaptation.alignment.distance import distance_term
from jaxtransfer.adaptation.domain import Domain
from jaxtransfer.adaptation.generalization.sources import check_domains
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.parts.outputs import Tap


def coral_of_sources(
    model: Model,
    *,
    domains: Sequence[str],
    released: bool = True,
    tap: Tap = "features",
    view: str = "image",
) -> Objective:
    """Builds the mean over all pairs of source domains of ‖C_a − C_b‖²_F / d² + ‖μ_a − μ_b‖² / d.

    (Sun, Saenko 2016, arXiv:1607.01719, as DomainBed takes it to several sources; see `jt.losses.coral`.) A penalty, to
    be added to the mean of the domains' cross-entropies; it reads no labels:

        erm = sum(jt.classification(model).on(name) for name in names) / len(names)
        objective = jt.together(erm + jt.adaptation.coral_of_sources(model, domains=names))

    A weight of 1 is DomainBed's.

    Args:
      model: what gives the features.
      domains: the entries of the batch that hold the domains' batches, two or more; of any sizes.
      released: false takes ‖C_a − C_b‖²_F / 4d² alone, as `jt.adaptation.deep_coral` does by default.
      tap: the output that is made alike, or several, whose distances are added up; each is flattened to [B, D].
      view: the entry of a domain's batch that holds the inputs.

    Returns:
      An objective with the metric `coral_of_sources`.

    Raises:
      InputError: for fewer than two domains; at init, for an output or a domain that isn't there, and for a domain with
        a single example.
    """
    names = check_domains(domains)
    pairs = list(itertools.combinations(range(len(names)), 2))

    def distance(rows, masks, axis_name):
        values = [
            losses.coral(x, y, released=released, source_mask=masks[a], target_mask=masks[b], axis_name=axis_name)
            for a, b in pairs
            for x, y in zip(rows[a], rows[b], strict=True)
        ]
        return sum(values[1:], start=values[0]) / len(pairs)

    return distance_term("coral_of_sources", [Domain.of(model, name, view) for name in names], tap, distance)
