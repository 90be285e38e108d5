"""Self-supervised methods by name: the heads that they need, and the objective over views."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

import jaxtransfer as jt
from jaxtransfer import models


class Settings(NamedTuple):
    """What an objective may be told, the usual where nothing was asked for; 0 for what it has not.

    Attributes:
      temperature: τ.
      queue: vectors that moco and nnclr remember.
      prototypes: of swav.
      crops: the names of the small views, for swav and dino.
      steps: updates in all, for what changes along the way.
    """

    temperature: float
    queue: int
    prototypes: int
    crops: tuple[str, ...]
    steps: int


@dataclasses.dataclass(frozen=True)
class Pretext:
    """A row of the table.

    Attributes:
      build: from the model with its heads and the settings to the objective.
      projection: sizes of the projection, where none are asked for.
      prediction: whether a prediction of the projection stands on it.
      last_norm: whether the projection ends in batch norm.
      last_bias: whether it ends in a bias.
      temperature: the usual one; None where the method has none.
      queue: the usual length of its queue, likewise.
      prototypes: the usual number of its clusters, likewise.
      crops: whether it takes small views besides the two.
    """

    build: Callable[[jt.Model, Settings], jt.Objective]
    projection: tuple[int, ...] = (512, 128)
    prediction: bool = False
    last_norm: bool = False
    last_bias: bool = True
    temperature: float | None = None
    queue: int | None = None
    prototypes: int | None = None
    crops: bool = False


def _rising(first: float, steps: int) -> Callable:
    """Returns the decay of a moving average that rises to 1 along a cosine."""
    return lambda step: 1 - (1 - first) * (jnp.cos(math.pi * step / steps) + 1) / 2


def _tempered(objective: Callable[..., jt.Objective], **more) -> Callable[[jt.Model, Settings], jt.Objective]:
    return lambda net, s: objective(net, temperature=s.temperature, **more)


_WIDE = (512, 512, 512)
PRETEXTS: dict[str, Pretext] = {  # where a name on the command line becomes code
    "simclr": Pretext(_tempered(jt.simclr), temperature=0.1),
    "info-nce": Pretext(_tempered(jt.info_nce, learn_temperature=True), temperature=0.2),
    "dcl": Pretext(_tempered(jt.decoupled), temperature=0.1),
    "siglip": Pretext(_tempered(jt.siglip), temperature=0.1),
    "supcon": Pretext(_tempered(jt.supcon), temperature=0.1),
    "moco": Pretext(
        lambda net, s: jt.moco(net, queue=s.queue, temperature=s.temperature, decay=0.99), temperature=0.2, queue=4096
    ),
    "nnclr": Pretext(
        lambda net, s: jt.nnclr(net, queue=s.queue, temperature=s.temperature),
        projection=(512, 512, 128),
        prediction=True,
        last_norm=True,
        temperature=0.1,
        queue=4096,
    ),
    "byol": Pretext(lambda net, s: jt.byol(net, decay=_rising(0.99, s.steps)), prediction=True),
    "simsiam": Pretext(lambda net, s: jt.simsiam(net), projection=_WIDE, prediction=True, last_norm=True),
    "barlow-twins": Pretext(lambda net, s: jt.barlow_twins(net), projection=_WIDE, last_bias=False),
    "vicreg": Pretext(lambda net, s: jt.vicreg(net), projection=_WIDE, last_bias=False),
    "swav": Pretext(
        lambda net, s: jt.swav(net, prototypes=s.prototypes, temperature=s.temperature, crops=s.crops),
        temperature=0.1,
        prototypes=512,
        crops=True,
    ),
    "dino": Pretext(
        lambda net, s: jt.dino(
            net,
            decay=_rising(0.99, s.steps),
            student_temperature=s.temperature,
            teacher_temperature=s.temperature / 2.5,
            crops=s.crops,
        ),
        projection=(512, 512, 128, 1024),
        last_bias=False,
        temperature=0.1,
        crops=True,
    ),
}  # fmt: skip


def with_heads(encoder: jt.Model, name: str, projection: tuple[int, ...]) -> jt.Model:
    """Returns the encoder with the heads of a method, the projection of the given sizes."""
    row = PRETEXTS[name]
    heads: dict[str, Any] = {"projection": models.head(*projection, last_norm=row.last_norm, last_bias=row.last_bias)}
    if row.prediction:
        size = projection[-1]
        heads["prediction"] = ("projection", models.head(max(1, size // 4) if name == "simsiam" else 512, size))
    return models.with_heads(encoder, **heads)
