"""What a run came to, as a file: which step was chosen, where, and what it scores; and what several runs came to."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from jaxtransfer.errors import InputError
from jaxtransfer.runs.files import write_atomically

RESULT, SUMMARY = "result.json", "summary.json"


class Spread(NamedTuple):
    """A mean over runs with its 95 % confidence interval, mean ± half.

    Attributes:
      mean: over the runs.
      half: t · s / √n, t the 97.5 % point of Student's distribution with n − 1 degrees of freedom, s the standard
        deviation (n − 1 in the denominator); NaN for one run, which tells nothing of others.
      values: of each run.
    """

    mean: float
    half: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Returns the interval of values, one per run."""
        if not values:
            raise InputError("an interval is of one run or more; got none")
        count = len(values)
        half = math.nan
        if count > 1:
            half = float(stdtrit(count - 1, 0.975)) * float(np.std(values, ddof=1)) / math.sqrt(count)
        return cls(float(np.mean(values)), half, tuple(map(float, values)))

    def __str__(self):
        return f"{self.mean:.4g}" + ("" if math.isnan(self.half) else f" ± {self.half:.2g}")


def write_result(directory: str | Path, result: Mapping[str, Any]) -> None:
    """Writes `result.json` of a run."""
    write_atomically(Path(directory) / RESULT, json.dumps(result, indent=2) + "\n")


def read_result(directory: str | Path) -> dict[str, Any] | None:
    """Returns what `write_result` wrote; None where nothing was, or it can't be read."""
    try:
        found = json.loads((Path(directory) / RESULT).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def spreads(results: Sequence[Mapping[str, Any]], entry: str = "test") -> dict[str, Spread]:
    """Returns the mean over runs, with its interval, of each metric that all of them have.

    Args:
      results: of the runs, as `read_result` gives them.
      entry: which of their scores: "test", or "chosen by" for those by which the step was chosen.
    """
    scores = [result.get(entry) or {} for result in results]
    names = [name for name in scores[0] if all(name in one for one in scores)] if scores else []
    return {name: Spread.of([one[name] for one in scores]) for name in names}
