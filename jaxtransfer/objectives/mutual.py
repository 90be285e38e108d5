"""Distillation without a trained teacher: from the student's own average, and among students."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import ema
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.objectives.classification import classification
from jaxtransfer.objectives.distillation import distillation
from jaxtransfer.objectives.teachers import peer


def _softmax_mse(student: jax.Array, teacher: jax.Array) -> jax.Array:
    return losses.hint(jax.nn.softmax(student), jax.nn.softmax(teacher))


def mean_teacher(
    student: Model,
    *,
    decay: float | Callable[[Any], Any] = 0.999,
    loss: Callable[..., jax.Array] = _softmax_mse,
    view: str = "image",
    teacher_view: str | None = None,
) -> Objective:
    """Builds the consistency of a student with the moving average of its own weights; it needs no labels.

    (Tarvainen and Valpola 2017, arXiv:1703.01780.) As in their code the average runs in training mode with noise and
    batch statistics of its own, and its decay is min(1 − 1/(n + 1), decay) at the n-th update. Use it as
    `classification(student) + ramp * mean_teacher(student)`, with a schedule that rises from zero as `ramp`; with
    unlabelled data as `classification(student).on("source") + ramp * mean_teacher(student).on("target")`.

    Args:
      student: what trains; its average lives in the state as `<student>_ema`, n as `<student>_ema_moves`.
      decay: of the average, in [0, 1], or a schedule of the step.
      loss: `loss(student_logits, teacher_logits)`; by default the mean over the classes of the squared difference of
        the probabilities.
      view: the entry of the batch that the student sees.
      teacher_view: the entry that the average sees; the student's by default.

    Returns:
      An objective with the metrics `mean_teacher` and `mean_teacher/agreement`.

    Raises:
      InputError: for a decay outside of [0, 1].
    """
    average = ema(student, decay, warm_up=True)
    term = distillation(student, average, loss=loss, view=view, teacher_view=teacher_view)
    return term.named("mean_teacher")


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
