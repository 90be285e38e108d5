"""Weights of PyTorch's networks for ours: names and layouts translated, every tensor accounted for."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.formats import torch_file
from jaxtransfer.formats.checkpoint import tensors_in
from jaxtransfer.model import Model

Rules = Sequence[tuple[str, str]]

_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}

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
    found = weights if isinstance(weights, Mapping) else torch_file.read(Path(weights))
    given = {}
    for name, tensor in tensors_in(found).items():
        path, value = _translated(name, tensor, rules)
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
