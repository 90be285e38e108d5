"""Where the package keeps what it prepares."""

import os
from pathlib import Path

from jaxtransfer.files import expanded


def cache_dir() -> Path:
    """The folder of our own cache; it may not exist yet.

    `$JAXTRANSFER_CACHE`, else `$XDG_CACHE_HOME/jaxtransfer`, else `~/.cache/jaxtransfer`.
    """
    if own := os.environ.get("JAXTRANSFER_CACHE"):
        return expanded(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return expanded(xdg) / "jaxtransfer"
    return Path.home() / ".cache" / "jaxtransfer"


def data_dirs(data_dir=None) -> list[Path]:
    """The folders in which prepared tfds data sets are looked for, first one first.

    Args:
      data_dir: the caller's folder; by default `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.

    Returns:
      That folder and the `tfds` folder of our cache.
    """
    first = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return [expanded(first), cache_dir() / "tfds"]
