"""What an evaluation can measure besides means: sums of any shape, and rows that are looked at together."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtransfer.context import Context
from jaxtransfer.errors import InputError
from jaxtransfer.forward import Forward

Tree = Any
OfBatch = Callable[[Mapping[Forward, Any], Mapping[str, Any], Context], tuple[Tree, Tree]]


@dataclasses.dataclass(frozen=True, eq=False)
class Measure:
    """A measure of predictions for `jt.evaluate(measures=)`; runs of models are shared with the objective's.

    Attributes:
      name: the entry of what `evaluate` returns.
      forwards: the runs of models whose outputs it reads.
      of_batch: `of_batch(outputs, batch, ctx) -> (sums, rows)`, inside of the compiled program: `sums`, a tree of
        arrays of any shapes, add up over the batches; `rows`, a tree of arrays [B, ...], follow each other. Both are
        of all devices' examples: `ctx.gather` brings those together under `pmap`.
      result: `result(sums, rows)` makes of NumPy arrays what `evaluate` returns; it raises `InputError` where nothing
        counted, or what counted is not finite.
    """

    name: str
    forwards: tuple[Forward, ...]
    of_batch: OfBatch
    result: Callable[[Tree, Tree], Any]


def as_measures(measures: Measure | Sequence[Measure]) -> tuple[Measure, ...]:
    """Returns one measure, or several, as a tuple.

    Raises:
      InputError: for what is none, and for two of one name.
    """
    several = (measures,) if isinstance(measures, Measure) else tuple(measures)
    for one in several:
        if not isinstance(one, Measure):
            raise InputError(
                f"measures= takes what jt.measures makes, such as jt.measures.classification(model); got a "
                f"{type(one).__name__}"
            )
    names = [one.name for one in several]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two measures are called {twice[0]!r}; give one another name=")
    return several
