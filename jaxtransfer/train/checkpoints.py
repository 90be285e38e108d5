"""Moved to `jaxtransfer.runs.checkpoints`; the old name keeps working."""

from jaxtransfer.runs.checkpoints import Checkpoints, DamagedCheckpointError, Restored, best, fill, nested, read, steps

__all__ = ["Checkpoints", "DamagedCheckpointError", "Restored", "best", "fill", "nested", "read", "steps"]
