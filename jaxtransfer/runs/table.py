"""How the rows of a table became what a run learned from: noted by a digest, and kept in a file beside its notes."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtransfer.errors import InputError
from jaxtransfer.files import read_text
from jaxtransfer.runs.files import told, write_atomically

TABLE = "table"
FILE = "table.json"


def table_note(dataset: Any) -> dict[str, Any] | None:
    """Returns what a configuration says of the table that a run learns from; None where it is none.

    Args:
      dataset: what the run learns from.
    """
    text = _text_of(dataset)
    return None if text is None else {"digest": _digest(text)}


def keep_table(directory: Path, dataset: Any) -> None:
    """Writes how the rows of a data set's table become columns into a run directory, where it is of one.

    Args:
      directory: of the run.
      dataset: what it learns from.
    """
    text = _text_of(dataset)
    if text is not None:
        with told(directory / FILE):
            write_atomically(directory / FILE, text)


def kept_table(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns what `keep_table` wrote; None where the run is none on a table, or of before tables were kept.

    Args:
      directory: of the run.
      config: its configuration.

    Raises:
      InputError: where the file is gone, or another one.
    """
    note = config.get(TABLE)
    if note is None:
        return None
    path = directory / FILE
    try:
        text = read_text(path)
        found = json.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read what the columns of this run are made by, {path}: {error}; restore it") from None
    if _digest(text) != note.get("digest"):
        raise InputError(f"{path} is not of the table that the run was trained on; restore it")
    return found


def _text_of(dataset: Any) -> str | None:
    recipe = getattr(dataset, "recipe", None)
    return None if recipe is None else json.dumps(recipe.as_entries(), indent=1) + "\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
