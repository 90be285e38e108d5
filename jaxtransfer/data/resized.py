"""Images of a data set brought to one shape as they are read, or left as their files have them."""

from typing import Any

import numpy as np

from jaxtransfer.data.entries import Entry
from jaxtransfer.data.labels import example_numbers
from jaxtransfer.errors import InputError
from jaxtransfer.resizing import STRETCH, fit, fit_mask, with_channels


class Resized:
    """How a data set reads images of other sizes than its own; the part of `Dataset` that asks for its `resizing`."""

    def read_uncut(self: Any, indices) -> dict[str, Any]:
        """Reads several examples as `read`, but leaves each image in the size of its file, for what cuts parts out.

        Args:
          indices: integers [n] in [0, N), repeats allowed.

        Returns:
          The columns by name; `image` is a list of uint8 [h, w, C], C as in `image_shape`. Where the data set doesn't
          resize, or is decoded, it is what `read` gives.
        """
        if self.in_memory or not self.resize or "image" not in self.sourced_entries:
            return self.read(indices)
        indices = example_numbers(indices, "read_uncut")
        rows, channels = indices if self.rows is None else self.rows[indices], self.image_shape[2]
        known = {name: entry for name, entry in self.sourced_entries.items() if name != "image"}
        whole, found = [], {name: np.empty((len(indices), *entry.shape), entry.dtype) for name, entry in known.items()}
        for position, (index, example) in enumerate(zip(indices, self.source.many(rows), strict=True)):
            whole.append(with_channels(example["image"], channels))
            for name, value in self._checked(int(index), example, known).items():
                found[name][position] = value
        return {"image": whole, **found} | {name: column[indices] for name, column in self.columns.items()}

    @property
    def _cuts(self: Any) -> bool:
        """Whether images that have the wanted shape are resized nevertheless, as a part of each is cut off."""
        return self.resize and self.resizing is not None and self.resizing.crop is not None

    def _on_image(self: Any, name: str, entry: Entry) -> bool:
        """Whether a column is the image, or has a value for each of its pixels."""
        if name == "image":
            return True
        return name in self.of_image and "image" in self.entries and entry.shape[:2] == self.image_shape[:2]

    def _resized(self: Any, name: str, value: Any, entry: Entry, index: int) -> np.ndarray:
        if self.resize and self._on_image(name, entry):
            shape, how = self.image_shape, self.resizing or STRETCH
            return fit(value, shape, how) if name == "image" else fit_mask(value, entry.shape, how)
        what, remedy = f"a value of {name!r}", "mend the data or leave the column out"
        if name == "image":
            what, remedy = "an image", "pass image_shape=(height, width, channels) to resize all"
        raise InputError(
            f"{self.title}: example {index} has {what} of shape {np.shape(value)}, expected {entry.shape}; {remedy}"
        )
