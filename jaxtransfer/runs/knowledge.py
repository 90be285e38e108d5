"""What a run comes to know, by what trained it and the columns that this reads: classes, labels or features alone."""

from typing import Any

from jaxtransfer.errors import InputError
from jaxtransfer.parts.learns import CLASSES, LABELS, Learns
from jaxtransfer.runs.configuration import FEATURES

_SCORES = "logits"  # the output that commands and exported programs read
_LABEL = "label"


def learned_by(objective: Any, model: Any) -> Learns | None:
    """Returns what an objective teaches a model's logits to name, by the column `label` first of several.

    Where nothing tells that, the labels that another output learns of the column `label`, which are then no names of
    the logits; else None.
    """
    found = [
        term.learns
        for _, term in objective.summed.parts
        if term.learns and any(one.name == model.name for run in term.forwards for one in run.model.family)
    ]
    usual = [one for one in found if _LABEL in one.columns]
    scores = [one for one in (*usual, *found) if one.output == _SCORES]
    return next(iter([*scores, *(one for one in usual if one.kind == LABELS)]), None)


def named_by(learned: Learns | None, dataset: Any) -> tuple[str, list[str]]:
    """Returns what a run knows, and the names of it.

    Args:
      learned: what `learned_by` gave.
      dataset: what it learned from, or None.

    Raises:
      InputError: where the class names of a column are not those of the labels that the objective reads it as.
    """
    entries = getattr(dataset, "entries", {})
    columns = (_LABEL,) if learned is None else learned.columns
    if learned is None:
        kind = LABELS if _LABEL in entries and entries[_LABEL].multi_hot else CLASSES
    else:
        kind = learned.kind if learned.output == _SCORES else FEATURES
    if kind == LABELS:
        return LABELS, _labels(columns, entries)
    own = getattr(entries.get(columns[0]), "class_names", None)  # labels made of others have those' names
    names: list[str] = list(own or getattr(dataset, "class_names", ()))
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
    if entry.names and len(entry.shape) == 1:  # of a table's columns
        return [str(name) for name in entry.names]
    return [str(number) for number in range(entry.shape[0])] if len(entry.shape) == 1 else []
