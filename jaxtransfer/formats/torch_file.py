"""What `torch.save` writes, read without running a file's code."""

import argparse
import collections
import datetime
import re
import types
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from jaxtransfer.errors import InputError

_PATHS = (type(Path()), PurePosixPath, PureWindowsPath)  # Python 3.13 says that they are of `pathlib._local`


def read(path: Path) -> Any:
    """Returns what a file holds: tensors, containers and what scripts save beside them.

    Args:
      path: a file of the zip format, or of the pickle format from before PyTorch 1.6.

    Raises:
      InputError: where PyTorch is missing, the file can't be read, or holds objects other than harmless data.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(f"reading {path} needs PyTorch: pip install 'jaxtransfer[torch]'") from None
    try:
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling and file systems raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        if reason.startswith("Weights only load failed"):
            named = re.search(r"GLOBAL ([\w.]{1,80}) was not an allowed", str(error))
            which = f" ({named[1]})" if named else ""
            reason = (
                f"it holds Python objects besides tensors{which}, which would run code of the file, or is damaged; "
                f"where you trust it, load it yourself and pass the network's state_dict()"
            )
        elif "TorchScript" in reason:
            reason = "it is a TorchScript program; load it by torch.jit.load and pass its state_dict()"
        raise InputError(f"cannot read the weights {path}: {reason}") from error


def _harmless() -> list[Any]:
    """Returns the types of data that scripts save beside tensors; none of them does anything when it is made."""
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    cores = [f"numpy.{core}.multiarray" for core in ("core", "_core")]  # of NumPy 1 and 2
    kinds = (*(f"{letter}{width}" for letter in "iu" for width in (1, 2, 4, 8)), "f2", "f4", "f8", "?")
    return [
        argparse.Namespace,  # torchvision's and many other scripts save their options
        types.SimpleNamespace,
        frozenset,
        slice,
        collections.defaultdict,
        *(datetime.date, datetime.datetime, datetime.timedelta, datetime.timezone),
        *((path, f"{module}.{path.__name__}") for path in _PATHS for module in ("pathlib", "pathlib._local")),
        np.dtype,
        np.ndarray,  # of numbers: means, states of NumPy's generators, networks turned into arrays
        *(type(np.dtype(kind)) for kind in kinds),
        *((scalar, f"{core}.scalar") for core in cores),
        *((array, f"{core}._reconstruct") for core in cores),
    ]
