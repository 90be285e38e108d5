"""What images became before a network saw them in training: what its weights expect."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.resizing import Resizing


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How images are prepared: resized, cropped in the middle, divided by 255, less `mean`, over `std`.

    Attributes:
      size: (H, W) of what the network sees; None where it isn't known.
      crop: the share of the resized image that the crop keeps: the shorter side becomes H / crop, and the middle is cut
        out; None where images are stretched to `size` instead.
      mean: of images in [0, 1], per channel; None where it isn't known.
      std: likewise.
      interpolation: "bilinear" or "bicubic", Pillow's, which widen as an image shrinks, or "area".
    """

    size: tuple[int, int] | None = None
    crop: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str = "bilinear"

    @property
    def resizing(self) -> Resizing:
        """How images are brought to the size: `jt.data.load(..., like=preprocessing)` asks for it."""
        return Resizing(self.crop, self.interpolation)

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(H, W, C) of what the network sees, C as many as there are means; None where the size isn't known."""
        return None if self.size is None else (*self.size, len(self.mean or (0, 0, 0)))

    def images(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Returns images as the network wants them but for mean and std, uint8 [B, H, W, C].

        Args:
          images: uint8 [h, w, C] each, of any sizes.

        Raises:
          InputError: where the size isn't known, and for what is no image.
        """
        if self.size is None:
            raise InputError("these weights don't say which size of images they expect; resize them yourself")
        return np.stack([self._prepared(np.asarray(image)) for image in images])

    def as_entries(self) -> dict[str, Any]:
        """Returns it as plain data, for a configuration; `from_entries` reads it again."""
        plain = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any]) -> "Preprocessing":
        """Returns what `as_entries` wrote down.

        Args:
          entries: by name; what is left out is as by default.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if extra := entries.keys() - known:
            raise InputError(f"preprocessing has no {sorted(extra)[0]!r}; it has {', '.join(sorted(known))}")
        plain: dict[str, Any] = {}
        for name, value in entries.items():
            plain[name] = tuple(value) if isinstance(value, list) else value
        return cls(**plain)

    def _prepared(self, image: np.ndarray) -> np.ndarray:
        if image.ndim != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise InputError(f"expected images of type uint8 [H, W, C]; got {image.dtype} {image.shape}")
        assert self.size is not None
        return self.resizing(image, self.size)


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET = Preprocessing((224, 224), 0.875, IMAGENET_MEAN, IMAGENET_STD)
