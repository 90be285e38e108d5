"""Modules that moved, under the names that they had: `import jaxtransfer.surgery` keeps working."""

import importlib
import sys

MOVED = {
    "outputs": "parts.outputs",
    "report": "runs.report",
    "surgery": "weights.transfer",
    "train.checkpoints": "runs.checkpoints",
    "train.loggers": "runs.loggers",
}


def keep_former_names() -> None:
    """Lets each former name stand for the module as it is now, the same object."""
    for former, now in MOVED.items():
        module = importlib.import_module(f"jaxtransfer.{now}")
        sys.modules[f"jaxtransfer.{former}"] = module
        room, _, name = f"jaxtransfer.{former}".rpartition(".")
        setattr(importlib.import_module(room), name, module)
