"""A file or folder of weights, of whichever format: it is told by its bytes, not by its name."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.formats import numpy_file, onnx_file, safetensors, torch_file
from jaxtransfer.formats.checkpoint import tensors_in

SINGLE = ("model.safetensors", "pytorch_model.bin")
_OTHERS = {  # what lies in place of weights where fetching them went wrong
    b"version https://": "it is a pointer of Git LFS to them; fetch them by git lfs pull",
    b"<": "it is a page of the web; fetch the file itself",
    b"\x1f\x8b": "it is compressed by gzip; unpack it",
}
_SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt", ".npz", ".onnx")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def read_tensors(path: str | Path, part: str | None = None) -> dict[str, np.ndarray]:
    """Returns the tensors by name of a file of weights, or of a folder with one.

    Wrappers (`module.`, `_orig_mod.`) are taken off the names; counters of batches are left out.

    Args:
      path: a file of `torch.save`, safetensors, an index of several of these, `.npz`, ONNX; or a folder that has
        `model.safetensors` or `pytorch_model.bin`, in one piece or several.
      part: the key of the state dict that is meant, where a checkpoint holds several.

    Raises:
      InputError: where nothing is there, or it can't be read.
    """
    return tensors_in(read_file(path), part)


def read_file(path: str | Path) -> Any:
    """Returns what a file of weights holds, or a folder with one, as it is: a state dict, or a checkpoint around some.

    Args:
      path: as for `read_tensors`.

    Raises:
      InputError: where nothing is there, or it can't be read.
    """
    path = file_of(Path(path))
    if path.suffix == ".json":
        return _pieces(path)
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise InputError(f"cannot read the weights {path}: {error.strerror}") from None
    if other := next((what for sign, what in _OTHERS.items() if start.startswith(sign)), None):
        raise InputError(f"cannot read the weights {path}: {other}")
    if safetensors.is_one(start) or path.suffix == ".safetensors":
        return safetensors.read(path)
    if path.suffix == ".onnx":
        return onnx_file.read(path)
    if path.suffix == ".npz" or _is_npz(path):
        return numpy_file.read(path)
    return torch_file.read(path)


def file_of(path: Path) -> Path:
    """Returns the file of weights in a folder, or the path itself where it is no folder.

    Args:
      path: the file or the folder.
    """
    if not path.is_dir():
        return path
    for name in (*SINGLE[:1], *INDICES[:1], *SINGLE[1:], *INDICES[1:]):
        if (path / name).is_file():
            return path / name
    others = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in _SUFFIXES)
    safe = [file for file in others if file.suffix == ".safetensors"]
    for alone in (safe, others):
        if len(alone) == 1:
            return alone[0]
    if others:
        names = ", ".join(file.name for file in others[:5])
        raise InputError(f"the folder {path} has {len(others)} files of weights, {names}; pass the one that is meant")
    raise InputError(f"the folder {path} has no weights: expected {', '.join(SINGLE)}, or config.json of a run")


def _pieces(index: Path) -> dict[str, np.ndarray]:
    """Returns the tensors that an index names, each from its file beside it."""
    try:
        places = json.loads(index.read_text())["weight_map"]
        names = {str(name): str(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"cannot read the index of weights {index}: {error!r}") from None
    if outside := next((file for file in names.values() if Path(file).name != file), None):
        raise InputError(f"the index of weights {index} names a file that is not beside it: {outside!r}")
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(set(names.values())):
        found = read_tensors(index.parent / file)
        wanted = [name for name, place in names.items() if place == file]
        if missing := [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]:
            raise InputError(f"{index.parent / file} lacks {missing[0]!r}, which its index promises; fetch it again")
        tensors |= {name: found[name] for name in wanted if name in found}
    return tensors


def _is_npz(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)
