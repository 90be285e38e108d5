"""What embeddings must be for a measure."""

import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.representation.embedding import Embedded


def check_embedded(train: Embedded, test: Embedded) -> None:
    """Raises InputError for what is no pair of embeddings with labels, of one dimension."""
    for name, one in (("train", train), ("test", test)):
        if np.ndim(one.features) != 2 or not np.issubdtype(np.asarray(one.features).dtype, np.number):
            kind = np.asarray(one.features)
            raise InputError(f"{name}: expected embeddings, numbers [N, D]; got {kind.dtype} {list(kind.shape)}")
        if len(one.labels) != len(one.features) or not len(one.features):
            raise InputError(
                f"{name}: expected a label for each embedding; got {len(one.labels)} and {len(one.features)}"
            )
        kind = np.asarray(one.labels)
        if not np.issubdtype(kind.dtype, np.integer) or kind.min() < 0:
            raise InputError(f"{name}: labels are class numbers, integers of at least 0; got {kind.dtype} {kind[:3]}")
    if train.features.shape[1] != test.features.shape[1]:
        raise InputError(f"expected the same dimensions; got {train.features.shape[1]} and {test.features.shape[1]}")
