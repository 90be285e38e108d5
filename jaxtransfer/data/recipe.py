"""How the rows of a table become columns: learned from the training rows alone, applied to any."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxtransfer.data.entries import LABEL_DTYPE, Entry, check_range
from jaxtransfer.data.table_columns import (
    MISSING,
    in_order,
    is_number,
    is_whole,
    listed,
    names_of,
    numbers_of,
    texts_of,
)
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.texts.saved import of_length
from jaxtransfer.texts.tokenizer import Tokenizer
from jaxtransfer.texts.words import PADDING, Vocabulary

_LOG = logging.getLogger("jaxtransfer")
_MOST_CATEGORIES = 100
FEATURES = "features"


class TableChoice(NamedTuple):
    """What becomes of a table's columns, as a caller says it.

    Attributes:
      taken: columns that stay by themselves, labels among them: new name to the one in the table.
      labels: those of `taken` that are labels, which new rows may lack.
      tokens: texts that become tokens: new name to the one in the table.
      features: columns that make the matrix `features`; None for all others.
      drop: columns that are left out.
      categorical: numbers that stand for categories, or classes.
      numeric: labels that are numbers, though they are whole.
      length: tokens of each text.
      words: words that are known at most.
      tokenizer: what makes the tokens; None for words of the training texts.
      fill: whether missing numbers are filled; else they are an error.
    """

    taken: Mapping[str, str]
    labels: frozenset[str]
    tokens: Mapping[str, str]
    features: Sequence[str] | None
    drop: tuple[str, ...]
    categorical: tuple[str, ...]
    numeric: tuple[str, ...]
    length: int | None
    words: int
    tokenizer: Vocabulary | Tokenizer | None
    fill: bool


@dataclass(frozen=True)
class Recipe:
    """How the rows of a table become columns.

    Attributes:
      numbers: columns of numbers in `features`: name to (mean, standard deviation) over the training rows that have
        one; they are brought to mean 0 and deviation 1, and a missing one to 0, the mean.
      gaps: columns of numbers that some training rows lack: `features` has 1 where they do, beside.
      categories: columns of categories in `features`, each value of the training rows 1 in a place of its own.
      kept: columns by themselves: new name to (name in the table, class names; None for numbers).
      labels: those of `kept` that new rows may lack.
      tokens: new name to name in the table.
      vocabulary: what makes the tokens: of the training texts, or the tokenizer that was given.
      fill: whether missing numbers are filled.
    """

    numbers: Mapping[str, tuple[float, float]]
    gaps: tuple[str, ...]
    categories: Mapping[str, tuple[str, ...]]
    kept: Mapping[str, tuple[str, tuple[str, ...] | None]]
    labels: frozenset[str]
    tokens: Mapping[str, str]
    vocabulary: Vocabulary | Tokenizer | None
    fill: bool

    @property
    def feature_names(self) -> tuple[str, ...]:
        """What the numbers of `features` are."""
        gaps = [f"{name} is missing" for name in self.gaps]
        return (
            *self.numbers,
            *gaps,
            *(f"{name}={value}" for name, values in self.categories.items() for value in values),
        )

    @property
    def feature_columns(self) -> tuple[str, ...]:
        """The columns of the table that `features` is made of."""
        return tuple(dict.fromkeys([*self.numbers, *self.gaps, *self.categories]))

    def as_entries(self) -> dict[str, Any]:
        """Returns it in JSON types, numbers to the bit, without what makes the tokens, which is kept by itself."""
        return {
            "numbers": {name: list(pair) for name, pair in self.numbers.items()},
            "gaps": list(self.gaps),
            "categories": {name: list(values) for name, values in self.categories.items()},
            "kept": {new: [name, None if of is None else list(of)] for new, (name, of) in self.kept.items()},
            "labels": sorted(self.labels),
            "tokens": dict(self.tokens),
            "fill": self.fill,
        }

    def __call__(self, frame: Any, title: str) -> tuple[dict[str, np.ndarray], dict[str, Entry]]:
        """Returns the arrays [N, ...] of a frame's rows and what is known of them; says what was missing.

        Raises:
          InputError: for a column that isn't there, a class or values that the training rows don't have, and for
            missing numbers that are not to be filled.
        """
        arrays, entries = {}, {}
        for name in [*self.numbers, *self.gaps, *self.categories, *self.tokens.values()]:
            if name not in frame.columns:
                made = "tokens" if name in self.tokens.values() else FEATURES
                raise _lacks(title, name, f"of which {made!r} is made", frame)
        if self.feature_names:
            arrays[FEATURES] = self._features(frame, title)
            entries[FEATURES] = Entry(arrays[FEATURES].shape[1:], np.dtype(np.float32), names=self.feature_names)
        for new, (name, classes) in self.kept.items():
            if name not in frame.columns and new in self.labels:
                continue  # rows to predict
            if name not in frame.columns:
                raise _lacks(title, name, f"of which {new!r} is made", frame)
            arrays[new] = _kept(frame[name], classes, title)
            entries[new] = Entry((), arrays[new].dtype, classes)
        for new, name in self.tokens.items():
            assert self.vocabulary is not None
            texts = texts_of(frame[name])
            if cut := self.vocabulary.longer(texts):
                _LOG.warning("%s: %d of %d texts are cut to %d tokens", title, cut, len(texts), self.vocabulary.length)
            arrays[new] = self.vocabulary(texts)
            entries[new] = Entry(arrays[new].shape[1:], LABEL_DTYPE, self.vocabulary.names)
            arrays[f"{new}_mask"] = arrays[new] != PADDING
            entries[f"{new}_mask"] = Entry(arrays[new].shape[1:], np.dtype(bool))
        return arrays, entries

    def _features(self, frame: Any, title: str) -> np.ndarray:
        columns, said = [], []
        values = {name: numbers_of(frame[name], title) for name in dict.fromkeys([*self.numbers, *self.gaps])}
        for name, (mean, deviation) in self.numbers.items():
            gone = np.isnan(values[name])
            if gone.any() and not self.fill:
                raise InputError(
                    f"{title}: {int(gone.sum())} of {len(gone)} rows have no {name!r}; mend the table, or leave the "
                    f"column out, drop=({name!r},), or let missing numbers be filled, fill=True"
                )
            if gone.any():
                said.append((name, int(gone.sum())))
            columns.append(np.where(gone, 0, (values[name] - mean) / deviation))
        columns += [np.isnan(values[name]).astype(float) for name in self.gaps]
        strange = []
        for name, known in self.categories.items():
            found = names_of(frame[name], title)
            columns += [(found == value).astype(float) for value in known]
            if others := sorted(set(found) - set(known)):
                strange.append(f"{name}={others[0]}")
        if said:
            untold = [name for name, _ in said if name not in self.gaps]
            told = "features of their own tell where"
            if untold:
                told += f", but not of {', '.join(untold)}, which no training row lacks"
            counted = ", ".join(f"{name} in {count}" for name, count in said)
            what = "of %d rows numbers are missing, %s: the mean of the training rows stands for them; %s"
            _LOG.warning(f"%s: {what}", title, len(frame), counted, told)
        if strange:
            _LOG.warning(
                "%s: categories that no training row has (%s) are none of the features", title, ", ".join(strange)
            )
        return _float32(np.stack(columns, axis=1), self.feature_names, title)


def _lacks(title: str, name: str, what: str, frame: Any) -> InputError:
    return InputError(
        f"{title}: the rows lack the column {name!r}, {what}, as it was of the training rows; add it; they have "
        f"{listed(tuple(map(str, frame.columns)))}"
    )


def learn(frame: Any, whole: Any, choice: TableChoice, title: str) -> Recipe:
    """Returns the recipe of a table.

    Args:
      frame: the training rows: statistics, categories and words are theirs.
      whole: all rows whose labels may occur: class names are those of all.
      choice: what becomes of the columns.
      title: of the table, for messages.

    Raises:
      InputError: for names that are no columns, columns of too many categories, missing labels, no training rows.
    """
    if not len(frame):
        raise InputError(f"{title}: there are no training rows to take the statistics of")
    _check_names(frame, choice, title)
    used = {*choice.taken.values(), *choice.tokens.values(), *choice.drop}
    names = [name for name in map(str, frame.columns) if name not in used]
    if choice.features is not None:
        names = list(choice.features)
    numbers, gaps, categories, left = {}, [], {}, []
    for name in names:
        if not is_number(frame[name]) or name in choice.categorical:
            categories[name] = _categories(frame[name], title)
            continue
        values = numbers_of(frame[name], title)
        known = values[~np.isnan(values)]
        if 0 < len(known) < len(values):
            gaps.append(name)
        if len(known) and known.min() < known.max():
            numbers[name] = _mean_and_deviation(known, name, title)
        else:
            left.append(name)
    if left:
        _LOG.warning("%s: the training rows have at most one value of %s: left out", title, ", ".join(left))
    made = tuple(dict.fromkeys([*numbers, *gaps, *categories]))
    if made and choice.features is None:
        _LOG.info("%s: features are made of %s; others by drop= or features=", title, listed(made))
    kept = {new: (name, _classes(whole, name, choice, title)) for new, name in choice.taken.items()}
    vocabulary = None
    if choice.tokens:
        texts = [text for name in choice.tokens.values() for text in texts_of(frame[name])]
        if choice.tokenizer is None:
            vocabulary = Vocabulary.of(texts, length=choice.length, size=choice.words)
        else:
            vocabulary = of_length(choice.tokenizer, texts, choice.length)
    return Recipe(numbers, tuple(gaps), categories, kept, choice.labels, dict(choice.tokens), vocabulary, choice.fill)


def _mean_and_deviation(values: np.ndarray, name: str, title: str) -> tuple[float, float]:
    with np.errstate(over="ignore"):
        mean, deviation = float(values.mean()), float(values.std())
    if not (np.isfinite(mean) and np.isfinite(deviation) and deviation > 0):
        raise InputError(
            f"{title}: the numbers of column {name!r}, {values.min():g} to {values.max():g}, have no standard "
            f"deviation that can be divided by; bring them to another scale, or leave the column out: drop=({name!r},)"
        )
    return mean, deviation


def _float32(values: np.ndarray, names: Sequence[str], title: str) -> np.ndarray:
    """Returns numbers [N, D] as float32, in which those above 3e38 would be infinite."""
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    for row, column in np.argwhere(~np.isfinite(narrow))[:1]:
        raise InputError(
            f"{title}: row {row} has in {names[column]!r} a number that float32 can't hold, {values[row, column]:g}; "
            f"mend the table, or bring the column to another scale"
        )
    return narrow


def _check_names(frame: Any, choice: TableChoice, title: str) -> None:
    known = [str(name) for name in frame.columns]
    for name in known:
        if known.count(name) > 1:
            raise InputError(f"{title}: two columns are called {name!r}; rename one")
    asked = [*choice.taken.values(), *choice.tokens.values(), *(choice.features or ()), *choice.drop]
    for name in [*asked, *choice.categorical, *choice.numeric]:
        if name not in known:
            raise unknown(f"column of {title}", name, known)
    used = {*choice.taken.values(), *choice.tokens.values(), *choice.drop}
    if twice := [name for name in choice.features or () if name in used]:
        raise InputError(f"{title}: features= has {twice[0]!r}, which is a label, a column by itself or left out")
    if twice := [name for name in choice.features or () if list(choice.features or ()).count(name) > 1]:
        raise InputError(f"{title}: features= has {twice[0]!r} more than once; name it once")
    new = [*choice.taken, *choice.tokens, *(f"{name}_mask" for name in choice.tokens)]
    for name in new:
        if name in (FEATURES, "mask", "image") or new.count(name) > 1:
            raise InputError(
                f"{title}: a column can't be called {name!r}, which is the name of another; rename it: "
                "columns={'new name': 'name'}"
            )


def _categories(series: Any, title: str) -> tuple[str, ...]:
    found = set(names_of(series, title))
    values = sorted(found - {MISSING}, key=in_order) + sorted(found & {MISSING})
    if len(values) > _MOST_CATEGORIES:
        raise InputError(
            f"{title}: column {series.name!r} has {len(values)} different texts in the training rows, too many for "
            f"categories (e.g. {values[0]!r:.40}); leave it out, drop=({series.name!r},), or take its words as tokens, "
            f"tokens={series.name!r}"
        )
    return tuple(values)


def _classes(frame: Any, name: str, choice: TableChoice, title: str) -> tuple[str, ...] | None:
    """Returns the class names of a column that stays by itself; None where it holds numbers."""
    series = frame[name]
    whole = is_whole(series) or name in choice.categorical or not is_number(series)
    if not whole or name in choice.numeric:
        return None
    if series.dtype.kind in "iu":
        return tuple(map(str, sorted(set(series.dropna().tolist()))))
    return tuple(sorted(set(names_of(series, title)) - {MISSING}, key=in_order))


def _kept(series: Any, classes: tuple[str, ...] | None, title: str) -> np.ndarray:
    gone = series.isna().to_numpy(bool)
    if gone.any():
        raise InputError(
            f"{title}: {int(gone.sum())} of {len(gone)} rows have no {series.name!r}; leave them out: "
            f"jt.data.from_frame(frame.dropna(subset=[{series.name!r}]), ...)"
        )
    if classes is None:
        return _float32(numbers_of(series, title)[:, None], (str(series.name),), title)[:, 0]
    number = {name: code for code, name in enumerate(classes)}
    codes = np.array([number.get(name, -1) for name in names_of(series, title)], np.int64)
    if (codes < 0).any():
        name = names_of(series, title)[np.argmin(codes)]
        raise InputError(f"{title}: {name!r} is no class of {series.name!r}; known: {', '.join(classes[:20])}")
    check_range(codes, classes, title, str(series.name))
    return codes.astype(LABEL_DTYPE)
