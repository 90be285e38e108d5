"""VGG nets of torchvision: a flat list of layers, whose numbers depend on the depth and on batch norm."""

import re
from collections.abc import Sequence

from jaxtransfer.pretrained.layouts import Shapes, dense_on_map
from jaxtransfer.pretrained.preprocessing import IMAGENET
from jaxtransfer.pretrained.scheme import Rule, Scheme


def features(shapes: Shapes) -> list[Rule]:
    """Returns the rules of the convolutions: convolution, batch norm if any, and ReLU; a pooling ends a stage.

    Args:
      shapes: of the model's leaves.
    """
    found = sorted({match[1] for path in shapes if (match := re.search(r"(?:^|/)(stage\d_conv\d)/kernel$", path))})
    norm = any("stage1_norm1" in path for path in shapes)
    rules, number = [], 0
    for before, name in zip(["stage1", *found], found, strict=False):
        number += name[:6] != before[:6]
        rules.append(Rule(rf"features\.{number}", name))
        if norm:
            rules.append(Rule(rf"features\.{number + 1}", name.replace("conv", "norm")))
        number += 3 if norm else 2
    return rules


def rules(shapes: Shapes) -> Sequence[Rule]:
    """Returns the table for a model with such leaves.

    Args:
      shapes: of the model's leaves.
    """
    return (
        *features(shapes),
        Rule(r"classifier\.0", "fc1", dense_on_map),
        Rule(r"classifier\.3", "fc2"),
        Rule(r"classifier\.6", "head"),
    )


TORCHVISION_VGG = Scheme(
    "torchvision VGG",
    rules,
    preprocessing=IMAGENET,
    libraries=("torchvision",),
    networks=("vgg",),
)
