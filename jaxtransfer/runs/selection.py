"""Which evaluation is the best, and when to stop for want of a better one."""

import math
from collections.abc import Callable
from typing import Any


def score_of(monitor: str | None = None, maximize: bool = True) -> Callable[[dict[str, Any]], float | None]:
    """Returns the score of an evaluation record, the larger the better, or None where it holds no evaluation."""

    def score(record: dict[str, Any]) -> float | None:
        if monitor is not None:
            value = record.get(f"eval/{monitor}", math.nan)
            return None if math.isnan(value) else (value if maximize else -value)
        if "eval/accuracy" in record:
            return record["eval/accuracy"]
        return -record["eval/loss"] if "eval/loss" in record else None

    return score


def best(history: list[dict], score) -> dict | None:
    """Returns the record with the best score, the earliest of equals, or None."""
    scored = [record for record in history if score(record) is not None]
    return max(scored, key=score) if scored else None


def exhausted(history: list[dict], score, patience: int | None) -> bool:
    """Returns whether the last `patience` evaluations brought no improvement."""
    if patience is None:  # asked at each step: the history needn't be gone through
        return False
    values = [value for record in history if (value := score(record)) is not None]
    return len(values) > patience and max(values[-patience:]) <= max(values[:-patience])
