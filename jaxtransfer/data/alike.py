"""The recipe of another table: that of a data set in memory, or the one that a run keeps."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtransfer.data.recipe import Recipe
from jaxtransfer.errors import InputError


def recipe_like(like: Any) -> Recipe:
    """Returns how the rows of a table become columns, as `like=` says it.

    Args:
      like: a data set that was made of a table, or a run (`jt.load_run`) that was trained on one.

    Raises:
      InputError: for what says nothing of a table.
    """
    found = getattr(like, "recipe", None)
    if isinstance(found, Recipe):
        return found
    kept = getattr(like, "table", None)
    if isinstance(kept, Mapping):
        return _of_entries(kept, getattr(like, "tokenizer", None))
    raise InputError(
        f"like= is a data set that from_frame or load('table:...') made, or a run (jt.load_run) of fit(out=, model=, "
        f"dataset=) on one; got {like!r:.100}, which says nothing of a table"
    )


def is_of_a_table(like: Any) -> bool:
    """Whether it says how the rows of a table become columns."""
    return isinstance(getattr(like, "recipe", None), Recipe) or isinstance(getattr(like, "table", None), Mapping)


def _of_entries(kept: Mapping[str, Any], tokenizer: Any) -> Recipe:
    """Returns the recipe that `Recipe.as_entries` told."""
    try:
        made = Recipe(
            numbers={name: (float(mean), float(deviation)) for name, (mean, deviation) in kept["numbers"].items()},
            gaps=tuple(kept["gaps"]),
            categories={name: tuple(values) for name, values in kept["categories"].items()},
            kept={new: (name, None if of is None else tuple(of)) for new, (name, of) in kept["kept"].items()},
            labels=frozenset(kept["labels"]),
            tokens=dict(kept["tokens"]),
            vocabulary=None,
            fill=bool(kept["fill"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"what the run keeps of its table can't be read: {error!r}; restore its table.json") from None
    if made.tokens and tokenizer is None:
        raise InputError("the run's table has texts, and the run keeps no tokenizer; restore its tokenizer.json")
    return dataclasses.replace(made, vocabulary=tokenizer)
