"""What makes the tokens of a run on texts: noted by a digest in its configuration, and kept in a file beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.runs.files import told, write_atomically
from jaxtransfer.texts import saved
from jaxtransfer.texts.tokenizer import Tokenizer
from jaxtransfer.texts.words import Vocabulary

TOKENIZER = "tokenizer"


def tokens_note(dataset: Any, model: Model) -> dict[str, Any] | None:
    """Returns what a configuration says of the tokenizer of a data set; None where it has no texts.

    Args:
      dataset: what the run learns from.
      model: that which it trains.

    Raises:
      InputError: for tokens that are not those of the model.
    """
    tokenizer = getattr(dataset, TOKENIZER, None)
    if tokenizer is None:
        return None
    known = None if model.recipe is None else model.recipe.arguments.get("vocabulary")
    words = isinstance(tokenizer, Vocabulary)
    if known is not None and (len(tokenizer) > known or (words and len(tokenizer) != known)):
        raise InputError(
            f"fit: the texts of dataset= are of {len(tokenizer)} tokens{', words of their own' * words}, and model "
            f"{model.name!r} knows {known}; load them by its tokenizer (tokenizer=), or make it vocabulary="
            f"{len(tokenizer)}"
        )
    return {"length": tokenizer.length, "tokens": len(tokenizer), "digest": saved.digest(tokenizer)}


def keep_tokenizer(directory: Path, dataset: Any) -> None:
    """Writes the tokenizer of a data set into a run directory, where there is one.

    Args:
      directory: of the run.
      dataset: what it learns from.
    """
    tokenizer = getattr(dataset, TOKENIZER, None)
    if tokenizer is not None:
        with told(directory / saved.FILE):
            write_atomically(directory / saved.FILE, saved.as_text(tokenizer))


def kept_tokenizer(directory: Path, config: Mapping[str, Any]) -> Tokenizer | Vocabulary | None:
    """Returns what makes the tokens of a run; None where it is none on texts.

    Args:
      directory: of the run.
      config: its configuration.

    Raises:
      InputError: where the file is gone, or another one.
    """
    note = config.get(TOKENIZER)
    if note is None:
        return None
    found = saved.read(directory / saved.FILE)
    if saved.digest(found) != note.get("digest"):
        raise InputError(f"{directory / saved.FILE} is not the tokenizer that the run was trained with; restore it")
    return found
