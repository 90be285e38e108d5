"""The tensors by name in what a checkpoint holds: under which key they are, and what wrappers put into names."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxtransfer.errors import InputError

_NESTS = ("state_dict", "model_state_dict", "model", "module", "net", "network")  # what scripts save weights under
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # torch.compile's, FSDP's
_COUNTERS = ("num_batches_tracked", "n_averaged", "_extra_state")  # of batches, of averaged weights; of quantisation


def tensors_in(found: Any, part: str | None = None) -> dict[str, np.ndarray]:
    """Returns the tensors by name of a checkpoint as arrays, names without wrappers.

    Counters of batches are left out, and what stands among the tensors and is none: an epoch, an accuracy.

    Args:
      found: a state dict, or a checkpoint with one under `state_dict`, `model` or the like, or the only one in it.
      part: the key of the one that is meant, where there are several: "teacher", "model_ema".

    Raises:
      InputError: where nothing tells which state dict is meant.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in state_dict(found, part).items():
        if not _is_tensor(tensor):
            continue
        name = unwrapped(name)
        if name.endswith(_COUNTERS):
            continue
        if name in tensors:
            raise InputError(
                f"two tensors of the weights are {name!r} once their wrappers are taken off; leave one out"
            )
        tensors[name] = as_array(name, tensor)
    return tensors


def state_dict(found: Any, part: str | None = None) -> Mapping[str, Any]:
    """Returns the tensors by name that a checkpoint holds, under a usual key or the only such dict in it.

    Args:
      found: what is in a file.
      part: the key of the one that is meant.

    Raises:
      InputError: where it holds none or several.
    """
    if part is not None:
        if not isinstance(found, Mapping) or not isinstance(found.get(part), Mapping):
            keys = [key for key in found if isinstance(found[key], Mapping)] if isinstance(found, Mapping) else []
            raise InputError(
                f"the weights have no part {part!r}; it may be one of {', '.join(map(str, keys)) or 'none'}"
            )
        found = found[part]
    if not isinstance(found, Mapping):
        raise InputError(f"expected weights by name, a state dict; got {type(found).__name__}")
    inner = {key: value for key, value in found.items() if isinstance(value, Mapping) and value}
    nests = [key for key in _NESTS if key in inner][:1] or [key for key in inner if _holds_tensors(inner[key])]
    loose = any("." in str(name) and _is_tensor(value) for name, value in found.items())  # an accuracy is no network
    if len(nests) == 1 and (nests[0] in _NESTS or not loose):
        return state_dict(inner[nests[0]])
    if not nests and any(map(_is_tensor, found.values())):
        return found
    which = f"{len(nests) + loose} ({', '.join(map(str, nests[:5]))})" if nests else "none"
    remedy = f"part={nests[0]!r} takes that" if nests else "pass the one that is meant"
    raise InputError(f"expected one state dict in the weights, found {which}; {remedy}")


def no_tensors(found: Any, part: str | None = None) -> tuple[str, ...]:
    """Returns the names of what stands among the tensors of a state dict and is none.

    Args:
      found: what is in a file.
      part: the key of the state dict that is meant.
    """
    names = [str(name) for name, value in state_dict(found, part).items() if not _is_tensor(value)]
    return tuple(name for name in names if not name.endswith(_COUNTERS))


def passed_over(found: Any) -> str:
    """Returns a note of the state dicts that `state_dict` leaves for another: averaged weights, say; "" where none is.

    Args:
      found: what is in a file.
    """
    if not isinstance(found, Mapping):
        return ""
    inner = {key: value for key, value in found.items() if isinstance(value, Mapping) and value}
    taken = next((key for key in _NESTS if key in inner), None)
    if taken is None:
        return ""
    others = [str(key) for key in inner if key != taken and _is_state_dict(inner[key])]
    if not others:
        return passed_over(inner[taken])
    return f"of its state dicts {taken!r} was taken; there is {', '.join(others)}, too: part={others[0]!r} takes that"


def unwrapped(name: Any) -> str:
    """Returns the name of a tensor without what `torch.compile` and parallel wrappers put into it.

    Args:
      name: "module._orig_mod.fc.weight", say.
    """
    if not isinstance(name, str):
        raise InputError(f"expected the weights by name, got a tensor under {name!r}")
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def as_array(name: str, tensor: Any) -> np.ndarray:
    """Returns a tensor or array as NumPy's, bfloat16 as that of `ml_dtypes`, and of other types that it lacks float32.

    Args:
      name: of the tensor, for errors.
      tensor: PyTorch's, on any device, or an array.
    """
    try:
        if not hasattr(tensor, "detach"):
            return np.asarray(tensor)
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        try:
            return tensor.numpy()
        except TypeError:  # bfloat16 and narrower
            if str(tensor.dtype) == "torch.bfloat16":
                import torch  # pyright: ignore[reportMissingImports]

                return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return tensor.float().numpy()
    except Exception as error:  # of sparse tensors, of tensors without data
        reason = str(error).partition("\n")[0]
        raise InputError(f"the tensor {name!r} of the weights has no plain values: {reason}") from error


def _is_state_dict(value: Mapping[str, Any]) -> bool:
    within = [value[key] for key in _NESTS if isinstance(value.get(key), Mapping)]
    return _holds_tensors(value) or any(map(_is_state_dict, within))


def _holds_tensors(value: Mapping[str, Any]) -> bool:
    return all(isinstance(name, str) and _is_tensor(inner) for name, inner in value.items())


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")
