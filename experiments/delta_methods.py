"""Ways to train little of a pretrained network: what each of them trains, from a start that all share.

A method makes of a network and its weights, under the head of a linear probe, a model whose parameters are what trains;
each begins as the probe's function, but for `vpt`, whose prompts are read from the start. The head trains along in all.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxtransfer as jt

GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # of learning rates
MEAN, STD = 0.47, 0.25  # of the side network's inputs


@dataclasses.dataclass(frozen=True)
class Kit:
    """What a method is made of.

    Attributes:
      model: the network, with a head for the new classes.
      variables: its pretrained weights under the probe's head.
      classes: of the head.
      rank: of lora and dora.
      bottleneck: of adapters in a transformer.
      image: one, uint8 [1, H, W, C].
    """

    model: jt.Model
    variables: dict[str, Any]
    classes: int
    rank: int
    bottleneck: int
    image: np.ndarray

    @property
    def transformer(self) -> bool:
        """Whether the network has a class token, so prompts beside it."""
        return "stem_token" in self.variables["params"]

    @property
    def body(self) -> str:
        """Pattern of the layers of all stages but the head."""
        return rf"(?:{'|'.join(self.model.stages[:-1])})/(?:.*/)?(?:kernel|scale|bias)"

    def delta(self, part: jt.deltas.Part, only: str, **further: jt.deltas.Part) -> jt.Model:
        """Returns the model of a part for parameters of the body, and of further ones, beside a head of its own."""
        whole = jt.deltas.chain(body=part.on(only), **further, head=jt.deltas.full().on(self.model.head))
        return jt.deltas.delta(self.model, self.variables, whole)

    @property
    def kernels(self) -> str:
        """Pattern of the kernels that a low-rank part changes: of queries and values, or of all convolutions behind."""
        return "attention/(query|value)/kernel" if self.transformer else "stage.*/.*conv.*/kernel"


class Row(NamedTuple):
    """A method: its model, and the place in `GRID` where the choice of its learning rate begins."""

    make: Callable[[Kit], jt.Model]
    place: int


def _ia3(kit: Kit) -> jt.Model:
    if kit.transformer:
        return kit.delta(jt.deltas.ia3(feedforward="fc2"), "(attention/(key|value)|fc2)/kernel")
    return kit.delta(jt.deltas.ia3(), kit.kernels)


def _lora_norms(kit: Kit) -> jt.Model:
    return kit.delta(jt.deltas.lora(kit.rank), kit.kernels, norms=jt.deltas.norm_tuning().on(kit.body))


def _adapters(kit: Kit) -> jt.Model:
    if kit.transformer:
        return jt.models.houlsby(kit.model, kit.variables, bottleneck=kit.bottleneck, own=kit.model.head)
    own = (kit.model.head, ".*norm.*")
    return jt.models.residual_adapters(kit.model, kit.variables, own=own)


def _vpt(kit: Kit) -> jt.Model:
    return jt.models.visual_prompts(kit.model, kit.variables, deep=True, own=kit.model.head)


def _side(kit: Kit) -> jt.Model:
    side = jt.models.normalize(jt.models.small_cnn(1, width=32 if kit.transformer else 16), MEAN, STD)
    return jt.models.side_tuning(kit.model, kit.variables, side, classes=kit.classes, alpha=None)


METHODS: Mapping[str, Row] = {
    "linear-probe": Row(lambda kit: kit.model, 5),  # trained on features, see `deltas_cifar100.Bench.probe`
    "full": Row(lambda kit: kit.model, 2),
    "bitfit": Row(lambda kit: kit.delta(jt.deltas.bitfit(), kit.body), 4),
    "ssf": Row(lambda kit: kit.delta(jt.deltas.ssf(), kit.body), 4),
    "norm-tuning": Row(lambda kit: kit.delta(jt.deltas.norm_tuning(), kit.body), 4),
    "ia3": Row(_ia3, 4),
    "lora": Row(lambda kit: kit.delta(jt.deltas.lora(kit.rank), kit.kernels), 3),
    "dora": Row(lambda kit: kit.delta(jt.deltas.dora(kit.rank), kit.kernels), 3),
    "lora-norms": Row(_lora_norms, 3),
    "adapters": Row(_adapters, 3),
    "vpt": Row(_vpt, 4),
    "side-tuning": Row(_side, 3),
}


def started(method: str, kit: Kit, seed: int) -> tuple[jt.Model, dict[str, Any]]:
    """Returns the model of a method, and the variables that it begins with.

    Args:
      method: of `METHODS`.
      kit: what it is made of.
      seed: of what is drawn anew.
    """
    model = METHODS[method].make(kit)
    if model is kit.model:
        return model, kit.variables
    variables = dict(jax.jit(model.init)(jax.random.key(seed), kit.image))
    if method == "side-tuning":  # its head is new to the library; here it is the probe's, as for the others
        head = {"dense": kit.variables["params"]["head"]}
        variables["params"] = {**variables["params"], "head": head}
    return model, variables
