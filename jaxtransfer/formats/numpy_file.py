"""NumPy's archives of arrays, `.npz`."""

import zipfile
from pathlib import Path

import numpy as np

from jaxtransfer.errors import InputError


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an archive by name.

    Args:
      path: what `np.savez` wrote; objects in it are refused, since reading them would run code.

    Raises:
      InputError: where it can't be read.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:  # `np.load(path)` leaks on errors
            return {name: found[name] for name in found.files}
    except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read the weights {path}: {str(error).partition(chr(10))[0]}") from None
