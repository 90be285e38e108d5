"""Ways to balance several tasks, and networks that share between them, by name.

A method is built from `Ingredients` into an objective. What a network is made of is known to `jt.models.NETWORKS`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jaxtransfer as jt
from jaxtransfer.cli.registry.row import Row

BALANCE, UNCERTAINTY = "balance", "uncertainty"
"""What metrics call the weights of the tasks."""


class Ingredients(NamedTuple):
    """What a method is made of.

    Attributes:
      tasks: the objective of each task.
      shared: patterns of the parameters that several tasks share.
      epoch: updates until all examples were seen once.
      cosines: whether the cosines of the tasks' gradients are noted.
    """

    tasks: list[jt.Objective]
    shared: str
    epoch: int
    cosines: bool


@dataclasses.dataclass(frozen=True)
class Balancing:
    """What the command knows of a method.

    Attributes:
      name: what metrics call its weights.
      cosines: whether it can tell the cosines of the tasks' gradients.
    """

    name: str = BALANCE
    cosines: bool = True


def _by(rule: Any) -> Callable[[Ingredients], jt.Objective]:
    return lambda make: jt.balance(make.tasks, rule, shared=make.shared, name=BALANCE, cosines=make.cosines)


def _dwa(make: Ingredients) -> jt.Objective:
    """DWA: a window is an epoch, as in the paper."""
    return _by(functools.partial(jt.multitask.dwa, every=make.epoch))(make)


_SURGERY = "take from a gradient what goes against another task's"
_SHORTEST = "go where all tasks gain"
_LOSSES = "weigh the losses by how they fall"
_ALIKE = "make the tasks' gradients count alike"
METHODS: dict[str, Row[Balancing]] = {
    "equal": Row(_by(jt.multitask.equal), "add the losses up", Balancing()),
    "random": Row(
        _by(jt.multitask.random_weights), "weigh the losses at random, as a baseline", Balancing(), "Lin 2022"
    ),
    "uncertainty": Row(
        lambda make: jt.multitask.uncertainty(make.tasks, name=UNCERTAINTY),
        "learn a weight for each loss",
        Balancing(UNCERTAINTY, cosines=False),
        "Kendall 2018",
    ),
    "dwa": Row(_dwa, _LOSSES, Balancing(), "Liu 2019"),
    "famo": Row(_by(jt.multitask.famo), _LOSSES, Balancing(), "Liu 2023"),
    "stch": Row(_by(jt.multitask.stch), "let the worst task count most", Balancing(), "Lin 2024"),
    "geometric": Row(_by(jt.multitask.geometric), "lower the losses' geometric mean", Balancing(), "Chennupati 2019"),
    "pcgrad": Row(_by(jt.multitask.pcgrad), _SURGERY, Balancing(), "Yu 2020"),
    "gradvac": Row(_by(jt.multitask.gradvac), _SURGERY, Balancing(), "Wang 2021"),
    "graddrop": Row(
        _by(jt.multitask.graddrop), "keep one sign of each entry of the gradient", Balancing(), "Chen 2020"
    ),
    "mgda": Row(_by(jt.multitask.mgda), _SHORTEST, Balancing(), "Sener 2018"),
    "cagrad": Row(_by(jt.multitask.cagrad), _SHORTEST, Balancing(), "Liu 2021a"),
    "up-grad": Row(_by(jt.multitask.up_grad), _SHORTEST, Balancing(), "Quinton 2024"),
    "con-fig": Row(_by(jt.multitask.con_fig), _SHORTEST, Balancing(), "Liu 2024"),
    "nash-mtl": Row(_by(jt.multitask.nash_mtl), "let the tasks bargain", Balancing(), "Navon 2022"),
    "fair-grad": Row(_by(jt.multitask.fair_grad), "let the tasks bargain", Balancing(), "Ban 2024"),
    "imtl": Row(_by(jt.multitask.imtl), _ALIKE, Balancing(), "Liu 2021b"),
    "gradnorm": Row(_by(jt.multitask.gradnorm), _ALIKE, Balancing(), "Chen 2018"),
    "aligned-mtl": Row(_by(jt.multitask.aligned_mtl), _ALIKE, Balancing(), "Senushkin 2023"),
    "db-mtl": Row(_by(jt.multitask.db_mtl), _ALIKE, Balancing(), "Lin 2023"),
}

ARCHITECTURES: dict[str, Row[Any]] = {
    name: Row(jt.models.NETWORKS[name].build, does, jt.models.NETWORKS[name], paper)
    for name, does, paper in (
        ("shared-bottom", "one encoder, a head for each task", ""),
        ("mmoe", "--experts encoders, mixed for each task by a gate", "Ma 2018"),
        ("cgc", "likewise, and one of its own for each task", "Tang 2020"),
        ("ple", "two levels of these", "Tang 2020"),
        ("cross-stitch", "an encoder for each task, mixed after each stage", "Misra 2016"),
        ("attention", "one encoder, whose maps each task masks for itself", "Liu 2019"),
    )
}
