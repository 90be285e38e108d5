"""`--dry-run`: what a training would take on each device, printed before anything runs."""

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxtransfer.runs.report import table

_ROWS = {
    "argument_bytes": "arguments: weights, state of the optimiser, frozen weights, a batch",
    "output_bytes": "outputs beyond the arguments that they overwrite",
    "temporary_bytes": "temporaries: what a step computes in between",
    "program_bytes": "the program",
}


class DryRunEnd(Exception):
    """What was asked for is printed."""


@contextmanager
def written_nowhere(command: Any) -> Iterator[Any]:
    """Gives the command, with a folder that is deleted afterwards as its --out where it is a dry run."""
    if not getattr(getattr(command, "training", None), "dry_run", False):
        yield command
        return
    with tempfile.TemporaryDirectory() as folder:
        yield dataclasses.replace(command, training=dataclasses.replace(command.training, out=Path(folder) / "run"))


def end_dry_run(training: Any, fitted: Any, *, phase: str = "", last: bool = True) -> None:
    """Prints what a dry run found; does nothing after any other.

    Args:
      training: the options.
      fitted: what `jt.fit` gave.
      phase: its name, where there are several.
      last: whether no other phase follows.

    Raises:
      DryRunEnd: after the last one.
    """
    if not training.dry_run:
        return
    print("\n".join(told(fitted.timing, phase)))
    if last:
        raise DryRunEnd


def told(numbers: dict[str, float], phase: str = "") -> list[str]:
    """Returns the table of a compiled step's memory as lines.

    Args:
      numbers: `Fitted.timing` of a dry run.
      phase: its name, where there are several.
    """
    devices = jax.devices()
    where = devices[0].device_kind if len(devices) == 1 else f"each of {len(devices)} × {devices[0].device_kind}"
    rows = [(text, _mebibytes(numbers[name])) for name, text in _ROWS.items() if name in numbers]
    rows.append(("together", _mebibytes(sum(numbers[name] for name in _ROWS if name in numbers))))
    if limit := (devices[0].memory_stats() or {}).get("bytes_limit"):
        rows.append(("the device has", _mebibytes(limit)))
    if "flops_per_step" in numbers:
        rows.append(("operations of a step (a loop inside counted once)", f"{numbers['flops_per_step'] / 1e9:,.3f} G"))
    return table((f"{phase + ': ' if phase else ''}a compiled step on {where}", ""), rows)


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"
