"""Deep mutual learning: students that teach one another while they train."""

from collections.abc import Sequence

import optax

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.objectives.distillation.matching import distillation
from jaxtransfer.objectives.distillation.teachers import peer
from jaxtransfer.objectives.supervised.classification import classification


def mutual_learning(
    students: Sequence[Model], *, temperature: float = 1.0, weight: float | optax.Schedule = 1.0, view: str = "image"
) -> Objective:
    """Builds deep mutual learning, Σ_k [CE_k + weight / (K − 1) Σ_{j≠k} T² KL(p_j ‖ p_k)] (Zhang et al. 2018).

    (arXiv:1706.00384.) All students train at once on the same batch, each run once; a peer's prediction is a target,
    so no gradient passes through it. (The paper updates them one after the other.)

    Args:
      students: two models or more, under different names: `model.named("b")`.
      temperature: T.
      weight: of the peers, a number or a schedule.
      view: the entry of the batch that all of them see.

    Returns:
      An objective over all students, the metrics of each under `<name>/`.

    Raises:
      InputError: for fewer than two models, or two of one name.
    """
    if len(students) < 2 or len({student.name for student in students}) < len(students):
        raise InputError(
            f"mutual learning needs two students or more, of different names; got {[one.name for one in students]}: "
            f"rename with model.named('other')"
        )
    terms = []
    for student in students:
        peers = [peer(one) for one in students if one is not student]
        terms.append(classification(student, view=view).named(student.name))
        term = distillation(student, peers, temperature=temperature, view=view)
        terms.append(weight * term.named(f"{student.name}/mutual"))
    return sum(terms[1:], start=terms[0])
