"""What became of each tensor of the weights, and of each leaf of the model."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxtransfer import tree


class WeightsReport(NamedTuple):
    """Every tensor of the source is in `taken` or in `left`, every leaf of the model in `taken` or in `fresh`.

    Attributes:
      source: what was read.
      scheme: whose names it has.
      taken: for each leaf that was filled, its path, the name of the tensor that it is from.
      adapted: for those of them that had to change, what changed: positions interpolated, a stem for other channels,
        a head mapped by class name.
      fresh: leaves that stay as initialised, and why.
      left: tensors of the source that have no place, and why.
      notes: what else is worth knowing: whose preprocessing is assumed, say.
    """

    source: str
    scheme: str
    taken: Mapping[str, str]
    adapted: Mapping[str, str]
    fresh: Mapping[str, str]
    left: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def __str__(self):
        tensors = len(set(self.taken.values())) + len(self.left)
        lines = [
            f"{self.source}: {self.scheme}; {len(self.taken)} leaves from {tensors} tensors, {len(self.adapted)} "
            f"adapted, {len(self.fresh)} fresh, {len(self.left)} tensors left"
        ]
        for kind in ("adapted", "fresh", "left"):
            by_reason: dict[str, list[str]] = {}
            for name, reason in getattr(self, kind).items():
                by_reason.setdefault(reason, []).append(name)
            lines += [f"  {kind}, {reason}: {tree.listed(names)}" for reason, names in by_reason.items()]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])
