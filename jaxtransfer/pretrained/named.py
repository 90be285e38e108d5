"""Weights for a network of the zoo by its name alone: as many outputs as they have, the images that they expect."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import models, tree
from jaxtransfer.errors import InputError
from jaxtransfer.models.recipe import as_arguments
from jaxtransfer.pretrained import hub
from jaxtransfer.pretrained.as_run import count_outputs
from jaxtransfer.pretrained.facts import Within, network_beside, network_within
from jaxtransfer.pretrained.load import Pretrained, load_pretrained

_ENDINGS = (".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt", ".npz", ".onnx", ".json")
_SIZES = {"tiny": "ti", "small": "s", "base": "b"}
_NAMES: tuple[tuple[str, str], ...] = (  # as timm, torchvision and transformers call networks, and the zoo
    (r"resnet-?(18|34|50|101|152)(?!\d)", "resnet{0}-imagenet"),
    (r"resnet-?(20|32|44|56|110)(?!\d)", "resnet{0}"),
    (r"vgg-?(11|13|16|19)_bn", "vgg{0}-bn-imagenet"),
    (r"vgg-?(11|13|16|19)(?!\d)", "vgg{0}-imagenet"),
    (r"wide_resnet(50|101)_2", "wide-resnet{0}-2"),
    (r"(?:vit|deit)[-_](tiny|small|base)[-_](?:distilled[-_])?patch(\d+)", "vit-{0}-{1}"),
    (r"vit_([bs])_(\d+)(?!\d)", "vit-{0}-{1}"),
    (r"(?:tf_)?efficientnet[-_]lite(\d)", "efficientnet-lite{0}"),
    (r"mobilenet[-_]?v2(?![-_](?!100)\d)", "mobilenet-v2"),
)


def told_network(source: str | Path) -> str | None:
    """Returns the network of the zoo that the name of some weights tells, or a file of ours itself; else None.

    `timm:resnet18.a1_in1k` and `resnet18-f37072fd.pth` are of "resnet18-imagenet". Whether it is true shows when the
    weights are read.

    Args:
      source: a file or a name of a hub.
    """
    within = network_within(Path(source))
    if within is not None and within.model in models.ZOO:
        return within.model
    name = str(source).partition("@")[0].rstrip("/").split("/")[-1].split(":")[-1].lower()
    for ending in _ENDINGS:
        name = name.removesuffix(ending)
    if name in models.ZOO:
        return name if f"{name}-imagenet" not in models.ZOO else f"{name}-imagenet"
    for pattern, network in _NAMES:
        if found := re.match(pattern, name):
            known = network.format(*(_SIZES.get(part, part) for part in found.groups()))
            return known if known in models.ZOO else None
    return None


def load_named(
    source: Any,
    network: str,
    *,
    part: str | None = None,
    ignore: tree.Patterns = (),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    needs_head: bool = True,
) -> Pretrained:
    """Returns somebody's weights for a network of the zoo, as they are: all outputs, size and channels of images.

    A file of ours says which options the network has besides its name.

    Args:
      source: as for `load_pretrained`.
      network: a name of the zoo.
      part: as for `load_pretrained`.
      ignore: likewise.
      mean: that the images are normalised by; by default what the weights say.
      std: likewise.
      needs_head: whether weights without a head are an error; else one of two outputs is drawn.

    Raises:
      InputError: as `load_pretrained`, and for weights without a head.
    """
    within = _network_beside(source, network)
    made = {} if within is None else as_arguments(within.options)
    body = models.create(network, 2, **made)
    reinit: tuple[str, ...] = ()
    try:
        model = models.create(network, count_outputs(source, body, part=part, ignore=ignore), **made)
    except InputError:
        if needs_head:
            raise
        model, reinit = body, (body.head,)
    if mean:
        model = models.normalize(model, mean, std)
    options: dict[str, Any] = {"part": part, "ignore": ignore, "reinit": reinit}
    usual = models.ZOO[network].image
    shape = usual if within is None else within.image_shape or usual

    def laid_out(shape: Sequence[int]) -> Pretrained:
        inputs = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        return load_pretrained(source, model, inputs=None if tuple(shape) == usual else inputs, **options)

    if len(mean) > 1:
        shape = (*shape[:2], len(mean))
    loaded = laid_out(shape)
    stem = next((how for path, how in loaded.report.adapted.items() if path.endswith("stem_conv/kernel")), None)
    if stem is not None:  # "from 3 to 1 channels"
        shape = (*shape[:2], int(stem.split()[1]))
        loaded = laid_out(shape)
    moved = any(path.endswith("stem_position") for path in loaded.report.adapted)
    if moved and loaded.preprocessing is not None and loaded.preprocessing.size is not None:
        loaded = laid_out((*loaded.preprocessing.size, shape[2]))  # that they were trained on
    return loaded


def _network_beside(source: Any, network: str) -> Within | None:
    """Returns what weights say of their network, where it is the one that is meant."""
    if not isinstance(source, str | Path):
        return None
    path = hub.fetch(source) if isinstance(source, str) and hub.is_name(source) else Path(source)
    if not path.exists() or (path / "checkpoints").is_dir():
        return None
    within = network_beside(path)
    return within if within is not None and within.model == network else None
