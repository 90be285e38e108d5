"""What a training prints: its evaluations as they come, and what it came to."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtransfer.runs.directory import MADE
from jaxtransfer.runs.report import evaluation

_FOR_READERS = ("format", "knows", "heads")  # entries of a configuration that people have no use for


def facts_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rows of a report's first table: the configuration, without what only the reader of a run needs."""
    told = {name: value for name, value in config.items() if name not in _FOR_READERS}
    made = told.pop(MADE, {})
    told |= {name: value for name, value in made.items() if not isinstance(value, dict)}
    return {name: shown(value) for name, value in told.items()}


def shown(value: Any) -> Any:
    """Returns a value as a report shows it: a list by its first entries."""
    if not isinstance(value, list | tuple):
        return value
    more = f", … ({len(value)} in all)" if len(value) > 20 else ""
    return ", ".join(map(str, value[:20])) + more


def print_results(out: Path, fitted: Any, report: Path) -> None:
    """Prints what a training came to: the best evaluation, the time, where the report lies."""
    if not fitted.timing:
        print(f"already done: {out} has its {int(fitted.state.step)} steps")
    if fitted.best:
        best = ", ".join(f"{k} {v:.4g}" for k, v in evaluation(fitted.best).items())
        print(f"best evaluation, at step {fitted.best['step']}: {best}")
    if fitted.timing:
        print(
            f"{fitted.timing['seconds']:.1f} s, {fitted.timing['examples_per_second']:.0f} examples/s, "
            f"{100 * fitted.timing['data_wait_fraction']:.2f} % of the time waiting for data"
        )
    print(f"report: {report}")


def announce(prefix: str, record: Mapping[str, Any]) -> None:
    """Prints an evaluation as a line on stderr, after the name of the phase where there is one."""
    if values := evaluation(record):
        line = "  ".join(f"{k} {v:.4f}" if abs(v) < 1e4 else f"{k} {v:.4g}" for k, v in values.items())
        print(f"{prefix + ' ' if prefix else ''}step {record['step']:>6}  {line}", file=sys.stderr)


def announcer(prefix: str = "") -> Callable[[dict[str, Any]], None]:
    """Returns a logger for `jt.fit(log=)` that prints each evaluation as a line."""
    return lambda record: announce(prefix, record)
