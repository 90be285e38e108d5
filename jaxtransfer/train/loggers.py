"""Moved to `jaxtransfer.runs.loggers`; the old name keeps working."""

from jaxtransfer.runs.loggers import Logger, Record, jsonl, progress_bar, read_jsonl, tensorboard

__all__ = ["Logger", "Record", "jsonl", "progress_bar", "read_jsonl", "tensorboard"]
