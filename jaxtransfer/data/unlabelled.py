"""Images of which nobody has said what they show: a folder of files, and data sets without their labels."""

from pathlib import Path

from jaxtransfer.data import images
from jaxtransfer.data.dataset import Dataset
from jaxtransfer.data.folder import FolderSource
from jaxtransfer.errors import InputError
from jaxtransfer.files import expanded
from jaxtransfer.resizing import Resizing


def lies_flat(path) -> bool:
    """Whether a folder holds image files itself, in no class folder: what `load_unlabelled` is for."""
    root = expanded(path)
    return root.is_dir() and any(_is_image(file) for file in root.iterdir())


def load_unlabelled(path, image_shape=None, resizing: Resizing | None = None) -> Dataset:
    """Loads the image files of a folder and all below it, in the order of their paths, without labels.

    Args:
      path: the folder.
      image_shape: (H, W, C) to which images are resized; by default the shape of the first image, and images of other
        shapes are an error when read.
      resizing: how; None stretches them.

    Returns:
      The data set: a column `image`, RGB unless `image_shape` says another number of channels.

    Raises:
      InputError: for a folder without images, and a first image that does not decode.
    """
    root = expanded(path)
    files = sorted(file for file in root.rglob("*") if _is_image(file))
    if not files:
        raise InputError(f"no images in {images.shown(root)}; expected files that end in {', '.join(images.SUFFIXES)}")
    shape = None if image_shape is None else images.check_shape(image_shape)
    source = FolderSource(tuple((file, 0) for file in files), 4 if shape is not None and shape[2] == 4 else 3)
    shape = shape or source[0]["image"].shape
    resize = image_shape is not None
    return Dataset(f"folder:{path}", "all", None, shape, source, resize=resize, resizing=resizing)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in images.SUFFIXES and not file.name.startswith(".") and file.is_file()
