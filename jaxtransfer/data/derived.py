"""Data sets that are made of others: with more columns, of chosen examples, of other classes, decoded."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxtransfer.data.classes import match_classes, not_among
from jaxtransfer.data.columns import as_column, selected
from jaxtransfer.data.entries import RESERVED, check_fits, column_of, type_in_batches
from jaxtransfer.data.labels import example_numbers
from jaxtransfer.data.sources import ArraySource, decode, relabelled
from jaxtransfer.errors import InputError

if TYPE_CHECKING:
    from jaxtransfer.data.dataset import Dataset


class Derived:
    """What every data set can be turned into; the methods of `Dataset` that give another one."""

    def with_columns(
        self: Any,
        columns: Mapping[str, Any],
        *,
        of_image: bool = False,
        class_names: Mapping[str, Sequence[str] | None] | None = None,
    ) -> "Dataset":
        """Adds values to each example, which batches then hold beside the others.

        `select`, `take` and `subset` choose from them, `decoded` and the pipelines carry them.

        Args:
          columns: by name, an array [N, ...] or an object with `__len__` and `__getitem__(int64 [n]) -> [n, ...]`
            that reads what it is asked for; entry i belongs to example i of this data set.
          of_image: whether they are functions of the unaugmented image, such as a teacher's outputs; a pipeline
            then refuses to augment. An example's number, say, holds for any view of it.
          class_names: as for `from_columns`, of those that are arrays of classes.

        Raises:
          InputError: for another length, a name that is taken, whole numbers that JAX can't hold.

        Example:
          >>> numbered = dataset.with_columns({"index": np.arange(len(dataset))})
        """
        added = {name: as_column(column) for name, column in columns.items()}
        entries = dict(self.entries)
        for name, column in added.items():
            if name in (taken := list(dict.fromkeys([*self.sourced_entries, RESERVED, *self.columns]))):
                raise InputError(
                    f"{self.title}: a column can't be called {name!r}; choose another name than {', '.join(taken)}"
                )
            size = column.shape[:1] if isinstance(column, np.ndarray) else (len(column),)
            if size != (len(self),):
                raise InputError(
                    f"{self.title}: column {name!r} must have one entry for each of the {len(self)} examples, got "
                    f"{size[0] if size else 'a single value'}; add columns before choosing examples"
                )
            if isinstance(column, np.ndarray):  # of 64 bits, JAX would bring them round unsaid
                check_fits(column, type_in_batches(column.dtype), f"{self.title}: column {name!r}")
        told = dict(class_names or {})
        if isinstance(added.get("label"), np.ndarray):
            told.setdefault("label", ())  # classes, where it has whole numbers or texts, as for `from_columns`
        for name, names in told.items():
            added[name], entries[name] = column_of(name, added[name], self.title, names)
        marked = self.of_image | added.keys() if of_image else self.of_image
        more = replace(self, columns={**self.columns, **added}, of_image=marked, entries=entries)
        if "labels" in vars(self):  # read once
            vars(more)["labels"] = self.labels
        return more

    def without(self: Any, *names: str) -> "Dataset":
        """The same examples without some of their columns: `target.without("label")` can't be read by mistake.

        Args:
          names: of the columns.

        Raises:
          InputError: for an unknown name, and where no column is left.
        """
        for name in names:
            self.entry_of(name)
        entries, columns = ({k: v for k, v in of.items() if k not in names} for of in (self.entries, self.columns))
        if not entries:
            raise InputError(f"{self.title}: without {', '.join(names)} no column is left")
        source = self.source
        if isinstance(source, ArraySource):
            source = replace(source, arrays={k: v for k, v in source.arrays.items() if k not in names})
        kept = self.of_image - set(names)
        return replace(self, source=source, columns=columns, of_image=kept, entries=entries)

    def with_stored(
        self: Any, path: Any, outputs: Mapping[str, Any], of: Mapping[str, Any], batches: Iterable[Mapping[str, Any]]
    ) -> "Dataset":
        """Adds columns that lie in a folder, in the form of a teacher's cache; writes them first, if they aren't there.

        Args:
          path: the folder.
          outputs: by the column's name, what has the `shape` and `dtype` of one example's value: float32 or float16.
          of: what they are made by, as JSON types: with other contents, or of other data, the folder is refused.
          batches: the values [b, ...] by name, in the order of the examples; not asked for when they are there.

        Raises:
          InputError: where the folder holds something else, or can't be written or read.
        """
        from jaxtransfer.data.teacher_cache import open_outputs, outputs_note
        from jaxtransfer.data.teacher_writer import write_outputs

        write_outputs(path, outputs_note(self, outputs, of), batches)
        return self.with_columns(open_outputs(path).columns_for(self, ""), of_image=True)

    def select(self: Any, indices: Sequence[int] | np.ndarray) -> "Dataset":
        """The data set of the given examples, in the given order.

        Args:
          indices: integers [n] in [0, N), repeats allowed.

        Raises:
          InputError: for an index outside of [0, N), or one that is no whole number.
        """
        indices = example_numbers(indices, "select").reshape(-1)
        for index in indices[(indices < 0) | (indices >= len(self))][:1]:
            raise InputError(f"{self.title}: example {index} asked, it has {len(self)}, numbered from 0")
        columns = {name: selected(column, indices) for name, column in self.columns.items()}
        return replace(self, rows=indices if self.rows is None else self.rows[indices], columns=columns)

    def take(self: Any, n: int) -> "Dataset":
        """The first `n` examples; all of them when there are fewer."""
        n = int(example_numbers(n, "take"))
        if n < 0:
            raise InputError(f"take needs a number of examples of at least 0, got {n}")
        return self.select(np.arange(min(n, len(self))))

    def subset(self: Any, *, per_class: int, seed: int = 0, by: str = "label") -> "Dataset":
        """Chooses `per_class` examples of each class without replacement.

        The choice is a function of (seed, the labels); for one seed a smaller choice lies within a larger
        one.

        Args:
          per_class: examples per class, at least 1.
          seed: non-negative integer.
          by: the column that holds the classes.

        Returns:
          The chosen examples, in the order of the whole data set.

        Raises:
          InputError: names a class with too few examples.
        """
        per_class = int(example_numbers(per_class, "subset"))
        if per_class < 1 or seed < 0:
            raise InputError(f"subset needs per_class >= 1 and seed >= 0, got {per_class} and {seed}")
        if not (entry := self.entry_of(by)).is_label:
            raise InputError(f"{self.title}: subset chooses by classes, and {by!r} is {entry}; name a label by by=")
        labels = self.labels if by == "label" else self.column(by)
        chosen = []
        for label, class_name in enumerate(entry.class_names or ()):
            members = np.flatnonzero(labels == label)
            if len(members) < per_class:
                raise InputError(
                    f"{self.title}: class {class_name!r} has {len(members)} examples, {per_class} per class "
                    "asked; ask for fewer"
                )
            chosen.append(np.random.default_rng([seed, label]).permutation(members)[:per_class])
        return self.select(np.sort(np.concatenate(chosen)))

    def as_classes(self: Any, class_names: Sequence[str], *, whose: str = "the classes asked for") -> "Dataset":
        """The same examples with the labels that other class names give them, for a model of those to be evaluated.

        Names are found wherever they stand, and classes may be left over; see `match_classes` for names that are
        numbers and for data without names.

        Args:
          class_names: the classes that label k is to stand for.
          whose: what they are of, for messages.

        Raises:
          InputError: names a class that occurs here and is not among them; or where names don't tell.
        """
        if not self.entry_of("label").is_label:
            raise InputError(
                f"{self.title}: as_classes is of one class per example, and 'label' is {self.entries['label']}"
            )
        found = match_classes(self.class_names, class_names, of=self.title, whose=whose).places
        for label in np.flatnonzero(found < 0):
            if label in self.labels:
                raise not_among(self.class_names[label], class_names, of=self.title, whose=whose)
        labels = found[self.labels].astype(np.int32)
        if "label" in self.columns:
            more = replace(self, class_names=tuple(class_names), columns={**self.columns, "label": labels})
        else:
            more = replace(self, class_names=tuple(class_names), source=relabelled(self.source, found))
        vars(more)["labels"] = labels  # read once
        return more

    def decoded(self: Any, threads: int | None = None) -> "Dataset":
        """The same data set with its decoded examples held in memory.

        Args:
          threads: threads that decode; by default one per processor, at most 8.

        Raises:
          InputError: names an example whose image has another shape or whose label is out of range.
        """
        if self.in_memory and self.rows is None:
            return self
        arrays = decode(self.sourced, self.sourced_entries, len(self), threads)
        return replace(self, source=ArraySource(arrays, self.origin), rows=None, resize=False)
