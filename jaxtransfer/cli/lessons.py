"""Distillation losses by name: what is compared, through which adapter, and the weight that is usual."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import jaxtransfer as jt
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.models import adapters
from jaxtransfer.objectives.distillation.teachers import Teacher

LOGITS, FEATURES, LAST, EACH, TOGETHER = "logits", "features", "the last map", "each map", "all maps together"


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A row of the table.

    Attributes:
      loss: from the temperature to the loss of two outputs; None for an objective of its own.
      taps: which outputs it compares where --taps is left out.
      adapter: makes what brings the outputs to one shape.
      weight: of the lesson, usual for the loss.
      labels: weight of the labels, likewise.
    """

    loss: Callable[[float], Callable[..., jax.Array]] | None
    taps: str = LOGITS
    adapter: Callable[[], jt.Model] | None = None
    weight: float = 1.0
    labels: float = 1.0


def _rkd(student, teacher, mask=None):
    distance = jt.losses.rkd_distance(student, teacher, mask=mask)
    return 25 * distance + 50 * jt.losses.rkd_angle(student, teacher, mask=mask)


def _plain(loss: Callable[..., jax.Array]) -> Callable[[float], Callable[..., jax.Array]]:
    return lambda temperature: loss


def _tempered(loss: Callable[..., jax.Array], **more: Any) -> Callable[[float], Callable[..., jax.Array]]:
    return lambda temperature: functools.partial(loss, temperature=temperature, **more)


_L = jt.losses
LESSONS: dict[str, Lesson] = {  # where a name on the command line becomes code
    "kd": Lesson(_tempered(_L.kd), weight=0.9, labels=0.1),
    "kd-standardized": Lesson(_tempered(_L.kd, standardize=True), weight=9.0, labels=0.1),
    "dkd": Lesson(_tempered(_L.dkd)),
    "dist": Lesson(_tempered(_L.dist, beta=2.0, gamma=2.0)),
    "hint": Lesson(_plain(_L.hint), LAST, adapters.regressor, weight=100.0),
    "attention-transfer": Lesson(_plain(_L.attention_transfer), EACH, weight=1000.0),
    "similarity-preserving": Lesson(_plain(_L.similarity_preserving), LAST, weight=3000.0),
    "correlation-congruence": Lesson(_plain(_L.correlation_congruence), FEATURES, adapters.regressor, weight=0.02),
    "rkd": Lesson(_plain(_rkd), FEATURES),
    "pkt": Lesson(_plain(_L.pkt), FEATURES, weight=30000.0),
    "nst": Lesson(_plain(_L.nst), LAST, weight=50.0),
    "fsp": Lesson(_plain(_L.fsp), TOGETHER, weight=50.0),
    "vid": Lesson(_plain(_L.vid), EACH, adapters.variational),
    "crd": Lesson(None, FEATURES, weight=0.8),
    "review-kd": Lesson(_plain(_L.review_kd), TOGETHER, adapters.review),
}


def lesson(
    name: str, student: jt.Model, teachers: Sequence[Teacher], *, temperature: float, taps: Any, examples: int
) -> jt.Objective:
    """Returns the objective of a row, without its weight.

    Args:
      name: a key of `LESSONS`.
      student: what trains.
      teachers: one or several.
      temperature: of the losses that have one.
      taps: what `taps_of` found.
      examples: in the data set, for a memory.
    """
    row = LESSONS[name]
    if row.loss is None:
        if len(teachers) > 1:
            raise InputError(f"--loss {name} learns from one teacher; got {len(teachers)}")
        (pair,) = taps.items() if len(taps) == 1 else [(None, None)]
        if pair[0] is None:
            raise InputError(f"--loss {name} compares one pair of outputs; got {len(taps)}")
        return jt.crd(student, teachers[0], examples=examples, tap=pair[0], teacher_tap=pair[1])
    adapter = row.adapter() if row.adapter is not None else None
    return jt.distillation(student, teachers, loss=row.loss(temperature), taps=taps, adapter=adapter)


def taps_of(
    name: str,
    asked: Sequence[str],
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    source: str = "the teacher",
) -> dict[Any, Any]:
    """Returns the outputs to compare, from the student's to the teacher's.

    Args:
      name: a key of `LESSONS`.
      asked: --taps, such as `stage2` or `stage2=block4`.
      student: the shapes of the student's outputs.
      teacher: the shapes of the teacher's.
      source: where the teacher's come from, for messages.

    Raises:
      InputError: for an output that does not exist, and where the networks have no maps in common to choose.
    """
    kind = LESSONS[name].taps
    if asked:
        pairs = [(mine, other if eq else mine) for mine, eq, other in (word.partition("=") for word in asked)]
    elif kind in (LOGITS, FEATURES):
        pairs = [(kind, kind)]
    else:
        common = [tap for tap in student if tap in teacher and len(student[tap].shape) == 4]
        common = sorted(common, key=lambda tap: (-int(np.prod(student[tap].shape[1:3])), list(student).index(tap)))
        if not common or (kind == TOGETHER and len(common) < 2):
            raise InputError(
                f"--loss {name} compares maps [B, H, W, C], and the two networks have none of the same name; choose "
                f"with --taps student=teacher. Student: {', '.join(student)}; teacher: {', '.join(teacher)}"
            )
        pairs = [(tap, tap) for tap in (common[-1:] if kind == LAST else common)]
    for mine, other in pairs:
        for tap, whose, known in ((mine, "the student", student), (other, source, teacher)):
            if tap not in known:
                raise unknown(f"output of {whose}", tap, known)
    if len({mine for mine, _ in pairs}) < len(pairs):
        raise InputError(f"--taps names an output of the student twice: {', '.join(asked)}; name each once")
    if kind == TOGETHER:
        return {tuple(mine for mine, _ in pairs): tuple(other for _, other in pairs)}
    return dict(pairs)
