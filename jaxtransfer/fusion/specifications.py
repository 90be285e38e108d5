"""The permutation specifications of the networks of this library, read off their parameters."""

import re
from collections.abc import Mapping
from typing import Any

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.fusion.permutations import Axis, Specification, below

OWN = "write the specification by hand, as jt.fusion.permutations says"
RANKS = {"stem": 0, "stage": 1, "hidden": 2, "fc": 3, "bottleneck": 4, "head": 5}


def specification(variables: Any) -> Specification:
    """Returns what of a network can be permuted, for `jt.fusion.rebasin`: of our MLP, CNNs, VGG, ResNets and ViTs.

    Units of hidden layers and channels of convolutions; in residual nets the channels of the stream that all blocks
    of a stage add to, and those inside each block. With the parameter-free shortcuts of CIFAR ResNets, which put old
    channels between new ones of zeros, a stage's stream is that of the stage before and the new channels. In ViTs the
    stream, the heads of each block and its hidden units; units inside of a head stay. Of an encoder without its head
    the features stay in their order.

    Args:
      variables: parameters, or variables `{"params": ..., **state}`, of a model of `jt.models`.

    Returns:
      Plain data, see `jt.fusion.permutations`.

    Raises:
      InputError: for another network; then the specification is to be written by hand.
    """
    shapes = {below(path, variables): tuple(leaf.shape) for path, leaf in tree.leaves_by_path(variables).items()}
    if any("/attention/" in path for path in shapes):
        found = _transformer(shapes)
    elif any(re.match(r"stage\d+_block\d+/", path) for path in shapes):
        found = _residual(shapes)
    else:
        found = _chain(shapes)
    if "head/kernel" in found and "head/kernel" not in shapes:
        found = _staying(found, found["head/kernel"][-2])
    if missing := [path for path in shapes if path not in found]:
        raise InputError(f"no network of jt.models has {tree.listed(missing)} where these stand; {OWN}")
    return {path: found[path] for path in found if path in shapes}


def _chain(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Layers one behind the other: MLP, LeNet, Conv4, small CNN, VGG."""
    layers = sorted((path.removesuffix("/kernel") for path in shapes if path.endswith("/kernel")), key=_place)
    found: dict[str, Any] = {}
    before, width = None, 0
    for layer in layers:
        shape = shapes[f"{layer}/kernel"]
        into: Axis = None
        if before is not None:
            if len(shape) not in (2, 4) or shape[-2] % width:
                raise InputError(f"{layer!r} {list(shape)} doesn't fit behind {before!r} of {width} units; {OWN}")
            repeats = shape[-2] // width  # of a flattened map, whose channels are its last axis
            into = before if repeats == 1 else {before: [[c + width * r for r in range(repeats)] for c in range(width)]}
        out = None if layer == layers[-1] else layer
        found |= _layer(layer, shape, into, out)
        norm = layer.replace("conv", "norm") if "conv" in layer else layer.replace("fc", "norm")
        if norm != layer:
            found |= _norm(norm, out)
        before, width = out, shape[-1]
    return found


def _residual(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Stages of residual blocks: CIFAR ResNets, ResNets, wide ResNets."""
    early = any(path.startswith("final_norm/") for path in shapes)  # norms before the convolutions
    stream: Axis = "stem"
    if "stem_conv/kernel" not in shapes:
        raise InputError(f"our ResNets begin with a layer 'stem_conv', and here is none; {OWN}")
    found = _layer("stem_conv", shapes["stem_conv/kernel"], None, "stem") | _norm("stem_norm", "stem")
    width = shapes["stem_conv/kernel"][-1]
    blocks = {path.split("/")[0] for path in shapes if re.match(r"stage\d+_block\d+/", path)}
    for block in sorted(blocks, key=_place):
        convs = sorted(path.split("/")[1] for path in shapes if re.match(rf"{block}/conv\d+/kernel", path))
        own = {path.split("/")[1] for path in shapes if path.startswith(f"{block}/")}
        norms = {name.replace("conv", "norm") for name in convs}
        if not convs or own - {*convs, *norms, "shortcut_conv", "shortcut_norm"}:
            raise InputError(f"block {block!r} has {tree.listed(sorted(own))}, which is none of our ResNets; {OWN}")
        new = shapes[f"{block}/{convs[-1]}/kernel"][-1]
        before, stage = stream, block.split("_")[0]
        if "shortcut_conv" in own:
            stream = f"{stage}_stream"
        elif new > width:
            stream = _widened(stream, width, new, f"{stage}_new")
        into = before
        for name in convs:
            out = stream if name == convs[-1] else f"{block}/{name}"
            found |= _norm(f"{block}/{name.replace('conv', 'norm')}", into if early else out)
            found |= _layer(f"{block}/{name}", shapes[f"{block}/{name}/kernel"], into, out)
            into = out
        if "shortcut_conv" in own:
            found |= _layer(f"{block}/shortcut_conv", shapes[f"{block}/shortcut_conv/kernel"], before, stream)
            found |= _norm(f"{block}/shortcut_norm", stream)
        width = new
    return found | _norm("final_norm", stream) | _layer("head", (0, 0), stream, None)


def _transformer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    stream = "stream"
    found = _layer("stem_conv", shapes.get("stem_conv/kernel", (0, 0)), None, stream)
    found |= {"stem_token": (None, None, stream), "stem_position": (None, None, stream)}
    for block in sorted({path.split("/")[0] for path in shapes if "/attention/" in path}, key=_place):
        heads, hidden = f"{block}/heads", f"{block}/hidden"
        for name in ("query", "key", "value"):
            found[f"{block}/attention/{name}/kernel"] = (stream, heads, None)
            found[f"{block}/attention/{name}/bias"] = (heads, None)
        found |= {f"{block}/attention/out/kernel": (heads, None, stream), f"{block}/attention/out/bias": (stream,)}
        found |= _norm(f"{block}/norm1", stream) | _norm(f"{block}/norm2", stream)
        found |= _layer(f"{block}/fc1", (0, 0), stream, hidden) | _layer(f"{block}/fc2", (0, 0), hidden, stream)
    return found | _norm("final_norm", stream) | _layer("head", (0, 0), stream, None)


def _staying(found: Mapping[str, Any], features: Axis) -> dict[str, Any]:
    """Returns a specification in which the permutations of an axis are left out, wherever they are."""
    names = {features} if isinstance(features, str) else set(features or ())

    def left(axis: Axis) -> Axis:
        if isinstance(axis, Mapping):
            return {name: places for name, places in axis.items() if name not in names} or None
        return None if axis in names else axis

    return {path: tuple(left(axis) for axis in axes) for path, axes in found.items()}


def _layer(name: str, shape: tuple[int, ...], into: Axis, out: Axis) -> dict[str, tuple[Axis, ...]]:
    return {f"{name}/kernel": (*[None] * (len(shape) - 2), into, out), f"{name}/bias": (out,)}


def _norm(name: str, units: Axis) -> dict[str, tuple[Axis, ...]]:
    return {f"{name}/{leaf}": (units,) for leaf in ("scale", "bias", "mean", "var")}


def _widened(stream: Axis, width: int, new: int, name: str) -> dict[str, Any]:
    """Returns a stream of `new` channels in which the old ones stand in the middle, as the shortcut pads them."""
    first = (new - width) // 2
    old = stream if isinstance(stream, Mapping) else {stream: range(width)}
    places: dict[Any, Any] = {one: [int(place) + first for place in where] for one, where in old.items()}  # pyright: ignore
    return {**places, name: [*range(first), *range(first + width, new)]}


def _place(layer: str) -> tuple[int, ...]:
    """Returns where a layer stands, by its name."""
    word = re.match(r"[a-z]+", layer)
    rank = RANKS.get(word.group() if word else "")
    if rank is None:
        raise InputError(f"no network of jt.models has a layer {layer!r}; {OWN}")
    return rank, *(int(number) for number in re.findall(r"\d+", layer))
