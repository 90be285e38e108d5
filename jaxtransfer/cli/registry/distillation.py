"""Distillation losses by name: what is compared, through which adapter, and the weight that is usual.

A row is built from the temperature into the loss of two outputs, or, where it has a memory of its own, from student,
teacher and outputs into the objective: see `term_of`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import jaxtransfer as jt
from jaxtransfer.cli.registry.row import Row
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.models import adapters
from jaxtransfer.objectives.distillation.teachers import Teacher

LOGITS, FEATURES, LAST, EACH, TOGETHER = "logits", "features", "the last map", "each map", "all maps together"


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What the command knows of a distillation loss.

    Attributes:
      taps: which outputs it compares where --taps is left out.
      adapter: makes what brings the outputs to one shape.
      weight: of the loss, usual for it.
      labels: weight of the labels, likewise.
      temperature: the usual one; None where the loss has none.
      own: whether it is an objective of its own, of one teacher, with a memory of all examples.
    """

    taps: str = LOGITS
    adapter: Callable[[], jt.Model] | None = None
    weight: float = 1.0
    labels: float = 1.0
    temperature: float | None = None
    own: bool = False


def _rkd(student, teacher, mask=None):
    distance = jt.losses.rkd_distance(student, teacher, mask=mask)
    return 25 * distance + 50 * jt.losses.rkd_angle(student, teacher, mask=mask)


def _plain(loss: Callable[..., jax.Array]) -> Callable[[float | None], Callable[..., jax.Array]]:
    return lambda temperature: loss


def _tempered(loss: Callable[..., jax.Array], **more: Any) -> Callable[[float | None], Callable[..., jax.Array]]:
    return lambda temperature: functools.partial(loss, temperature=temperature, **more)


_L = jt.losses
_PROBABILITIES = "the class probabilities"
_MAPS = "the maps, through adapters"
_ATTENTION = "what the maps attend to"
_RELATIONS = "how examples relate"
LOSSES: dict[str, Row[Distillation]] = {
    "kd": Row(_tempered(_L.kd), _PROBABILITIES, Distillation(weight=0.9, labels=0.1, temperature=4.0), "Hinton 2015"),
    "kd-standardized": Row(
        _tempered(_L.kd, standardize=True),
        _PROBABILITIES,
        Distillation(weight=9.0, labels=0.1, temperature=4.0),
        "Sun 2024",
    ),
    "dkd": Row(_tempered(_L.dkd), _PROBABILITIES, Distillation(temperature=4.0), "Zhao 2022"),
    "dist": Row(_tempered(_L.dist, beta=2.0, gamma=2.0), _PROBABILITIES, Distillation(temperature=1.0), "Huang 2022"),
    "hint": Row(_plain(_L.hint), _MAPS, Distillation(LAST, adapters.regressor, weight=100.0), "Romero 2015"),
    "vid": Row(_plain(_L.vid), _MAPS, Distillation(EACH, adapters.variational), "Ahn 2019"),
    "review-kd": Row(_plain(_L.review_kd), _MAPS, Distillation(TOGETHER, adapters.review), "Chen 2021"),
    "attention-transfer": Row(
        _plain(_L.attention_transfer), _ATTENTION, Distillation(EACH, weight=1000.0), "Zagoruyko 2017"
    ),
    "nst": Row(_plain(_L.nst), _ATTENTION, Distillation(LAST, weight=50.0), "Huang 2017"),
    "fsp": Row(_plain(_L.fsp), _ATTENTION, Distillation(TOGETHER, weight=50.0), "Yim 2017"),
    "similarity-preserving": Row(
        _plain(_L.similarity_preserving), _RELATIONS, Distillation(LAST, weight=3000.0), "Tung 2019"
    ),
    "rkd": Row(_plain(_rkd), _RELATIONS, Distillation(FEATURES), "Park 2019"),
    "pkt": Row(_plain(_L.pkt), _RELATIONS, Distillation(FEATURES, weight=30000.0), "Passalis 2018"),
    "correlation-congruence": Row(
        _plain(_L.correlation_congruence),
        _RELATIONS,
        Distillation(FEATURES, adapters.regressor, weight=0.02),
        "Peng 2019",
    ),
    "crd": Row(jt.crd, "each example against all others", Distillation(FEATURES, weight=0.8, own=True), "Tian 2020"),
}


def term_of(
    name: str, student: jt.Model, teachers: Sequence[Teacher], *, temperature: float | None, taps: Any, examples: int
) -> jt.Objective:
    """Returns the objective of a row, without its weight.

    Args:
      name: a key of `LOSSES`.
      student: what trains.
      teachers: one or several.
      temperature: of the losses that have one.
      taps: what `taps_of` found.
      examples: in the data set, for a memory.
    """
    row = LOSSES[name]
    if row.facts.own:
        if len(teachers) > 1:
            raise InputError(f"--loss {name} learns from one teacher; got {len(teachers)}")
        (pair,) = taps.items() if len(taps) == 1 else [(None, None)]
        if pair[0] is None:
            raise InputError(f"--loss {name} compares one pair of outputs; got {len(taps)}")
        return row.build(student, teachers[0], examples=examples, tap=pair[0], teacher_tap=pair[1])
    adapter = row.facts.adapter() if row.facts.adapter is not None else None
    return jt.distillation(student, teachers, loss=row.build(temperature), taps=taps, adapter=adapter)


def taps_of(
    name: str,
    asked: Sequence[str],
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    source: str = "the teacher",
) -> dict[Any, Any]:
    """Returns the outputs to compare, from the student's to the teacher's.

    Args:
      name: a key of `LOSSES`.
      asked: --taps, such as `stage2` or `stage2=block4`.
      student: the shapes of the student's outputs.
      teacher: the shapes of the teacher's.
      source: where the teacher's come from, for messages.

    Raises:
      InputError: for an output that does not exist, and where the networks have no maps in common to choose.
    """
    kind = LOSSES[name].facts.taps
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
