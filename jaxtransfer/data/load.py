"""Names become data sets: the embedded digits, folders of image files, and all that tfds can name."""

import importlib.util
import re
from dataclasses import replace
from typing import Any

import numpy as np

from jaxtransfer.data import cache, folder, images, prepared
from jaxtransfer.data.alike import is_of_a_table
from jaxtransfer.data.builders import builder_of, check_all_features, reason_of
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.features import Asked, Names, choose
from jaxtransfer.data.quiet import quiet_tfds
from jaxtransfer.data.sources import ArraySource, ListSource
from jaxtransfer.data.tfds_texts import OPTIONS, with_tokens
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.resizing import STRETCH, Resizing


def load(
    name: str,
    split: str,
    *,
    data_dir=None,
    image_shape=None,
    resizing: Resizing | None = None,
    like: Any = None,
    image: str | None = None,
    label: Names = None,
    columns: Names = (),
    **table: Any,
) -> Dataset:
    """Loads a split of a data set.

    Of a tfds data set, `image`, `label` and `columns` name the features to load; without them, and of the others, it is
    images with a class each. Several labels go under their own names, or under those of a mapping, new to old:

        load("cifar100", "train", label="coarse_label")
        load("cmu_faces", "train", label=("person", "pose"))  # batch["person"], batch["pose"]
        load("camvid", "train", columns={"ground": "segmentation"})  # batch["image"], batch["ground"]

    Numbers and classes of any one shape can be columns, and classes of pixels, which are brought to `image_shape` with
    the image, each pixel as the nearest one. What varies in length, such as boxes, and texts are refused.

    Of a table, "table:PATH" (CSV, TSV, Parquet; by pandas, the extra `tables`), the columns that nothing is said of
    make `features`, and `tokens` makes tokens of sentences; see `jt.data.from_frame`, whose arguments it takes, and
    which says what becomes of missing values. `split_by` names the column whose values are the splits, and `train` the
    split whose rows statistics and words are taken from:

        load("table:heart.csv", "london", label="ill", split_by="hospital", train="berlin", drop=("id",))
        load("table:reviews.tsv", "test", label="stars", tokens="text")

    Args:
      name: "digits/upright" (also rotated, inverted, noisy; ours, without a network), "folder:PATH" (image
        files in class folders), "table:PATH", or a name of tfds: "cifar10", "omniglot:3.0.0", or whatever lies
        prepared in the folder.
      split: "train", "test", ...; slices as in tfds: "train[:100]", "train[10%:]". A table without a column that
        tells splits has "train", "test" (a fifth, by a hash of the rows) and "all".
      data_dir: folder of the prepared tfds data sets; by default `$TFDS_DATA_DIR`, else tfds' own. What we
        prepare goes to our cache instead.
      image_shape: (H, W, C) to which all images are resized and converted between grey and RGB, so that a
        model of one data set takes the images of another.
      resizing: how they are resized, `jt.data.Resizing(crop=0.875, interpolation="bicubic")`: with its aspect ratio
        kept and the middle cut out. None stretches those of another shape.
      like: a run (`jt.load_run`) or what weights expect (`jt.load_pretrained(...).preprocessing`), whose images these
        become: it says `image_shape` and `resizing`. For a table, a run on one, or a data set of one: its columns,
        statistics, categories, class names and words.
      image: the feature that becomes `image`; by default the one of that name, if there is one.
      label: the feature that becomes `label`, a class or a number; or several features.
      columns: further features; their names, or new names to theirs.
      **table: of a table: `tokens`, `features`, `drop`, `categorical`, `numeric`, `length`, `words`, `tokenizer`,
        `fill` as for `jt.data.from_frame`; `split_by` and `train`. Of a tfds set `tokens`, `length`, `words`,
        `tokenizer` and `train` for texts.

    Returns:
      The data set: `image` uint8 [H, W, C] and `label` int per example, or what was named.

    Raises:
      InputError: for an unknown name or split, unusable features, or a data set that can't be prepared here.

    Example:
      >>> source = load("digits/upright", "train")
      >>> source[0]["image"].shape, source.classes
      ((8, 8, 1), 10)
    """
    if not isinstance(name, str) or not isinstance(split, str):
        raise InputError(f"load takes the names of the data and of a split, got {name!r:.100} and {split!r:.100}")
    if name.encode(errors="replace").decode() != name:
        raise InputError(
            f"the name of the data, {images.shown(name)}, is not UTF-8, so it can't be written to a configuration or a "
            "report; rename the folder, or lay a link to it"
        )
    if name.startswith("table:"):
        if image is not None or image_shape is not None or resizing is not None:
            raise InputError("a table has no images; leave image=, image_shape= and resizing= out")
        from jaxtransfer.data.tables import load_table

        return load_table(name.removeprefix("table:"), split, label=label, columns=columns, like=like, **table)
    image_shape, resizing = _prepared_like(like, image_shape, resizing)
    texts = {**OPTIONS, **table}
    if strange := sorted(texts.keys() - OPTIONS.keys()):
        raise InputError(f"{strange[0]}= is of tables, 'table:PATH', and {name!r} is none; leave it out")
    if table and not texts["tokens"]:
        raise InputError(f"{min(table)}= is of texts; name the feature that becomes tokens: tokens=")
    asked = Asked(image, label, columns, texts["tokens"])
    asked.by_name()  # raises
    if name.startswith("folder:"):
        if asked.anything:
            raise InputError(
                "a folder of images has a class for each and nothing else to name; leave image=, label= "
                "and columns= out"
            )
        return folder.load_folder(name.removeprefix("folder:"), split, image_shape, resizing)
    dataset = _load_tfds(name, split, image_shape, asked, texts, data_dir)
    return dataset if resizing is None else _resized_by(dataset, resizing)


def _prepared_like(like, image_shape, resizing):
    """The shape and the resizing that are asked for, or those of a run."""
    if like is not None:
        if image_shape is not None or resizing is not None:
            raise InputError("like= says the shape and the resizing of images; leave image_shape= and resizing= out")
        image_shape, resizing = getattr(like, "image_shape", None), getattr(like, "resizing", None)
        if image_shape is None and is_of_a_table(like):
            raise InputError(f"like= is of a table, so it says how a table becomes columns; got {like!r:.100}")
        if image_shape is None:
            raise InputError(
                f"like= is a run or a preprocessing that says which images it takes, got {like!r:.100}; pass "
                f"image_shape=(height, width, channels) instead"
            )
    if resizing is not None and not isinstance(resizing, Resizing):
        raise InputError(f"resizing= is a jt.data.Resizing, got {resizing!r:.100}; e.g. Resizing(crop=0.875)")
    if resizing is not None and image_shape is None:
        raise InputError("resizing= says how images are resized, and image_shape= to what; pass both")
    return image_shape, None if resizing == STRETCH else resizing


def _resized_by(dataset, resizing):
    """A data set that stretches its images, so that it resizes them otherwise."""
    if dataset.in_memory:
        raise InputError(
            f"{dataset.name} is not in array_record form, and is stretched as it is read; prepare it in that form, or "
            f"leave resizing= out"
        )
    return replace(dataset, resizing=resizing)


def _load_tfds(name, split, image_shape, asked, texts, data_dir):
    if name.partition("/")[0].partition(":")[0] == "digits":
        if asked.tokens:
            raise InputError("the digits have no texts; leave tokens= out")
        return _load_digits(name, split, image_shape, asked)
    for root in cache.data_dirs(data_dir):
        if found := prepared.find(name, root):
            return _open(_folder_builder(name, found), name, split, image_shape, asked, texts)
    with quiet_tfds():
        builder = _catalogue_builder(name, data_dir)
        if not builder.is_prepared() or not _random_access(builder):
            builder = _prepare(name, builder, data_dir)
        return _open(builder, name, split, image_shape, asked, texts)


def known_names(data_dir=None) -> list[str]:
    """The names that load without preparing anything by TensorFlow."""
    from jaxtransfer.data import digits

    found = {name for root in cache.data_dirs(data_dir) for name in prepared.prepared_sets(root)}
    return sorted(found | {f"digits/{config}" for config in digits.CONFIGS})


def _load_digits(name, split, image_shape, asked):
    from jaxtransfer.data import digits

    base, _, version = name.partition(":")
    config = base.partition("/")[2]
    if config not in digits.CONFIGS or version not in ("", digits.VERSION):
        raise unknown("data set", name, [f"digits/{config}" for config in digits.CONFIGS])
    prepared.check_split(name, split, digits.SPLITS)
    path = digits.prepare(config)
    return prepared.open_builder(_folder_builder(name, path), name, split, image_shape, asked)


def _folder_builder(name, path):
    """The tfds builder of prepared files, whether or not a catalogue knows them."""
    try:
        return builder_of(path)
    except InputError as error:
        raise InputError(f"cannot read {name}: {error}") from error


def _catalogue_builder(name, data_dir):
    """The tfds builder of a name that is not prepared in the usual place."""
    base = name.partition(":")[0].partition("/")[0]
    if re.fullmatch(r"\w[\w.+-]*", base):  # tfds looks there too, by rules of its own
        for root in cache.data_dirs(data_dir):
            check_all_features(root / base)
    with quiet_tfds() as tfds:
        from tensorflow_datasets.core.registered import DatasetNotFoundError

        try:
            return tfds.builder(name, data_dir=cache.data_dirs(data_dir)[0])
        except DatasetNotFoundError:
            raise unknown("data set", name, known_names(data_dir)) from None
        except Exception as error:  # a wrong config or version, a builder that needs another package
            raise InputError(
                f"tfds cannot make {name!r}: {reason_of(error)}; known here: {', '.join(known_names(data_dir))}"
            ) from error


def _random_access(builder):
    form = builder.info.file_format
    return form is not None and form.value in ("array_record", "parquet")


def _prepare(name, builder, data_dir):
    """Downloads into our cache, unless the set lies there in a form that only TensorFlow reads."""
    present = builder.is_prepared()
    if importlib.util.find_spec("tensorflow") is None:
        state = f"is not in array_record form in {builder.data_dir}" if present else "is not prepared"
        raise InputError(
            f"{name} {state}, which needs TensorFlow: pip install 'jaxtransfer[tensorflow]', or point "
            f"TFDS_DATA_DIR to a folder that has it in array_record form; known here: "
            f"{', '.join(known_names(data_dir))}"
        )
    if present:
        return builder
    with quiet_tfds() as tfds:
        target = cache.cache_dir() / "tfds"
        try:
            builder = tfds.builder(name, data_dir=target, file_format="array_record")
            builder.download_and_prepare(file_format="array_record")
        except Exception as error:  # network, disk, manual downloads
            raise InputError(f"cannot prepare {name} in {target}: {reason_of(error)}") from error
    return builder


def _open(builder, name, split, image_shape, asked, texts):
    if _random_access(builder):
        dataset = prepared.open_builder(builder, name, split, image_shape, asked)
        return with_tokens(dataset, builder, **texts) if asked.tokens else dataset
    if asked.tokens:
        raise InputError(f"{name} is not in array_record form, from which alone texts are read; prepare it in that")
    if importlib.util.find_spec("tensorflow") is None:
        _prepare(name, builder, None)  # raises with the remedy
    return _read_sequential(builder, name, split, image_shape, asked)


def _read_sequential(builder, name, split, image_shape, asked):
    """Reads a split without random access, such as TFRecord, into memory; needs TensorFlow."""
    chosen = choose(name, builder.info.features, asked, image_shape)
    prepared.check_split(name, split, builder.info.splits)
    with quiet_tfds() as tfds:
        examples = list(tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False)))
    if not examples:
        raise InputError(f"split {split!r} of {name} has no examples; its splits: {', '.join(builder.info.splits)}")
    read = [
        {name: example[key][..., 0] if name in chosen.flat else example[key] for name, key in chosen.features.items()}
        for example in examples
    ]
    options = {"entries": chosen.entries, "of_image": chosen.of_image, "resize": image_shape is not None}
    dataset = Dataset(name, split, source=ListSource(read), **options)
    arrays = dataset.sourced(np.arange(len(read)))
    return Dataset(name, split, source=ArraySource(arrays), entries=chosen.entries, of_image=chosen.of_image)
