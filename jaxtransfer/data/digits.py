"""The embedded tfds data set: scikit-learn's handwritten digits in four domains, without a network."""

import errno
import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxtransfer.data.builders import builder_of, reason_of
from jaxtransfer.data.cache import cache_dir
from jaxtransfer.data.fingerprint import of_records
from jaxtransfer.data.quiet import quiet_tfds
from jaxtransfer.errors import InputError, unknown
from jaxtransfer.files import read_text

CONFIGS = {
    "upright": "The digits as they are.",
    "rotated": "The digits turned by 90 degrees, counter-clockwise.",
    "inverted": "The digits with black and white exchanged.",
    "noisy": "The digits under Gaussian noise (std a quarter of the range) and 5 % salt and pepper.",
}
VERSION = "1.0.0"
SPLITS = {"train": 1201, "test": 596}
_DIGEST = "digest.sha256"

with quiet_tfds() as tfds:

    class Digits(tfds.core.GeneratorBasedBuilder):
        """The 1,797 handwritten digits of UCI's optical recognition set as scikit-learn ships them.

        Images are uint8 [8, 8, 1] (the values 0 to 16 spread over 0 to 255). A third of each class, chosen by
        a fixed seed, is the split `test`. All configs split the same rows and store them in the same order,
        so that a pair of domains shares no test example with training.
        """

        VERSION = tfds.core.Version(VERSION)
        BUILDER_CONFIGS = [  # noqa: RUF012 (tfds reads a list)
            tfds.core.BuilderConfig(name=name, description=text) for name, text in CONFIGS.items()
        ]

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(8, 8, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
                "row": np.int64,
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description="Handwritten digits of 43 writers, as scikit-learn ships them.",
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                homepage="https://archive.ics.uci.edu/dataset/80",
                citation="E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998.",
            )

        def _split_generators(self, dl_manager):
            images, labels = _load()
            train, test = split_rows(labels)
            config = self.builder_config.name  # pyright: ignore[reportOptionalMemberAccess]
            return {
                "train": self._generate_examples(config, images, labels, train),
                "test": self._generate_examples(config, images, labels, test),
            }

        def _generate_examples(self, config, images, labels, rows):
            import cv2

            for row in rows:
                image = transform(config, images[row], int(row))
                png = io.BytesIO(cv2.imencode(".png", image)[1].tobytes())  # tfds would encode by TensorFlow
                yield int(row), {"image": png, "label": int(labels[row]), "row": int(row)}


def _load():
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return images, digits.target.astype(np.int64)


def split_rows(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows by a fixed seed: in each class a third, rounded down, is for the test.

    Args:
      labels: integers [N].

    Returns:
      The sorted rows of train and of test.
    """
    rng = np.random.default_rng(1797)
    test = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        test.append(members[: len(members) // 3])
    test = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), test), test


def transform(config: str, image: np.ndarray, row: int) -> np.ndarray:
    """Brings a digit into the domain `config`.

    Args:
      config: one of `CONFIGS`.
      image: uint8 [8, 8, 1].
      row: the number of the digit; it seeds the noise.

    Returns:
      uint8 [8, 8, 1].
    """
    if config == "rotated":
        return np.rot90(image).copy()
    if config == "inverted":
        return 255 - image
    if config == "noisy":
        rng = np.random.default_rng([1797, row])
        noisy = np.clip(image + rng.normal(0, 0.25 * 255, image.shape), 0, 255).astype(np.uint8)
        hit, salt = rng.random(image.shape) < 0.05, rng.random(image.shape) < 0.5
        return np.where(hit, np.where(salt, 255, 0), noisy).astype(np.uint8)
    return image


def prepare(config: str) -> Path:
    """Writes a config to our cache in array_record form unless it is there.

    The files are written to a folder of this process and moved into place by one rename, so that no other
    process sees half of them; of several processes at once the first one's files stay.

    Args:
      config: one of `CONFIGS`.

    Returns:
      The folder of the prepared files.

    Raises:
      InputError: for an unknown config or a cache that cannot be written.
    """
    if config not in CONFIGS:
        raise unknown("config of digits", config, CONFIGS)
    parent = cache_dir() / "tfds" / "digits" / config
    final = parent / VERSION
    if is_prepared(config):
        return final
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".preparing-", dir=parent))
    except OSError as error:
        raise InputError(
            f"cannot write the cache {cache_dir()}: {error.strerror}; set JAXTRANSFER_CACHE to a writable folder"
        ) from error
    try:
        with quiet_tfds():
            builder = Digits(config=config, data_dir=scratch, file_format="array_record")
            builder.download_and_prepare()
        built = Path(builder.data_dir)
        (built / _DIGEST).write_text(_digest(built))
        if final.exists() and not is_prepared(config):  # broken: out of the way, then deleted
            os.rename(final, scratch / "broken")
        os.rename(built, final)
    except Exception as error:  # of a full disk the writer tells by types of its own
        if not is_prepared(config):  # else another process was first
            reason = full if (full := os.strerror(errno.ENOSPC)) in str(error) else reason_of(error)
            raise InputError(
                f"cannot prepare digits/{config} in {parent}: {reason}; free some space or mend the folder's rights, "
                "or set JAXTRANSFER_CACHE to another folder"
            ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


def is_prepared(config: str) -> bool:
    """Whether the cache holds all examples of a config, as they were written."""
    folder = cache_dir() / "tfds" / "digits" / config / VERSION
    if not (folder / "dataset_info.json").is_file():
        return False
    try:
        if (folder / _DIGEST).exists():
            return read_text(folder / _DIGEST) == _digest(folder)
        builder = builder_of(folder)  # of an earlier version, which wrote no digest
        with quiet_tfds():
            sources = {split: builder.as_data_source(split) for split in SPLITS}
            return all(len(sources[split].__getitems__(list(range(size)))) == size for split, size in SPLITS.items())
    except Exception:  # whatever the readers raise on damaged files
        return False


def _digest(folder: Path) -> str:
    """A digest of all that was written."""
    return of_records(sorted(path for path in folder.iterdir() if path.name != _DIGEST))
