"""What stands beside weights in JSON: preprocessing and class names, as timm and transformers write them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtransfer.errors import InputError
from jaxtransfer.formats import safetensors
from jaxtransfer.formats.read import file_of
from jaxtransfer.pretrained import unshown
from jaxtransfer.pretrained.preprocessing import Preprocessing
from jaxtransfer.pretrained.resample import FILTERS

_PILLOW = {2: "bilinear", 3: "bicubic"}  # numbers of its filters, as transformers writes them


OUR_KEY = "jaxtransfer"
"""Under which a file of safetensors that we wrote says what is known of it."""


class Facts(NamedTuple):
    """What is known of weights besides their values.

    Attributes:
      preprocessing: what images become; None where nothing says it.
      class_names: of the outputs, in order; empty where nothing says it.
      heads: number of attention heads; None where nothing says it.
      origin: the file that says so.
      network: of what weights are, as `models.describe` says it, where names and shapes leave it open; None where
        nothing says it.
      labels: whether the outputs are labels, any number of which hold together, by sigmoids.
      differs: in which way their network is not as ours, though they fit; "" where nothing says so.
    """

    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] = ()
    heads: int | None = None
    origin: str = ""
    network: Mapping[str, Any] | None = None
    labels: bool = False
    differs: str = ""


def beside(path: Path) -> Facts:
    """Returns what a file of ours says of itself; else what `config.json` and `preprocessor_config.json` beside it say.

    Args:
      path: the file of weights, or its folder.

    Raises:
      InputError: where one of them is there and says what can't be.
    """
    if (own := within(path)) is not None:
        return own
    folder = path if path.is_dir() else path.parent
    config, prepared = _json(folder / "config.json"), _json(folder / "preprocessor_config.json")
    try:
        names, labels = _class_names(config), config.get("problem_type") == "multi_label_classification"
        heads = config.get("num_attention_heads", config.get("n_heads"))
        if heads is None and isinstance(config.get("model_args"), Mapping):
            heads = config["model_args"].get("num_heads")
        known, origin = None, "config.json"
        if isinstance(config.get("pretrained_cfg"), Mapping):
            known = _of_timm(config["pretrained_cfg"])
        elif "image_mean" in prepared:
            known, origin = _of_transformers(prepared), "preprocessor_config.json"
        network, differs = unshown.network(config), unshown.differs(config)
        return Facts(known, names, heads, origin, network, labels, differs)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"what stands beside the weights in {folder} can't be read: {error!r}") from None


def within(path: Path) -> Facts | None:
    """Returns what a file that `export_weights` wrote says of itself; None for others.

    Args:
      path: the file of weights, or its folder.

    Raises:
      InputError: where it says what can't be.
    """
    file = file_of(path)
    if file.suffix != ".safetensors":
        return None
    entries = _own(file)
    if entries is None:
        return None
    try:
        known = entries.get("preprocessing")
        names = tuple(map(str, entries.get("class_names") or ()))
        preprocessing = None if known is None else Preprocessing.from_entries(known)
        network = entries.get("network")
        network = dict(network) if isinstance(network, Mapping) else None
        return Facts(
            preprocessing, names, entries.get("heads"), "the file itself", network, entries.get("labels") is True
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"what the weights {file} say of themselves can't be read: {error!r}") from None


class Within(NamedTuple):
    """The network that a file of ours says it is of.

    Attributes:
      model: its name in the zoo.
      options: what else it was made with.
      image_shape: (H, W, C) of its images; None where nothing says it.
    """

    model: str
    options: dict[str, Any]
    image_shape: tuple[int, int, int] | None


def network_beside(path: Path) -> Within | None:
    """Returns the network that a file of ours, or `config.json` beside weights, says they are of; else None.

    Args:
      path: a file of weights or its folder.
    """
    file = file_of(path)
    told = unshown.network(_json(file.parent / "config.json"))
    return network_within(file) or (None if told is None else Within(told["model"], told["model_options"], None))


def network_within(path: Path) -> Within | None:
    """Returns the network that a file of ours says it is of; None for others.

    Args:
      path: a file of weights or a name of some, there or not.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    entries = _own(path) or {}
    network = entries.get("network")
    if not isinstance(network, Mapping):
        return None
    options, shape = network.get("model_options"), entries.get("image_shape")
    sides: list[Any] = shape if isinstance(shape, list) else []
    known = len(sides) == 3 and all(type(side) is int and side > 0 for side in sides)
    return Within(
        str(network.get("model")),
        dict(options) if isinstance(options, Mapping) else {},
        (sides[0], sides[1], sides[2]) if known else None,
    )


def _own(file: Path) -> dict[str, Any] | None:
    """Returns what a file of safetensors holds under our key."""
    told = safetensors.metadata(file).get(OUR_KEY)
    if told is None:
        return None
    try:
        entries = json.loads(told)
    except ValueError as error:
        raise InputError(f"what the weights {file} say of themselves can't be read: {error!r}") from None
    if not isinstance(entries, dict):
        raise InputError(f"what the weights {file} say of themselves can't be read: it is no object")
    return entries


def _of_timm(entries: Mapping[str, Any]) -> Preprocessing:
    _, height, width = entries["input_size"]
    stretched = entries.get("crop_mode") == "squash"
    return Preprocessing(
        (int(height), int(width)),
        None if stretched else float(entries.get("crop_pct") or 1.0),
        _numbers(entries["mean"]),
        _numbers(entries["std"]),
        _known(entries.get("interpolation", "bicubic")),
    )


def _of_transformers(entries: Mapping[str, Any]) -> Preprocessing:
    size, share = entries.get("size"), entries.get("crop_pct")
    target, crop, edge = None, None, None
    if isinstance(size, Mapping) and "shortest_edge" in size:
        edge = int(size["shortest_edge"])
    elif isinstance(size, int) and share is not None:  # the shorter side, as ConvNeXt's earlier files have it
        edge = size
    elif size is not None:
        target = _sides(size)
    if entries.get("do_center_crop") and entries.get("crop_size") is not None:
        resized = edge or min(target or (0,))
        target = _sides(entries["crop_size"])
        crop = _share(min(target), resized) if resized else 1.0
    elif edge is not None:
        target, crop = (
            (edge, edge),
            float(share or 1.0) if edge < 384 else None,
        )  # ConvNeXt's rule, which ResNets follow
    mean, std = (_numbers(entries[name]) for name in ("image_mean", "image_std"))
    if not entries.get("do_normalize", True):
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    factor = float(entries.get("rescale_factor", 1 / 255)) if entries.get("do_rescale", True) else 1.0
    if not math.isclose(factor, 1 / 255, rel_tol=1e-6) or entries.get("rescale_offset"):  # (factor·x − mean) / std
        offset = 1.0 if entries.get("rescale_offset") else 0.0
        mean = tuple((one + offset) / (255 * factor) for one in mean)
        std = tuple(one / (255 * factor) for one in std)
    return Preprocessing(target, crop, mean, std, _PILLOW.get(entries.get("resample", 2), "bilinear"))


def _share(kept: int, resized: int) -> float:
    """Returns kept / resized, rounded down where floor(kept / share) would not give back what it is a share of."""
    share = kept / resized
    return share if math.floor(kept / share) >= resized else math.nextafter(share, 0)


def _sides(size: Any) -> tuple[int, int]:
    return (int(size["height"]), int(size["width"])) if isinstance(size, Mapping) else (int(size), int(size))


def _class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("id2label")
    if isinstance(names, Mapping) and names:
        found = tuple(str(names[key]) for key in sorted(names, key=int))
        return () if all(name == f"LABEL_{number}" for number, name in enumerate(found)) else found
    names = config.get("label_names")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _known(interpolation: str) -> str:
    return interpolation if interpolation in FILTERS else "bicubic"


def _numbers(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    return found if isinstance(found, dict) else {}
