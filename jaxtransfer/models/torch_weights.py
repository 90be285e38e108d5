"""Weights of PyTorch's networks for ours: names and layouts translated, every tensor accounted for."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model

Rules = Sequence[tuple[str, str]]

_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}

_NESTS = ("state_dict", "model_state_dict", "model", "module", "net", "network")  # what scripts save weights under
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # torch.compile's, FSDP's
_COUNTERS = ("num_batches_tracked", "n_averaged")  # of batches, of averaged weights

CIFAR_RESNET: Rules = (  # the names of the widely used CIFAR-10 ResNets with option A shortcuts
    (r"conv1", "stem_conv"),
    (r"bn1", "stem_norm"),
    (r"layer(\d)\.(\d+)\.conv(\d)", r"stage\1_block{\2}/conv\3"),
    (r"layer(\d)\.(\d+)\.bn(\d)", r"stage\1_block{\2}/norm\3"),
    (r"linear", "head"),
)


def from_torch(model: Model, weights: str | Path | Mapping[str, Any], inputs: Any, *, rules: Rules) -> dict[str, Any]:
    """Returns the variables of `model` with the weights of a PyTorch network.

    Convolutions [O, I, H, W] become [H, W, I, O], linear layers [O, I] become [I, O]; batch norm's weight, bias and
    running statistics become scale, bias, mean and var. What wrappers put into names (`module.`, `_orig_mod.`) and
    counters of batches are dropped.

    Args:
      model: the network; it must have exactly the layers of the weights.
      weights: a file that `torch.load` reads, or what is in it: a state dict, tensors or arrays of any floating type
        by name, or a checkpoint with one under `state_dict`, `model` or the like. Files need PyTorch: `pip install
        'jaxtransfer[torch]'`; no code in them is run.
      inputs: a batch of inputs, or its shape (`jax.ShapeDtypeStruct`), to lay the variables out.
      rules: (pattern, replacement) pairs from the name of a PyTorch layer to the path of ours, the first one that
        matches all of the name counts; a number in braces is raised by one. `CIFAR_RESNET` is one such table.

    Returns:
      `{"params": ..., "batch_stats": ...}`, NumPy arrays in the model's types.

    Raises:
      InputError: for a file that can't be read or holds other objects than data, for one in which nothing tells which
        state dict is meant, and for tensors that are left over, missing or of another shape.
    """
    if not isinstance(weights, str | Path | Mapping):
        hint = "pass its state_dict()" if hasattr(weights, "state_dict") else "pass a file or a dict"
        raise InputError(f"expected weights by name, got {type(weights).__name__}; {hint}")
    found = weights if isinstance(weights, Mapping) else _read(Path(weights))
    given = {}
    for name, tensor in _state_dict(found).items():
        name = _unwrapped(name)
        if not name.endswith(_COUNTERS):
            path, value = _translated(name, _array(name, tensor), rules)
            if path in given:
                raise InputError(f"two tensors of the weights are {path!r}, one of them {name}; mend `rules`")
            given[path] = value
    wanted = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), inputs)
    leaves = tree.leaves_by_path(dict(wanted))
    missing, extra = sorted(leaves.keys() - given.keys()), sorted(given.keys() - leaves.keys())
    if missing or extra:
        which = f"lack {missing[0]!r}" if missing else f"have {extra[0]!r}, which the model lacks"
        raise InputError(
            f"the weights are not those of model {model.name!r}: they {which} ({len(missing)} missing, {len(extra)} "
            f"left over); choose the network that they were trained in"
        )
    for path, leaf in leaves.items():
        if given[path].shape != leaf.shape:
            raise InputError(f"{path}: the model has shape {leaf.shape}, the weights {given[path].shape}")
    return tree.nested({path: given[path].astype(leaf.dtype) for path, leaf in leaves.items()})


def _read(path: Path) -> Any:
    """Returns what a file holds: tensors, containers and what scripts save beside them, without running its code."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(f"reading {path} needs PyTorch: pip install 'jaxtransfer[torch]'") from None
    scalar = np.float64(0).__reduce__()[0]
    harmless = [
        argparse.Namespace,  # torchvision's and many other scripts save their options
        np.dtype,
        *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")),
        *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # of NumPy 1 and 2
    ]
    try:
        with torch.serialization.safe_globals(harmless):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling and file systems raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        if reason.startswith("Weights only load failed"):
            reason = (
                "it holds Python objects besides tensors, which would run code of the file, or is damaged; where you "
                "trust it, load it yourself and pass the network's state_dict()"
            )
        raise InputError(f"cannot read the weights {path}: {reason}") from error


def _state_dict(found: Any) -> Mapping[str, Any]:
    """Returns the tensors by name that a checkpoint holds, under a usual key or the only such dict in it."""
    if not isinstance(found, Mapping):
        raise InputError(f"expected weights by name, a state dict; got {type(found).__name__}")
    inner = {key: value for key, value in found.items() if isinstance(value, Mapping) and value}
    nests = [key for key in _NESTS if key in inner][:1] or [key for key in inner if _holds_tensors(inner[key])]
    if len(nests) == 1:
        return _state_dict(inner[nests[0]])
    if any(map(_is_tensor, found.values())):
        return found
    which = f"{len(nests)} ({', '.join(map(str, nests[:5]))})" if nests else "none"
    raise InputError(f"expected one state dict in the weights, found {which}; pass the one that is meant")


def _holds_tensors(value: Mapping[str, Any]) -> bool:
    return all(isinstance(name, str) and _is_tensor(inner) for name, inner in value.items())


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _unwrapped(name: Any) -> str:
    """Returns the name of a tensor without what `torch.compile` and parallel wrappers put into it."""
    if not isinstance(name, str):
        raise InputError(f"expected the weights by name, got a tensor under {name!r}")
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def _array(name: str, tensor: Any) -> np.ndarray:
    """Returns a tensor or array as NumPy's, one of a type that NumPy lacks as float32."""
    if not _is_tensor(tensor):
        raise InputError(f"the weights hold {name!r}, which is no tensor but {type(tensor).__name__}; leave it out")
    try:
        if not hasattr(tensor, "detach"):
            return np.asarray(tensor)
        tensor = tensor.detach().cpu()
        try:
            return tensor.numpy()
        except TypeError:  # bfloat16 and narrower
            return tensor.float().numpy()
    except Exception as error:  # of sparse tensors, of tensors without data
        reason = str(error).partition("\n")[0]
        raise InputError(f"the tensor {name!r} of the weights has no plain values: {reason}") from error


def _translated(name: str, value: np.ndarray, rules: Rules) -> tuple[str, np.ndarray]:
    """Returns the path of ours and the value in our layout of one tensor."""
    layer, _, kind = name.rpartition(".")
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, layer):
            path = re.sub(r"\{(\d+)\}", lambda number: str(int(number[1]) + 1), match.expand(replacement))
            break
    else:
        raise InputError(f"no rule translates the layer {layer!r} of the weights ({name}); add one to `rules`")
    if kind == "weight" and value.ndim > 1:
        kind, value = "kernel", value.transpose(*range(2, value.ndim), 1, 0)
    else:
        kind = _NORM.get(kind, kind)
    return f"{'batch_stats' if kind in ('mean', 'var') else 'params'}/{path}/{kind}", value
