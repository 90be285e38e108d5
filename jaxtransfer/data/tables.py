"""Tables in files: CSV, TSV, Parquet, JSON lines and plain texts, with their splits."""

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtransfer.data import folder
from jaxtransfer.data.alike import recipe_like
from jaxtransfer.data.builders import reason_of
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.frames import choice_of, dataset_of, pandas
from jaxtransfer.data.images import shown
from jaxtransfer.data.recipe import Recipe, learn
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.files import expanded, read_text

KINDS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_OTHERS = (".parquet", ".jsonl", ".txt")
_SPLIT = "split"
_GAPS = ["", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "-nan", "NULL", "null", "None"]  # a value is missing
_SHARE = 5  # a fifth is the test


def load_table(
    path: str, split: str, *, split_by: str | None = None, train: str | None = None, like: Any = None, **asked: Any
) -> Dataset:
    """Loads some rows of a table; what becomes of the columns is as for `from_frame`.

    A CSV has commas, quotes and a line of names; a TSV tabs, names, and no quotes; a `.txt` a text in each line, the
    column `text`; Parquet and JSON lines (`.jsonl`) what they say. Names may end in `.gz`. Empty fields are missing
    values, and NA, N/A, NaN, null and None, but in columns of `tokens`.

    Splits are the values of a column: `split_by`, or `split` where there is such a one. Without, the fifth of the rows
    with the smallest hash of what stands in them is "test", and the rest "train"; rows that are alike are in one.
    "all" are all; "a+b" both; slices as in tfds: "train[:100]", "train[10%:]". Statistics, categories and words are
    those of the rows of the split `train`, whichever split is asked for; class names those of the whole table.

    Args:
      path: of the file.
      split: the rows to load.
      split_by: the column whose values are the splits; it is no feature.
      train: the split that training is on; "train" by default.
      like: a data set of a table, or a run on one, as for `from_frame`: nothing is learned of this table.
      **asked: `label`, `columns`, `tokens`, `features`, `drop`, `categorical`, `numeric`, `length`, `words`,
        `tokenizer` and `fill` as for `jt.data.from_frame`.

    Raises:
      InputError: for a file that can't be read, an unknown split, no training rows, and as `from_frame`.
    """
    given = {**_USUAL, **asked}
    if strange := sorted(given.keys() - _USUAL.keys()):
        raise unknown("argument for tables", strange[0], [*_USUAL, "split_by", "train"])
    if like is not None:
        if train is not None or any(given[key] != usual for key, usual in _USUAL.items()):
            raise InputError(
                "with like= the columns are those of that data set or run; leave out train= and what says columns"
            )
        return _load_alike(path, split, split_by, recipe_like(like))
    choice, name = choice_of(**given), f"table:{path}"
    frame = read_frame(path, texts=tuple(choice.tokens.values()))
    used = (*choice.taken.values(), *choice.tokens.values(), *(choice.features or ()), *choice.drop)
    splits, by = _splits(frame, split_by, name, used)
    if by is not None:
        choice = choice._replace(drop=(*choice.drop, by))
    source = train or "train"
    if source.partition("[")[0].partition("+")[0] not in splits:
        hint = (
            f"name the one that training is on: train={next((s for s in splits if s != 'all'), 'all')!r}"
            if train is None
            else "choose one"
        )
        raise InputError(f"{name} has no split {source!r}; its splits: {', '.join(splits)}; {hint}")
    rows, learned = _rows(split, splits, name), _rows(source, splits, name)
    recipe = learn(frame.iloc[learned], frame, choice, name)
    return dataset_of(frame.iloc[rows], recipe, name, split, data="table")


def _load_alike(path: str, split: str, split_by: str | None, recipe: Recipe) -> Dataset:
    """Loads rows of a table as those of another one became columns."""
    name = f"table:{path}"
    frame = read_frame(path, texts=tuple(recipe.tokens.values()))
    kept = [column for column, _ in recipe.kept.values()]
    splits, _ = _splits(frame, split_by, name, (*recipe.numbers, *recipe.gaps, *recipe.categories, *kept))
    return dataset_of(frame.iloc[_rows(split, splits, name)], recipe, name, split, data="table")


_USUAL = {
    "label": None,
    "columns": (),
    "tokens": (),
    "features": None,
    "drop": (),
    "categorical": (),
    "numeric": (),
    "length": None,
    "words": 20_000,
    "tokenizer": None,
    "fill": True,
}


def read_frame(path: str, *, texts: tuple[str, ...] = ()) -> Any:
    """Reads a table as a pandas frame; `texts` are columns in which "NA" and the like are words."""
    file = expanded(path)
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    if kind not in (*KINDS, *_OTHERS):
        raise InputError(
            f"cannot tell what table {shown(file)} is; expected a name that ends in {', '.join((*KINDS, *_OTHERS))}"
        )
    if not file.is_file():
        raise InputError(f"there is no file {shown(file)}; expected table:PATH of a table")
    reader = pandas()
    try:
        if kind in KINDS:
            how: dict[str, Any] = {"sep": KINDS[kind], "keep_default_na": False, "index_col": False}
            how |= {"quoting": 3} if KINDS[kind] == "\t" else {}  # 3: quotes are signs as others
            names = reader.read_csv(file, nrows=0, **how).columns
            gaps = {name: _GAPS for name in names if name not in texts}
            types = {name: str for name in names if name in texts}
            with warnings.catch_warnings():  # of lines with more fields than names, the last would be dropped
                warnings.simplefilter("error", reader.errors.ParserWarning)
                return reader.read_csv(file, na_values=gaps, dtype=types, low_memory=False, **how)
        if kind == ".jsonl":
            return reader.read_json(file, lines=True, dtype=False)
        if kind == ".txt":
            return reader.DataFrame({"text": read_text(file).splitlines()})
        return reader.read_parquet(file)
    except Exception as error:  # readers raise many types on damaged files
        raise InputError(f"cannot read the table {shown(file)}: {reason_of(error)}; mend it") from error


def _splits(
    frame: Any, split_by: str | None, name: str, used: Sequence[str]
) -> tuple[dict[str, np.ndarray], str | None]:
    """Returns the rows of each split, and the column that tells them."""
    every = np.arange(len(frame))
    by = split_by
    if by is None and _SPLIT in frame.columns and _SPLIT not in used:
        by = _SPLIT
    if by is None:
        return {**_by_hash(frame), "all": every}, None
    if by not in frame.columns:
        raise unknown(f"column of {name}", by, map(str, frame.columns))
    values = frame[by].astype(object).where(frame[by].notna(), "").map(_text).to_numpy(object)
    found = {value: np.flatnonzero(values == value) for value in dict.fromkeys(values) if value}
    return {"all": every, **found}, by


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _by_hash(frame: Any) -> dict[str, np.ndarray]:
    rows = zip(*(map(str, frame[name].tolist()) for name in frame.columns), strict=True)
    lines = ["\x1f".join(row).encode(errors="surrogatepass") for row in rows]
    digests = np.array([hashlib.sha256(line).hexdigest() for line in lines], object)
    distinct = sorted(set(digests))
    test = set(distinct[: len(distinct) // _SHARE])
    tested = np.array([digest in test for digest in digests], bool)
    return {"train": np.flatnonzero(~tested), "test": np.flatnonzero(tested)}


def _rows(split: str, splits: dict[str, np.ndarray], name: str) -> np.ndarray:
    found = []
    for part in split.split("+"):
        base, start, stop = folder.parse_split(part.strip())
        if base not in splits:
            raise unknown(f"split of {name}", base, splits)
        rows = splits[base]
        found.append(rows[folder.bound(start, len(rows), 0) : folder.bound(stop, len(rows), len(rows))])
    rows = np.concatenate(found)
    if not len(rows):
        raise InputError(f"split {split!r} of {name} has no rows; its splits: {', '.join(splits)}")
    return rows
