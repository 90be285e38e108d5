"""What is in a file of weights or in a run: names, shapes, types and counts."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtransfer.pretrained.facts import Facts
from jaxtransfer.pretrained.source import open_source
from jaxtransfer.runs.load import Run


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A row of an inventory.

    Attributes:
      path: the tensor's name.
      shape: of its values.
      dtype: of its values.
      count: how many values it has.
      bytes: how much memory they take.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Inventory:
    """What weights consist of; printed, it is a table.

    Attributes:
      source: what was read.
      tensors: its tensors, in their order.
      facts: what else is known of it: preprocessing, class names.
      frozen: how many values the network has besides that nobody trained: those of a delta's base.
    """

    source: str
    tensors: tuple[Tensor, ...]
    facts: Facts
    frozen: int = 0

    @property
    def count(self) -> int:
        """How many values all tensors have."""
        return sum(row.count for row in self.tensors)

    @property
    def bytes(self) -> int:
        """How much memory all tensors take."""
        return sum(row.bytes for row in self.tensors)

    @property
    def trained(self) -> int:
        """How many values are parameters that train, of a run."""
        return sum(row.count for row in self.tensors if row.path.startswith("params/"))

    def as_entries(self) -> dict[str, Any]:
        """Returns it as plain data, for JSON."""
        known = self.facts.preprocessing
        return {
            "source": self.source,
            "tensors": [{**dataclasses.asdict(row), "shape": list(row.shape)} for row in self.tensors],
            "total": {"tensors": len(self.tensors), "count": self.count, "bytes": self.bytes},
            "preprocessing": None if known is None else known.as_entries(),
            "class_names": list(self.facts.class_names),
            **({"trained": self.trained, "frozen": self.frozen} if self.frozen else {}),
        }

    def __str__(self):
        rows = [(row.path, "×".join(map(str, row.shape)) or "-", row.dtype, f"{row.count:,}") for row in self.tensors]
        rows = [("path", "shape", "type", "count"), *rows]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        aligned = [
            f"{path:<{widths[0]}}  {shape:>{widths[1]}}  {dtype:<{widths[2]}}  {count:>{widths[3]}}"
            for path, shape, dtype, count in rows
        ]
        types = sorted({row.dtype for row in self.tensors})
        total = f"{len(self.tensors)} tensors, {self.count:,} values, {self.bytes:,} bytes, {', '.join(types)}"
        counts = f"trained: {self.trained:,} values; frozen, in its base: {self.frozen:,}"
        more = [counts] if self.frozen else []
        more += [] if self.facts.preprocessing is None else [f"preprocessing: {self.facts.preprocessing}"]
        if names := self.facts.class_names:
            kind = "labels" if self.facts.labels else "classes"
            more.append(f"{len(names)} {kind}: {', '.join(names[:8])}{', ...' * (len(names) > 8)}")
        return "\n".join([*aligned, total, *more])


def inspect_weights(source: str | Path | Mapping[str, Any] | Run, *, part: str | None = None) -> Inventory:
    """Returns what a file of weights or a run consists of, told by its names; no code of a file is run.

    Names are without what wrappers put before them (`module.`, `_orig_mod.`), and counters of batches are left out, as
    `load_pretrained` reads them.

    Args:
      source: as for `load_pretrained`.
      part: the key of the state dict that is meant, where a checkpoint has several.

    Raises:
      InputError: where the source can't be read.
    """
    found = open_source(source, part, apart=True)
    rows = [
        Tensor(name, tuple(value.shape), np.dtype(value.dtype).name, math.prod(value.shape), value.nbytes)
        for name, value in found.tensors.items()
    ]
    return Inventory(found.name, tuple(rows), found.facts, found.frozen)
