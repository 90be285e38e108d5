"""Which base a delta belongs to: a digest of its parameters."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxtransfer import tree
from jaxtransfer.errors import InputError


def digest(base: Mapping[str, Any]) -> str:
    """Returns 32 hexadecimal digits that tell the parameters of a base from others: every bit, path and type counts.

    Args:
      base: variables `{"params": ..., **state}`; the running state does not count.
    """
    if not isinstance(base, Mapping) or "params" not in base:
        came = sorted(base) if isinstance(base, Mapping) else f"a {type(base).__name__}"
        raise InputError(f"a digest is of variables {{'params': ..., **state}}; got {came}")
    found = hashlib.blake2b(digest_size=16)
    for path, leaf in sorted(tree.leaves_by_path(base["params"]).items()):
        array = np.ascontiguousarray(jax.device_get(leaf))
        found.update(f"{path}:{array.dtype.name}{list(array.shape)};".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def check_base(base: Mapping[str, Any], expected: str | None) -> None:
    """Raises InputError where a base has another digest than a delta names; None names none."""
    if expected is not None and (found := digest(base)) != expected:
        raise InputError(
            f"this delta belongs to the base {expected}, got the base {found}: a delta on other weights is another "
            f"function. Give the base that it was trained on"
        )
