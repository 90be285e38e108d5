"""Deep CORAL: the covariances of both domains' features are made alike."""

import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.adaptation.alignment.distance import distance_term
from jaxtransfer.adaptation.domain import Domain
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.parts.outputs import Tap


def deep_coral(
    model: Model,
    *,
    released: bool = False,
    tap: Tap = "features",
    view: str = "image",
    source: str = "source",
    target: str = "target",
) -> Objective:
    """Builds Σ_taps ‖C_s − C_t‖²_F / 4d² of the features' covariances (Sun, Saenko 2016, arXiv:1607.01719).

    See `jt.losses.coral`. The paper takes the logits, `tap="logits"`, and lets the weight make both losses of one size
    at the end of training; covariances of features are small, so that weights of 1 to 1,000 are usual. Used as
    `jt.adaptation.dan`.

    Args:
      model: what gives the features.
      released: whether to take the form of Transfer-Learning-Library and DomainBed, with means.
      tap: the output that is made alike, or several, whose distances are added up; each is flattened to [B, D].
      view: the entry of a domain's batch that the model sees.
      source: the entry of the batch that holds the source's.
      target: that of the target.

    Returns:
      An objective with the metric `deep_coral`.

    Raises:
      InputError: for one name for both domains; at init, for a batch without them or with a single example, and for an
        unknown output.
    """

    def distance(rows, masks, axis_name):
        options = {"source_mask": masks[0], "target_mask": masks[1], "axis_name": axis_name}
        found = [losses.coral(s, t, released=released, **options) for s, t in zip(*rows, strict=True)]
        return jnp.sum(jnp.stack(found))

    return distance_term("deep_coral", [Domain.of(model, name, view) for name in (source, target)], tap, distance)
