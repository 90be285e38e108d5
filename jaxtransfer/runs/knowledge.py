"""What a run comes to know, by what trained it and the columns that this reads: classes, labels or features alone."""

from typing import Any

from jaxtransfer.errors import InputError
from jaxtransfer.parts.learns import CLASSES, LABELS, Learns
from jaxtransfer.runs.configuration import FEATURES

_SCORES = "logits"  # the output that commands and exported programs read


def learned_by(objective: Any, model: Any) -> Learns | None:
    """Returns what an objective teaches a model's logits to name; of another output only where nothing teaches these.

    None for terms that don't tell.
    """
    found = [
        term.learns
        for _, term in objective.summed.parts
        if term.learns and any(one.name == model.name for run in term.forwards for one in run.model.family)
    ]
    return next((one for one in found if one.output == _SCORES), found[0] if found else None)


def named_by(learned: Learns | None, dataset: Any) -> tuple[str, list[str]]:
    """Returns what a run knows, and the names of it.

    Args:
      learned: what `learned_by` gave.
      dataset: what it learned from, or None.

    Raises:
      InputError: where the class names of a column are not those of the labels that the objective reads it as.
    """
    entries = getattr(dataset, "entries", {})
    columns = ("label",) if learned is None else learned.columns
    if learned is None:
        kind = LABELS if columns[0] in entries and entries[columns[0]].multi_hot else CLASSES
    else:
        kind = learned.kind if learned.output == _SCORES or learned.kind == CLASSES else FEATURES
    if kind == LABELS:
        return LABELS, _labels(columns, entries)
    known = entries.get(columns[0])
    names: list[str] = list(getattr(dataset, "class_names", ()) if known is None else known.class_names or ())
    return (CLASSES, names) if names and kind == CLASSES else (FEATURES, [])


def _labels(columns: tuple[str, ...], entries: Any) -> list[str]:
    """Returns the names of labels that hold together, or their numbers; nothing where the data lack them."""
    if any(column not in entries for column in columns):
        return []
    column, *others = columns
    if others:
        return list(columns)
    entry = entries[column]
    if entry.multi_hot:
        return list(entry.class_names)
    if entry.class_names is not None and entry.shape:
        raise InputError(
            f"fit: column {column!r} has {len(entry.class_names)} class names, and is read as {entry.shape[-1]} labels "
            f"that hold together; name each of them: class_names={{{column!r}: [...]}}, {entry.shape[-1]} names"
        )
    return [str(number) for number in range(entry.shape[0])] if len(entry.shape) == 1 else []
