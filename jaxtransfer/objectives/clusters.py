"""Views that predict to which cluster the others belong: SwAV's prototypes and DINO's outputs, with many crops."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import losses
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward, ema
from jaxtransfer.losses._numerics import check_share, check_temperature
from jaxtransfer.masks import mask_of
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch, Context, Objective, named_key
from jaxtransfer.objectives.rows import check_several, gathered, kept, mean_of_all, unit
from jaxtransfer.objectives.views import VIEWS
from jaxtransfer.outputs import pick, shapes_of

Schedule = float | Callable[[Any], Any]


def swav(
    model: Model,
    *,
    prototypes: int = 3000,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    freeze: int = 0,
    views: Sequence[str] = VIEWS,
    crops: Sequence[str] = (),
    tap: str = "projection",
) -> Objective:
    """Builds SwAV: each view predicts to which prototypes the others were assigned: see `jt.losses.swav`.

    (Caron et al. 2020, arXiv:2006.09882.) The assignment balances the global batch.

    Args:
      model: an encoder with a projection.
      prototypes: K, learned vectors of length 1.
      temperature: τ of the predictions.
      epsilon: of the assignment.
      iterations: of the assignment.
      freeze: updates for which the prototypes stay; the paper holds them for the first epoch.
      views: the entries of the batch that are assigned.
      crops: further, smaller views, of one size, which only predict.
      tap: the output that is compared; brought to length 1.

    Returns:
      An objective with the metric `swav`.

    Raises:
      InputError: for a temperature, ε or count that no run can have.
    """
    check_temperature(temperature)
    check_temperature(epsilon, "epsilon")
    for what, count, least in (("prototypes", prototypes, 1), ("iterations", iterations, 1), ("freeze", freeze, 0)):
        if count < least:
            raise InputError(f"swav: {what} must be at least {least}; got {count}")
    forwards, name = _multi_crop(model, views, crops), f"{model.name}_prototypes"

    def setup(key, batch):
        dim = _dimension(forwards[0], tap, batch)
        kernel = jax.random.normal(named_key(key, name), (prototypes, dim))
        return {name: {"vectors": unit(kernel)}}, {}

    def term(outputs, params, state, batch, ctx: Context):
        vectors = params[name]["vectors"]
        if freeze:
            vectors = jnp.where(jnp.asarray(ctx.step) < freeze, jax.lax.stop_gradient(vectors), vectors)
        found = _all_views(forwards, outputs, tap, model)
        check_several(found[0], ctx, "swav")
        rows, mask = gathered({"z": found}, batch, ctx)
        scores = [unit(z) @ unit(vectors).T for z in rows["z"]]
        options = {"temperature": temperature, "epsilon": epsilon, "iterations": iterations}
        value = mean_of_all(losses.swav(scores, codes=len(views), mask=mask, **options), mask)
        return value.value, state, {"swav": value}

    return Objective("swav", forwards, term, setup=setup)


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
    forwards, name = _multi_crop(model, views, crops), f"{model.name}_center"
    slow = Forward.of(ema(model, decay), views)

    def setup(key, batch):
        return {}, {name: {"value": jnp.zeros(_dimension(forwards[0], tap, batch))}}

    def term(outputs, params, state, batch, ctx: Context):
        mask = mask_of(batch)
        student = [kept(rows, mask) for rows in _all_views(forwards, outputs, tap, model)]
        teacher = [kept(rows, mask) for rows in _all_views((slow,), outputs, tap, model)]
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


def _multi_crop(model: Model, views: Sequence[str], crops: Sequence[str]) -> tuple[Forward, ...]:
    """Returns a forward over the large views together and one over the small ones, which have another size."""
    if len(views) + len(crops) < 2:
        raise InputError(f"expected two views or more; got {[*views, *crops]}")
    return (Forward.of(model, views), *((Forward.of(model, crops),) if crops else ()))


def _all_views(forwards: Sequence[Forward], outputs, tap: str, model: Model) -> list[jax.Array]:
    """Returns the tapped output of every view, in order."""
    per_view = [outputs[f] if isinstance(outputs[f], tuple) else (outputs[f],) for f in forwards]
    return [pick(f"model {model.name!r}", one, tap) for found in per_view for one in found]


def _dimension(forward: Forward, tap: str, batch: Batch) -> int:
    return pick(f"model {forward.model.name!r}", shapes_of(forward, batch), tap).shape[-1]
