"""Domain adaptation and generalisation: L(θ) = L_source(θ) + λ L_target(θ), with few target labels, none, or no target.

A family a folder, a method a file. Each objective reads `batch["source"]` and `batch["target"]`, and is added to what
is learned from the source's labels:

    objective = jt.classification(model).on("source") + jt.adaptation.dann(model)
    objective = jt.together(objective)  # one run of the model, batch norm sees both domains
"""

from jaxtransfer.adaptation import (
    adversarial,
    alignment,
    generalization,
    selection,
    self_training,
    source_free,
)
from jaxtransfer.adaptation.adversarial import *  # noqa: F403
from jaxtransfer.adaptation.alignment import *  # noqa: F403
from jaxtransfer.adaptation.generalization import *  # noqa: F403
from jaxtransfer.adaptation.self_training import *  # noqa: F403
from jaxtransfer.adaptation.source_free import *  # noqa: F403

__all__ = [
    "adversarial",
    "alignment",
    "generalization",
    "selection",
    "self_training",
    "source_free",
]
__all__ += [*adversarial.__all__, *alignment.__all__, *generalization.__all__]
__all__ += [*self_training.__all__, *source_free.__all__]  # a method that is new there is a name here
