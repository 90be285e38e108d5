"""Deltas of frozen weights by name. A row is built from its sizes, by option, into how a run notes it."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxtransfer import deltas
from jaxtransfer.cli.registry.row import Row

PROJECTIONS = r"attention/(?:query|value)/kernel"
"""What LoRA's paper changes of a transformer."""


@dataclasses.dataclass(frozen=True)
class DeltaKind:
    """What the command knows of a kind of delta.

    Attributes:
      usual: the sizes that it has, by option, with the usual values.
      inside: whether it is new layers inside of the network; otherwise a difference of its weights.
      only: path patterns of what it changes by default, where the network has such; None for what the part is made
        for, the head left out where it is new.
      leaves: what the parameters are called that it is made for.
      budget: whether its rank falls to a mean of --rank in training.
    """

    usual: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inside: bool = False
    only: str | None = None
    leaves: str = "kernel"
    budget: bool = False


_RANK = {"rank": 8, "alpha": None}
_LOW_RANK = {**_RANK, "dropout": 0.0}


def _part(make: Callable[..., deltas.Part], **always: Any) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A difference of weights: how its part says that it was made."""

    def build(sizes: Mapping[str, Any]) -> dict[str, Any]:
        return dict(deltas.described_part(make(**sizes, **always)) or {})

    return build


def _above(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """AdaLoRA with half as many directions again as are to stay in the mean, as its paper begins."""
    return _part(deltas.ada_lora)({**sizes, "rank": math.ceil(1.5 * sizes["rank"])})


def _layers(kind: str, *, named: Mapping[str, str] | None = None, **always: Any):
    """New layers inside of a transformer, by the name of their constructor."""

    def build(sizes: Mapping[str, Any]) -> dict[str, Any]:
        arguments = {(named or {}).get(name, name): value for name, value in sizes.items() if value is not None}
        return {"kind": kind, "arguments": {**arguments, **always}}

    return build


_ADAPTER = DeltaKind({"bottleneck": 64}, inside=True)
DELTAS: dict[str, Row[DeltaKind]] = {
    "lora": Row(
        _part(deltas.lora), "add a matrix of low rank to each kernel", DeltaKind(_LOW_RANK, only=PROJECTIONS), "Hu 2021"
    ),
    "rslora": Row(
        _part(deltas.lora, rank_stabilized=True),
        "lora, divided by the root of the rank",
        DeltaKind(_LOW_RANK, only=PROJECTIONS),
        "Kalajdzievski 2023",
    ),
    "pissa": Row(
        _part(deltas.lora, start=deltas.pissa),
        "lora from the kernel's largest singular directions",
        DeltaKind(_LOW_RANK, only=PROJECTIONS),
        "Meng 2024",
    ),
    "olora": Row(
        _part(deltas.lora, start=deltas.olora),
        "lora from an orthonormal basis of the kernel",
        DeltaKind(_LOW_RANK, only=PROJECTIONS),
        "Büyükakyüz 2024",
    ),
    "dora": Row(
        _part(deltas.dora),
        "lora of the direction, and a length for each output",
        DeltaKind(_LOW_RANK, only=PROJECTIONS),
        "Liu 2024",
    ),
    "adalora": Row(
        _above,
        "lora of --rank in the mean, more where it matters",
        DeltaKind(_LOW_RANK, only=PROJECTIONS, budget=True),
        "Zhang 2023",
    ),
    "vera": Row(
        _part(deltas.vera),
        "weigh random matrices that all layers share",
        DeltaKind({"rank": 256}, only=PROJECTIONS),
        "Kopiczko 2023",
    ),
    "loha": Row(
        _part(deltas.lo_ha),
        "add the entrywise product of two low ranks",
        DeltaKind(_RANK, only=PROJECTIONS),
        "Hyeon-Woo 2021",
    ),
    "lokr": Row(
        _part(deltas.lo_kr),
        "add a Kronecker product of small matrices",
        DeltaKind(_RANK, only=PROJECTIONS),
        "Yeh 2023",
    ),
    "fourierft": Row(
        _part(deltas.fourier_ft),
        "add what a few entries of a spectrum give",
        DeltaKind({"entries": 1000}, only=PROJECTIONS),
        "Gao 2024",
    ),
    "oft": Row(_part(deltas.oft), "rotate blocks of inputs", DeltaKind({"block": 8}, only=PROJECTIONS), "Qiu 2023"),
    "boft": Row(
        _part(deltas.boft),
        "rotate all inputs by butterflies",
        DeltaKind({"block": 8}, only=PROJECTIONS),
        "Liu 2023",
    ),
    "ia3": Row(
        _part(deltas.ia3), "scale outputs of layers", DeltaKind(only=r"attention/(?:key|value)|fc1"), "Liu 2022"
    ),
    "ssf": Row(
        _part(deltas.ssf), "scale and shift what every layer gives", DeltaKind(leaves="kernel|scale"), "Lian 2022"
    ),
    "bitfit": Row(_part(deltas.bitfit), "move biases alone", DeltaKind(leaves="bias"), "Ben Zaken 2021"),
    "norm-tuning": Row(_part(deltas.norm_tuning), "move norms alone", DeltaKind(leaves="scale|bias"), "Frankle 2021"),
    "full": Row(_part(deltas.full), "move what --only says, whole", DeltaKind(leaves=".*")),
    "houlsby": Row(_layers("houlsby"), "put two adapters into each block", _ADAPTER, "Houlsby 2019"),
    "pfeiffer": Row(_layers("pfeiffer"), "put one adapter into each block", _ADAPTER, "Pfeiffer 2021"),
    "parallel-adapter": Row(_layers("parallel_adapter"), "one beside each perceptron", _ADAPTER, "He 2022"),
    "adaptformer": Row(_layers("adapt_former"), "likewise, scaled by 0.1", _ADAPTER, "Chen 2022"),
    "vpt": Row(_layers("visual_prompts"), "learn tokens", DeltaKind({"prompts": 10}, inside=True), "Jia 2022"),
    "vpt-deep": Row(
        _layers("visual_prompts", deep=True), "learn tokens of each block", DeltaKind({"prompts": 10}, inside=True)
    ),
    "prefix": Row(
        _layers("prefix_tuning", named={"prompts": "prefix"}),
        "learn keys and values of each block",
        DeltaKind({"prompts": 10}, inside=True),
        "Li 2021",
    ),
}


def usual_of(option: str) -> str:
    """Returns what follows the help of a size: the kinds that have it, with the usual value of each."""
    values: dict[Any, list[str]] = {}
    for name, row in DELTAS.items():
        if option in row.facts.usual:
            values.setdefault(row.facts.usual[option], []).append(name)
    told = "; ".join(
        f"{'the rank' if value is None else value} of {', '.join(names)}" for value, names in values.items()
    )
    return f"(default: {told})"
