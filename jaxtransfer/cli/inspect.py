"""`jaxtransfer inspect`: what weights consist of."""

import dataclasses
import json
from typing import Annotated

import tyro

import jaxtransfer as jt


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Show the tensors of a run or of a file of weights: paths, shapes, types, counts.

    Example: jaxtransfer inspect runs/a
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|FILE")]
    """Run directory (its best checkpoint), or a file, folder or name of weights."""
    part: Annotated[str | None, tyro.conf.arg(metavar="KEY", help_behavior_hint="(default: the only one)")] = None
    """Key of the state dict in a checkpoint that has several: teacher, model_ema."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> None:
        """Prints a table or JSON."""
        found = jt.inspect_weights(self.source, part=self.part)
        print(json.dumps(found.as_entries()) if self.json else found)
