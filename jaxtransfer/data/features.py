"""Which features of a tfds data set become which columns."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jaxtransfer.data import images
from jaxtransfer.data.entries import IMAGE_DTYPE, LABEL_DTYPE, RESERVED, Entry, type_in_batches
from jaxtransfer.errors import InputError, unknown

Names = str | Sequence[str] | Mapping[str, str] | None


class Asked(NamedTuple):
    """What a caller of `load` named: features that become columns.

    Attributes:
      image: the one that becomes `image`; by default the feature of that name, where there is one.
      label: the one that becomes `label`; or several, under their own names, or new names to theirs.
      columns: further ones, likewise.
      tokens: texts that are read apart.
    """

    image: str | None = None
    label: Names = None
    columns: Names = ()
    tokens: Names = ()

    @property
    def anything(self) -> bool:
        """Whether anything was named."""
        return self.image is not None or self.label is not None or bool(self.columns) or bool(self.tokens)

    def by_name(self) -> dict[str, str]:
        """Returns the named features by the names of the columns they become.

        Raises:
          InputError: for what are no names, and a name that is reserved or comes twice.
        """
        label = {"label": self.label} if isinstance(self.label, str) else renamed(self.label, "label")
        columns = renamed([self.columns] if isinstance(self.columns, str) else self.columns, "columns")
        image = {} if self.image is None else {"image": self.image}
        for name in [*image, *label, *columns]:
            if [*image, *label, *columns].count(name) > 1:
                raise InputError(
                    f"two columns can't both be called {name!r}; rename one: columns={{'new name': 'old'}}"
                )
            if name == RESERVED:
                raise InputError(f"a column can't be called {name!r}, by which batches tell examples from padding")
        return {**image, **label, **columns}


USUAL = Asked()
"""Images with a label each."""


class Chosen(NamedTuple):
    """What was chosen of a data set's features.

    Attributes:
      features: the feature that each column is, by the column's name.
      entries: what is known of the columns.
      of_image: those with a value per pixel of the image.
      pictures: the features that are stored as image files, chosen or not.
      flat: the columns that are such pictures of classes, [H, W] without the one channel that is stored.
    """

    features: dict[str, str]
    entries: dict[str, Entry]
    of_image: frozenset[str]
    pictures: tuple[str, ...]
    flat: frozenset[str] = frozenset()


def choose(name: str, features: Any, asked: Asked, image_shape: Sequence[int] | None = None) -> Chosen:
    """Chooses columns from a data set's features.

    Args:
      name: of the data set, for messages.
      features: the builder's `info.features`.
      asked: what the caller named; nothing asks for images with a label each.
      image_shape: (H, W, C) to which images, and what lies on their pixels, are brought; None keeps them.

    Raises:
      InputError: for a feature that isn't there, a text, one of several shapes, such as boxes, and for images of
        varying size without `image_shape`.
    """
    known = dict(features.items()) if hasattr(features, "items") else {}
    wanted = asked.by_name()
    if not asked.anything:
        image_and_classes(name, features)  # raises
        wanted = {"image": "image", "label": "label"}
    if asked.image is None and "image" in known and "image" not in wanted:
        wanted = {"image": "image", **wanted}
    if asked.label is None and _class_names(known.get("label")) and "label" not in wanted:
        wanted["label"] = "label"
    entries, of_image = {}, set()
    for column, feature in wanted.items():
        if feature not in known:
            raise unknown(f"feature of {name}", feature, known)
        if column == "image":
            entries[column] = _image_entry(name, feature, known[feature], image_shape)
            continue
        entries[column] = _entry(name, feature, known[feature])
    if image_shape is not None and "image" not in entries:
        raise InputError(f"{name}: image_shape= is of images, and none is loaded; leave it out")
    for column, feature in wanted.items():
        stored = tuple(known[feature].shape[:2])
        if column == "image" or "image" not in entries or not is_picture(known[feature]):
            continue
        if stored == tuple(known[wanted["image"]].shape[:2]):
            of_image.add(column)
            shape = (*entries["image"].shape[:2], *entries[column].shape[2:])
            entries[column] = replace(entries[column], shape=shape)
    for column, entry in entries.items():
        if None in entry.shape:
            raise InputError(
                f"{name}: the shape of {wanted[column]!r}, {entry.shape}, varies, and batches need one; name others of "
                f"its features: {', '.join(sorted(known))}"
            )
    pictures = tuple(feature for feature, kind in known.items() if is_picture(kind))
    flat = frozenset(name for name, feature in wanted.items() if len(entries[name].shape) < len(_shape(known[feature])))
    return Chosen(wanted, entries, frozenset(of_image), pictures, flat)


def image_and_classes(name: str, features: Any) -> tuple[tuple, tuple[str, ...]]:
    """Checks that a data set has images and class labels, under these names.

    Args:
      name: for messages.
      features: the builder's `info.features`.

    Returns:
      The image shape, None where sizes vary, and the class names.

    Raises:
      InputError: without a uint8 feature `image` or a class-label feature `label`.
    """
    names = sorted(features.keys()) if hasattr(features, "keys") else []
    known = ", ".join(names) or repr(features)
    image = features["image"] if "image" in names else None
    if image is None or len(image.shape) != 3 or image.np_dtype != np.uint8:
        raise InputError(
            f"{name} has no uint8 feature 'image' [H, W, C]; its features: {known}. Name those to load: "
            f"jt.data.load(..., image=..., label=..., columns=(...))"
        )
    label = features["label"] if "label" in names else None
    if label is None or not _class_names(label):
        raise InputError(
            f"{name} has no class-label feature 'label'; its features: {known}. Name those to load: "
            f"jt.data.load(..., label=...), of several a tuple, or columns=(...)"
        )
    if tuple(label.shape) != ():
        raise InputError(
            f"{name} has several labels per image, feature 'label' is of shape {tuple(label.shape)}; expected one "
            "class per image, or name it as a column: jt.data.load(..., columns=('label',))"
        )
    return tuple(image.shape), tuple(label.names)


def renamed(names: Names, what: str) -> dict[str, str]:
    """Returns names as a mapping, new to old; those of a list stay.

    Raises:
      InputError: for what are none; `what` is the argument.
    """
    if names is None:
        return {}
    found: dict[str, Any] = {}
    if isinstance(names, Mapping):
        found = dict(names)
    elif isinstance(names, list | tuple):
        found = {name: name for name in names if isinstance(name, str)}
        if len(found) < len(names):
            raise InputError(f"{what}= names each feature once, by texts; got {names!r:.100}")
    else:
        found = {what: names}
    if not all(isinstance(name, str) and name for pair in found.items() for name in pair):
        raise InputError(f"{what}= takes a name, names, or {{'new name': 'name'}}; got {names!r:.100}")
    return found


def _image_entry(name: str, feature: str, kind: Any, image_shape: Sequence[int] | None) -> Entry:
    shape = tuple(kind.shape) if not isinstance(kind.shape, dict) else ()
    if len(shape) != 3 or kind.np_dtype != np.uint8:
        raise InputError(f"{name}: {feature!r} is no uint8 image [H, W, C]; load it under another name by columns=")
    if image_shape is not None:
        shape = images.check_shape(image_shape)
    elif None in shape:
        raise InputError(f"{name} has images of varying size; pass image_shape=(height, width, channels)")
    return Entry(shape, IMAGE_DTYPE)


def _entry(name: str, feature: str, kind: Any) -> Entry:
    shape, dtype = kind.shape, kind.np_dtype
    if isinstance(shape, dict) or isinstance(dtype, dict):
        raise InputError(
            f"{name}: {feature!r} has {', '.join(shape)} of varying length for each example, boxes say, and batches "
            "need one shape; name others of its features, or read it by tfds and pad it: Dataset.from_columns(...)"
        )
    if np.dtype(dtype).kind in "OSU":
        words = "leave it out" if tuple(shape) else f"as words of a vocabulary: tokens={feature!r}"
        raise InputError(f"{name}: {feature!r} is text, and batches are of numbers; {words}")
    names = _class_names(kind)
    if names and is_picture(kind):
        return Entry(tuple(shape[:2]) if shape[2:] == (1,) else tuple(shape), np.dtype(dtype), names)
    if names:
        return Entry(tuple(shape), LABEL_DTYPE, names)
    return Entry(tuple(shape), type_in_batches(np.dtype(dtype)))


def _class_names(kind: Any) -> tuple[str, ...]:
    kind = getattr(kind, "feature", kind)  # of a sequence
    return tuple(kind.names) if getattr(kind, "num_classes", None) else ()


def _shape(kind: Any) -> tuple[int | None, ...]:
    return () if isinstance(kind.shape, dict) else tuple(kind.shape)


def is_picture(kind: Any) -> bool:
    """Whether a feature is stored as image files."""
    from tensorflow_datasets.core.features import Image

    return isinstance(kind, Image)
