"""Large and small crops: forwards over views of two sizes, and their outputs in order."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward
from jaxtransfer.model import Model
from jaxtransfer.objective import Batch
from jaxtransfer.parts.outputs import pick, shapes_of

Schedule = float | Callable[[Any], Any]


def multi_crop(model: Model, views: Sequence[str], crops: Sequence[str]) -> tuple[Forward, ...]:
    """Returns a forward over the large views together and one over the small ones, which have another size."""
    if len(views) + len(crops) < 2:
        raise InputError(f"expected two views or more; got {[*views, *crops]}")
    return (Forward.of(model, views), *((Forward.of(model, crops),) if crops else ()))


def all_views(forwards: Sequence[Forward], outputs, tap: str, model: Model) -> list[jax.Array]:
    """Returns the tapped output of every view, in order."""
    per_view = [outputs[f] if isinstance(outputs[f], tuple) else (outputs[f],) for f in forwards]
    return [pick(f"model {model.name!r}", one, tap) for found in per_view for one in found]


def dimension(forward: Forward, tap: str, batch: Batch) -> int:
    """Returns the length of the tapped output's vectors."""
    return pick(f"model {forward.model.name!r}", shapes_of(forward, batch), tap).shape[-1]
