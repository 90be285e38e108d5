"""Self-supervised methods by name: the heads that they need, and the objective over views.

A row is built from the network with its heads and `Settings` into the objective.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

import jaxtransfer as jt
from jaxtransfer import models
from jaxtransfer.cli.registry.row import Row


class Settings(NamedTuple):
    """What an objective may be told, the usual where nothing was asked for; 0 for what it has not.

    Attributes:
      temperature: τ.
      queue: vectors that moco and nnclr remember.
      prototypes: of swav.
      crops: the names of the small views, for swav and dino.
      steps: updates in all, for what changes along the way.
      split_statistics: parts of the batch with statistics of their own, of moco.
    """

    temperature: float
    queue: int
    prototypes: int
    crops: tuple[str, ...]
    steps: int
    split_statistics: int = 1


@dataclasses.dataclass(frozen=True)
class SelfSupervised:
    """What the command knows of a method.

    Attributes:
      projection: sizes of the projection, where none are asked for.
      prediction: from the size of the projection to that of the hidden layer of a prediction, which stands on it; None
        where the method has none.
      last_norm: whether the projection ends in batch norm.
      last_bias: whether it ends in a bias.
      temperature: the usual one; None where the method has none.
      queue: the usual length of its queue, likewise.
      prototypes: the usual number of its clusters, likewise.
      crops: whether it takes small views besides the two.
      split_statistics: in how many parts of the batch batch norm takes its statistics, where that can be told.
    """

    projection: tuple[int, ...] = (512, 128)
    prediction: Callable[[int], int] | None = None
    last_norm: bool = False
    last_bias: bool = True
    temperature: float | None = None
    queue: int | None = None
    prototypes: int | None = None
    crops: bool = False
    split_statistics: int | None = None


def _rising(first: float, steps: int) -> Callable:
    """Returns the decay of a moving average that rises to 1 along a cosine."""
    return lambda step: 1 - (1 - first) * (jnp.cos(math.pi * step / steps) + 1) / 2


def _tempered(objective: Callable[..., jt.Objective], **more) -> Callable[[jt.Model, Settings], jt.Objective]:
    return lambda net, s: objective(net, temperature=s.temperature, **more)


def _predictor(size: int) -> int:
    return 512


_WIDE = (512, 512, 512)
_BATCH, _QUEUE, _PREDICT = "find each other in the batch", "find each other in a queue", "predict each other"
_AGREE, _CLUSTER = "agree, feature by feature", "agree on a cluster"
METHODS: dict[str, Row[SelfSupervised]] = {
    "simclr": Row(_tempered(jt.simclr), _BATCH, SelfSupervised(temperature=0.1), "Chen 2020"),
    "info-nce": Row(
        _tempered(jt.info_nce, learn_temperature=True), _BATCH, SelfSupervised(temperature=0.2), "van den Oord 2018"
    ),
    "dcl": Row(_tempered(jt.decoupled), _BATCH, SelfSupervised(temperature=0.1), "Yeh 2022"),
    "siglip": Row(_tempered(jt.siglip), _BATCH, SelfSupervised(temperature=0.1), "Zhai 2023"),
    "moco-v3": Row(
        lambda net, s: jt.moco_v3(net, temperature=s.temperature, decay=_rising(0.99, s.steps)),
        _BATCH,
        SelfSupervised(projection=(512, 512, 128), prediction=_predictor, last_norm=True, temperature=0.2),
        "Chen, Xie & He 2021",
    ),
    "supcon": Row(_tempered(jt.supcon), "find all of the same label", SelfSupervised(temperature=0.1), "Khosla 2020"),
    "moco": Row(
        lambda net, s: jt.moco(
            net, queue=s.queue, temperature=s.temperature, decay=0.99, split_statistics=s.split_statistics
        ),
        _QUEUE,
        SelfSupervised(temperature=0.2, queue=4096, split_statistics=1),
        "He 2020",
    ),
    "nnclr": Row(
        lambda net, s: jt.nnclr(net, queue=s.queue, temperature=s.temperature),
        _QUEUE,
        SelfSupervised(projection=(512, 512, 128), prediction=_predictor, last_norm=True, temperature=0.1, queue=4096),
        "Dwibedi 2021",
    ),
    "byol": Row(
        lambda net, s: jt.byol(net, decay=_rising(0.99, s.steps)),
        _PREDICT,
        SelfSupervised(prediction=_predictor),
        "Grill 2020",
    ),
    "simsiam": Row(
        lambda net, s: jt.simsiam(net),
        _PREDICT,
        SelfSupervised(projection=_WIDE, prediction=lambda size: max(1, size // 4), last_norm=True),
        "Chen & He 2021",
    ),
    "barlow-twins": Row(
        lambda net, s: jt.barlow_twins(net), _AGREE, SelfSupervised(projection=_WIDE, last_bias=False), "Zbontar 2021"
    ),
    "vicreg": Row(
        lambda net, s: jt.vicreg(net), _AGREE, SelfSupervised(projection=_WIDE, last_bias=False), "Bardes 2022"
    ),
    "swav": Row(
        lambda net, s: jt.swav(net, prototypes=s.prototypes, temperature=s.temperature, crops=s.crops),
        _CLUSTER,
        SelfSupervised(temperature=0.1, prototypes=512, crops=True),
        "Caron 2020",
    ),
    "dino": Row(
        lambda net, s: jt.dino(
            net,
            decay=_rising(0.99, s.steps),
            student_temperature=s.temperature,
            teacher_temperature=s.temperature / 2.5,
            crops=s.crops,
        ),
        _CLUSTER,
        SelfSupervised(projection=(512, 512, 128, 1024), last_bias=False, temperature=0.1, crops=True),
        "Caron 2021",
    ),
}


def with_heads(encoder: jt.Model, name: str, projection: tuple[int, ...]) -> jt.Model:
    """Returns the encoder with the heads of a method, the projection of the given sizes."""
    row = METHODS[name].facts
    heads: dict[str, Any] = {"projection": models.head(*projection, last_norm=row.last_norm, last_bias=row.last_bias)}
    if row.prediction is not None:
        heads["prediction"] = ("projection", models.head(row.prediction(projection[-1]), projection[-1]))
    return models.with_heads(encoder, **heads)
