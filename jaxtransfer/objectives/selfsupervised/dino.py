"""DINO: a student predicts what its slow copy, centred and sharpened, says of other views."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.forward import Forward, ema
from jaxtransfer.losses._numerics import check_share, check_temperature
from jaxtransfer.model import Model
from jaxtransfer.objective import Context, Objective
from jaxtransfer.objectives.selfsupervised.crops import Schedule, all_views, dimension, multi_crop
from jaxtransfer.objectives.selfsupervised.over_views import VIEWS
from jaxtransfer.parts.masking import mask_of
from jaxtransfer.parts.rows import gathered, kept


def dino(
    model: Model,
    *,
    decay: Schedule = 0.996,
    student_temperature: float = 0.1,
    teacher_temperature: Schedule = 0.04,
    center_momentum: float = 0.9,
    views: Sequence[str] = VIEWS,
    crops: Sequence[str] = (),
    tap: str = "projection",
) -> Objective:
    """Builds DINO: a student predicts what its slow copy, centred and sharpened, says of other views.

    (Caron et al. 2021, arXiv:2104.14294.) The slow network and the centre live in the state, as `<model>_ema` and
    `<model>_center`.

    Args:
      model: an encoder with a projection to K outputs.
      decay: of the slow network; the paper raises it to 1 along a cosine.
      student_temperature: of the student.
      teacher_temperature: of the slow network, a number or a schedule of the step.
      center_momentum: of the centre.
      views: the entries of the batch that both see.
      crops: further, smaller views, of one size, which the student alone sees.
      tap: the output that is compared.

    Returns:
      An objective with the metric `dino`.

    Raises:
      InputError: for a temperature, decay or momentum out of range.
    """
    check_temperature(student_temperature, "student_temperature")
    if not callable(teacher_temperature):
        check_temperature(teacher_temperature, "teacher_temperature")
    check_share(center_momentum, "center_momentum")
    forwards, name = multi_crop(model, views, crops), f"{model.name}_center"
    slow = Forward.of(ema(model, decay), views)

    def setup(key, batch):
        return {}, {name: {"value": jnp.zeros(dimension(forwards[0], tap, batch))}}

    def term(outputs, params, state, batch, ctx: Context):
        mask = mask_of(batch)
        student = [kept(rows, mask) for rows in all_views(forwards, outputs, tap, model)]
        teacher = [kept(rows, mask) for rows in all_views((slow,), outputs, tap, model)]
        sharp = teacher_temperature(ctx.step) if callable(teacher_temperature) else teacher_temperature
        temperatures = {"student_temperature": student_temperature, "teacher_temperature": sharp}
        center = state[name]["value"]
        value = ctx.mean(losses.dino(student, teacher, center=center, **temperatures), mask)
        if ctx.train:
            rows, everywhere = gathered({"teacher": teacher}, batch, ctx)
            moved = losses.dino_center(center, rows["teacher"], momentum=center_momentum, mask=everywhere)
            state = {**state, name: {"value": moved}}
        return value.value, state, {"dino": value}

    return Objective("dino", (*forwards, slow), term, setup=setup, per_update=(name,))
