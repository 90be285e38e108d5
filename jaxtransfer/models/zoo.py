"""The table from names to models, for the command line."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.errors import InputError, unknown
from jaxtransfer.model import Model
from jaxtransfer.models.cifar_resnet import cifar_resnet
from jaxtransfer.models.conv4 import conv4
from jaxtransfer.models.efficientnet_lite import efficientnet_lite
from jaxtransfer.models.lenet import lenet
from jaxtransfer.models.mlp import mlp
from jaxtransfer.models.mobilenet_v2 import mobilenet_v2
from jaxtransfer.models.resnet import resnet
from jaxtransfer.models.small_cnn import small_cnn
from jaxtransfer.models.text_encoder import SIZES, text_encoder
from jaxtransfer.models.vgg import vgg
from jaxtransfer.models.vit import vit_b, vit_s, vit_ti
from jaxtransfer.models.wide_resnet import wide_resnet


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table.

    Attributes:
      build: `build(classes, *, name="model", dtype=None) -> Model`.
      summary: what it is, in a line.
      image: shape (H, W, C) of the images that it was made for; nets that end in a mean take others too. Of a text
        encoder the number of tokens (T,); it takes shorter texts too.
      dtype: of the inputs: whole numbers where they are tokens.
    """

    build: Callable[..., Model]
    summary: str
    image: tuple[int, ...]
    dtype: Any = jnp.float32

    @property
    def takes_text(self) -> bool:
        """Whether its inputs are tokens."""
        return jnp.issubdtype(self.dtype, jnp.integer)

    def inputs(self, batch: int) -> jax.ShapeDtypeStruct:
        """Returns the shape and the type of a batch of inputs."""
        return jax.ShapeDtypeStruct((batch, *self.image), self.dtype)


def _table() -> dict[str, Entry]:
    bind = functools.partial
    digits, omniglot, small, large = (8, 8, 1), (28, 28, 1), (32, 32, 3), (224, 224, 3)
    table = {
        "mlp": Entry(mlp, "perceptron with two hidden layers of 256 units", digits),
        "linear": Entry(bind(mlp, hidden=()), "linear classifier", digits),
        "small-cnn": Entry(small_cnn, "three convolutions with batch norm, fast on a CPU", digits),
        "lenet": Entry(lenet, "two 5×5 convolutions, for the adaptation of digits", omniglot),
        "conv4": Entry(conv4, "few-shot backbone, 64 filters", omniglot),
        "conv4-strided": Entry(bind(conv4, pooling=False), "few-shot backbone, strides for pooling", omniglot),
        "conv4-32": Entry(bind(conv4, width=32), "few-shot backbone of miniImageNet, 32 filters", (84, 84, 3)),
    }
    for d in (20, 32, 44, 56, 110):
        table[f"resnet{d}"] = Entry(bind(cifar_resnet, d), f"CIFAR ResNet-{d}", small)
        build = bind(cifar_resnet, d, preactivation=True)
        table[f"preact-resnet{d}"] = Entry(build, f"pre-activation CIFAR ResNet-{d}", small)
    for d in (18, 34, 50, 101, 152):
        table[f"resnet{d}"] = Entry(bind(resnet, d, small_images=True), f"ResNet-{d}, 32×32 stem", small)
        table[f"resnet{d}-imagenet"] = Entry(bind(resnet, d), f"ResNet-{d}, ImageNet stem", large)
    for d in (50, 101):
        build = bind(resnet, d, wider=2)
        table[f"wide-resnet{d}-2"] = Entry(build, f"ResNet-{d}, twice as wide in bottlenecks, ImageNet stem", large)
    for d in (11, 13, 16, 19):
        for suffix, norm in (("", False), ("-bn", True)):
            build = bind(vgg, d, batch_norm=norm)
            summary = f"VGG-{d}{' with batch norm' if norm else ''}"
            table[f"vgg{d}{suffix}"] = Entry(bind(build, small_images=True), f"{summary}, 32×32 head", small)
            table[f"vgg{d}{suffix}-imagenet"] = Entry(build, f"{summary}, 224×224 head", large)
    for d, k in ((10, 2), (16, 2), (16, 4), (28, 2), (28, 10), (40, 2)):
        table[f"wrn-{d}-{k}"] = Entry(bind(wide_resnet, d, k), f"wide ResNet of {d} layers, {k} times", small)
    for size, build in (("ti", vit_ti), ("s", vit_s), ("b", vit_b)):
        for patch, image in ((4, small), (16, large), (32, large)):
            summary = f"vision transformer {size.capitalize()}, {patch}×{patch} patches"
            table[f"vit-{size}-{patch}"] = Entry(bind(build, patch=patch), summary, image)
    for n, size in ((0, 224), (1, 240), (2, 260)):
        summary = f"EfficientNet-Lite{n}, inverted residuals without squeezing"
        table[f"efficientnet-lite{n}"] = Entry(bind(efficientnet_lite, n), summary, (size, size, 3))
    table["mobilenet-v2"] = Entry(mobilenet_v2, "MobileNet-v2, inverted residuals", large)
    for name, options in SIZES.items():
        summary = f"text encoder, {options['depth']} blocks of width {options['width']}"
        table[name] = Entry(bind(text_encoder, **options), summary, (512,), jnp.int32)
    return table


ZOO: dict[str, Entry] = _table()


def create(name: str, classes: int, *, name_in_params: str = "model", dtype=None, **options: Any) -> Model:
    """Returns a new model of the zoo.

    Args:
      name: a key of `ZOO`, such as "resnet20".
      classes: number of outputs.
      name_in_params: key of the model's weights.
      dtype: type of the computation; None infers it.
      **options: further arguments of its constructor: `width=8`, say.

    Raises:
      InputError: for an unknown name or option, the message lists the known ones and the closest; for no outputs.
    """
    if name not in ZOO:
        raise unknown("model", name, ZOO)
    if not isinstance(classes, int | np.integer) or classes < 1:
        raise InputError(f"{name}: classes must be a whole number of at least 1, got {classes!r}")
    build = ZOO[name].build
    taken = inspect.signature(build).parameters
    for option in options:
        if option not in taken or option in ("classes", "name"):
            raise unknown(f"option of {name}", option, [known for known in taken if known not in ("classes", "name")])
    return build(classes, name=name_in_params, dtype=dtype, **options)


def count_parameters(model: Model, image_shape: tuple[int, ...], dtype: Any = jnp.float32) -> int:
    """Returns the number of trainable parameters for inputs of shape [1, *image_shape] and a type, allocating none."""
    image = jax.ShapeDtypeStruct((1, *image_shape), dtype)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
