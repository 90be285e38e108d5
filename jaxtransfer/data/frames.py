"""Data sets of tables that are held as frames of pandas."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtransfer.data.alike import recipe_like
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.features import Names, renamed
from jaxtransfer.data.recipe import Recipe, TableChoice, learn
from jaxtransfer.data.sources import ArraySource
from jaxtransfer.errors import InputError
from jaxtransfer.texts.saved import check_tokenizer
from jaxtransfer.texts.tokenizer import Tokenizer
from jaxtransfer.texts.words import Vocabulary

_WORDS = 20_000


def from_frame(
    frame: Any,
    *,
    label: Names = None,
    columns: Names = (),
    tokens: Names = (),
    features: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    categorical: Sequence[str] = (),
    numeric: Sequence[str] = (),
    length: int | None = None,
    words: int = _WORDS,
    tokenizer: Vocabulary | Tokenizer | None = None,
    fill: bool = True,
    like: Any = None,
    name: str = "frame",
    split: str = "all",
) -> Dataset:
    """Makes a data set of the rows of a table.

        train = jt.data.from_frame(frame, label="survived", drop=("name", "ticket"))
        test = jt.data.from_frame(other, like=train)  # the training rows' statistics, categories and words
        jt.classification(jt.models.mlp(train.classes), view="features")

    The columns that nothing else is said of make `features`, float32 [N, D]: numbers with the mean 0 and the standard
    deviation 1 of the rows; categories (texts) as a 1 in the place of their value. `entries["features"].names` says
    what each is. A missing number is filled by the mean, 0, and where rows of training lack some, a feature of its own
    is 1 where it is missing; a missing category is one of its own. What was filled, and a column that is left out as
    it has one value, is told in a warning of the logger "jaxtransfer". Labels are never filled.

    All this is learned from `frame`, or is that of `like`: leave the rows of a test out of the training frame.

    Args:
      frame: a `pandas.DataFrame`, or a mapping of columns that makes one.
      label: the column that becomes `label`; or several columns, under their names or new names to theirs. Texts and
        whole numbers are classes, in their order, other numbers are numbers.
      columns: further columns that stay by themselves, not in `features`: classes or numbers, as they are.
      tokens: a column of texts that becomes `tokens` int32 [N, T] and `tokens_mask`, true where a word stands; or
        several, as for `label`. `entries["tokens"].class_names` are the words, see `jt.data.Vocabulary`.
      features: the columns that make `features`; by default all that nothing else is said of.
      drop: columns that are left out.
      categorical: columns of numbers that stand for categories, labels among them.
      numeric: labels of whole numbers that are numbers, not classes.
      length: tokens of each text, as for `Vocabulary.of`.
      words: words that are known at most.
      tokenizer: what makes the tokens in place of the training texts' words: that of a pretrained text encoder
        (`jt.load_pretrained(...).tokenizer`), or that of a run. Without `length`, texts are as long as the longest of
        training, and no longer than it allows.
      fill: whether missing numbers of `features` are filled; else they are an error.
      like: a data set that this function or `load("table:...")` made, or a run that was trained on one,
        `jt.load_run(out)` of `fit(out=, model=, dataset=)`: its columns, statistics, categories, class names and words;
        a label may then be missing.
      name: the name that messages show.
      split: the split that messages show.

    Returns:
      The data set, in memory; `recipe` is how its columns were made.

    Raises:
      InputError: for unknown columns, missing labels, texts that are too many for categories.
    """
    frame = _frame(frame)
    title = f"{name} ({split})"
    if like is not None:
        recipe = recipe_like(like)
        asked = (label, columns, tokens, features, drop, categorical, numeric)
        learned = length is not None or words != _WORDS or tokenizer is not None or not fill
        if any(value is not None and len(value) for value in asked) or learned:
            raise InputError(
                "with like= the columns are those of that data set or run; leave out what else is said of columns"
            )
        return dataset_of(frame, recipe, name, split)
    choice = choice_of(
        label=label,
        columns=columns,
        tokens=tokens,
        features=features,
        drop=drop,
        categorical=categorical,
        numeric=numeric,
        length=length,
        words=words,
        tokenizer=tokenizer,
        fill=fill,
    )
    return dataset_of(frame, learn(frame, frame, choice, title), name, split)


def choice_of(
    *, label, columns, tokens, features, drop, categorical, numeric, length, words, fill, tokenizer=None
) -> TableChoice:
    """Returns what becomes of a table's columns; arguments as for `from_frame`."""
    labels = {"label": label} if isinstance(label, str) else renamed(label, "label")
    taken = {**labels, **renamed([columns] if isinstance(columns, str) else columns, "columns")}
    texts = {"tokens": tokens} if isinstance(tokens, str) else renamed(tokens, "tokens")
    lists = {"drop": drop, "categorical": categorical, "numeric": numeric}
    for what, names in {**lists, "features": features or ()}.items():
        if isinstance(names, str) or not all(isinstance(one, str) for one in names):
            raise InputError(f"{what}= is a tuple of names, ({names!r},) of one; got {names!r:.60}")
    rest = {key: tuple(value) for key, value in lists.items()}
    features = None if features is None else tuple(features)
    check_tokenizer(tokenizer, asked=bool(texts), words=words != _WORDS)
    return TableChoice(
        taken, frozenset(labels), texts, features, length=length, words=words, tokenizer=tokenizer, fill=fill, **rest
    )


def dataset_of(frame: Any, recipe: Recipe, name: str, split: str, data: str | None = None) -> Dataset:
    """Returns the rows of a frame as a recipe makes them; a fingerprint calls them `data`, or by their name."""
    arrays, entries = recipe(frame, f"{name} ({split})")
    if not arrays:
        raise InputError(f"{name} ({split}): nothing is left of its columns; name some: label=, features=, tokens=")
    return Dataset(name, split, source=ArraySource(arrays, data=data), entries=entries, recipe=recipe)


def _frame(frame: Any) -> Any:
    if hasattr(frame, "columns") and hasattr(frame, "isna"):
        return frame.rename(columns=str)
    if isinstance(frame, Mapping):
        return pandas().DataFrame(dict(frame)).rename(columns=str)
    raise InputError(f"from_frame takes a pandas.DataFrame, or columns by name; got a {type(frame).__name__}")


def pandas() -> Any:
    """Returns the module pandas.

    Raises:
      InputError: where it isn't installed.
    """
    try:
        import pandas
    except ImportError:
        raise InputError("tables are read by pandas: pip install 'jaxtransfer[tables]'") from None
    return pandas
