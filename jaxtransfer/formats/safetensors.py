"""Safetensors by NumPy alone: a length, a JSON header, and the values; every number that is read is checked."""

import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxtransfer.errors import InputError

MOST_HEADER = 100_000_000  # bytes, the format's own limit

_TYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
    **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "BOOL": np.bool_},
    **{f"{letter}{bits}": np.dtype(f"{letter.lower()}{bits // 8}") for letter in "IU" for bits in (8, 16, 32, 64)},
}


def read(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors by name of a file, mapped into memory and not read before they are used.

    Args:
      path: the file; see https://huggingface.co/docs/safetensors.

    Raises:
      InputError: where the file can't be read, is cut off, or is not what the format says.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:  # an empty file can't be mapped
        raise InputError(f"cannot read the weights {path}: {error}") from None
    header, start = _header(path, data)
    tensors, ends = {}, []
    for name, entry in header.items():
        kind, shape, (begin, end) = _entry(path, name, entry)
        if start + end > data.size:
            wanted = f"{name!r} ends at byte {start + end:,}, the file has {data.size:,}"
            raise InputError(f"the weights {path} are cut off: {wanted}; fetch them again")
        ends.append((begin, end, name))
        tensors[name] = data[start + begin : start + end].view(kind).reshape(shape)
    ends.sort()
    for (_, end, one), (begin, _, other) in itertools.pairwise(ends):
        if begin < end:
            raise InputError(f"the weights {path} are damaged: {one!r} and {other!r} share bytes")
    return tensors


def metadata(path: Path) -> dict[str, str]:
    """Returns what a file says of itself, names and values; empty where it says nothing.

    Args:
      path: the file.
    """
    found = _whole_header(path, np.memmap(path, np.uint8, "r"))[0].get("__metadata__")
    return found if isinstance(found, dict) else {}


def is_one(start: bytes) -> bool:
    """Whether a file may be of this format.

    Args:
      start: its first bytes, 9 at least.
    """
    return len(start) >= 9 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MOST_HEADER


def _header(path: Path, data: np.ndarray) -> tuple[dict[str, Any], int]:
    header, start = _whole_header(path, data)
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, start


def _whole_header(path: Path, data: np.ndarray) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(data[:8].tobytes(), "little")
    if data.size < 8 or length > min(MOST_HEADER, data.size - 8):
        raise InputError(f"the weights {path} are cut off within their header, or no safetensors; fetch them again")
    try:
        header = json.loads(data[8 : 8 + length].tobytes(), object_pairs_hook=_once)
        if not isinstance(header, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise InputError(f"the weights {path} are damaged: their header is no JSON ({error})") from None
    return header, 8 + length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in it")
    return found


def _entry(path: Path, name: str, entry: Any) -> tuple[Any, tuple[int, ...], tuple[int, int]]:
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        if any(type(number) is not int or number < 0 for number in numbers) or end < begin:
            raise ValueError(f"shape {shape}, bytes {begin} to {end}")
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"the weights {path} are damaged: {name!r} says {error} of itself") from None
    if not isinstance(kind, str) or kind not in _TYPES:
        raise InputError(f"{name!r} of the weights {path} is of type {kind!r}; known are {', '.join(_TYPES)}")
    size = math.prod(shape) * np.dtype(_TYPES[kind]).itemsize
    if size != end - begin:
        raise InputError(
            f"the weights {path} are damaged: {name!r} {kind} {shape} takes {size:,} bytes, they have {end - begin:,}"
        )
    return _TYPES[kind], tuple(shape), (begin, end)


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors by name as a file, whole or not at all.

    Args:
      path: of the file; one that is there is replaced.
      tensors: by name, of types that the format has.
      metadata: what the file says of itself, names and values.

    Raises:
      InputError: for a tensor of another type.
      OSError: where the file can't be written.
    """
    names = {np.dtype(kind): name for name, kind in _TYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # wider types first, so that each tensor begins at a multiple of its own width
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype.newbyteorder("=") not in names:
            raise InputError(
                f"{name!r} is of type {tensor.dtype}, which safetensors lack; they have {', '.join(_TYPES)}"
            )
        begin, end = end, end + tensor.nbytes
        kind = names[tensor.dtype.newbyteorder("=")]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                values = np.ascontiguousarray(tensors[name], tensors[name].dtype.newbyteorder("<"))
                file.write(values.reshape(-1).view(np.uint8).data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
