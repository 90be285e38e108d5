"""Mean teacher: a student agrees with the moving average of its own weights."""

from collections.abc import Callable
from typing import Any

import jax

from jaxtransfer import losses
from jaxtransfer.forward import ema
from jaxtransfer.model import Model
from jaxtransfer.objective import Objective
from jaxtransfer.objectives.distillation.matching import distillation


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
