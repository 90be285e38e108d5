"""What can be loaded here."""

from typing import NamedTuple

from jaxtransfer.data import cache, digits, features, prepared
from jaxtransfer.data.builders import builder_of, reason_of
from jaxtransfer.errors import InputError


class Entry(NamedTuple):
    """A data set that `load` takes.

    Attributes:
      name: the name to load it by.
      splits: names of its splits.
      sizes: number of examples in each split.
      classes: number of classes; None when it can't be read.
      image_shape: (H, W, C), None where sizes vary; None when it can't be read.
      prepared: whether it lies on disk; the digits are prepared when they are first loaded.
      note: why it can't be loaded; empty when it can.
    """

    name: str
    splits: tuple[str, ...]
    sizes: tuple[int, ...]
    classes: int | None
    image_shape: tuple | None
    prepared: bool
    note: str = ""


def available(data_dir=None) -> list[Entry]:
    """Lists the embedded digits and the prepared tfds data sets.

    Args:
      data_dir: the tfds folder; by default `$TFDS_DATA_DIR`, else tfds' own. Our cache is listed too.

    Returns:
      One entry per data set; one that can't be read says so in its `note`.
    """
    splits, sizes = tuple(digits.SPLITS), tuple(digits.SPLITS.values())
    entries = {
        f"digits/{config}": Entry(f"digits/{config}", splits, sizes, 10, (8, 8, 1), digits.is_prepared(config))
        for config in digits.CONFIGS
    }
    for root in cache.data_dirs(data_dir):
        for name, folder in prepared.prepared_sets(root).items():
            if name not in entries:
                entries[name] = _entry(name, folder)
    return list(entries.values())


def _entry(name, folder):
    splits, sizes = (), ()
    try:
        info = builder_of(folder).info
        splits, sizes = tuple(info.splits), tuple(split.num_examples for split in info.splits.values())
        image_shape, class_names = features.image_and_classes(name, info.features)
        form = info.file_format.value if info.file_format else "unknown"
        note = "" if form in ("array_record", "parquet") else f"stored as {form}: needs jaxtransfer[tensorflow]"
        return Entry(name, splits, sizes, len(class_names), image_shape, True, note)
    except InputError as error:
        return Entry(name, splits, sizes, None, None, True, str(error))
    except Exception as error:  # whatever damaged metadata makes tfds raise
        return Entry(name, splits, sizes, None, None, True, f"cannot be read: {reason_of(error)}")
