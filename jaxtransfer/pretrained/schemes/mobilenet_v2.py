"""MobileNet-v2 by the names of torchvision, whose layers are numbered through; timm's are EfficientNet-Lite's."""

import re
from collections.abc import Sequence

from jaxtransfer.pretrained.layouts import Shapes
from jaxtransfer.pretrained.preprocessing import IMAGENET
from jaxtransfer.pretrained.scheme import Rule, Scheme
from jaxtransfer.pretrained.schemes.efficientnet_lite import blocks_of

_NARROWS = {"conv.0.0": "depthwise_conv", "conv.0.1": "depthwise_norm", "conv.1": "project_conv"}
_NARROWS |= {"conv.2": "project_norm"}
_WIDENS = {"conv.0.0": "expand_conv", "conv.0.1": "expand_norm", "conv.1.0": "depthwise_conv"}
_WIDENS |= {"conv.1.1": "depthwise_norm", "conv.2": "project_conv", "conv.3": "project_norm"}


def rules(shapes: Shapes) -> Sequence[Rule]:
    """Returns the table for a model with such leaves.

    Args:
      shapes: of the model's leaves.
    """
    blocks = blocks_of(shapes)
    last = len(blocks) + 1
    return (
        Rule(r"features\.0\.0", "stem_conv"),
        Rule(r"features\.0\.1", "stem_norm"),
        *(
            Rule(re.escape(f"features.{number}.{part}"), f"{block}/{ours}")
            for number, block in enumerate(blocks, 1)
            for part, ours in (_WIDENS if f"params/{block}/expand_conv/kernel" in shapes else _NARROWS).items()
        ),
        Rule(rf"features\.{last}\.0", "final_conv"),
        Rule(rf"features\.{last}\.1", "final_norm"),
        Rule(r"classifier\.1", "head"),
    )


TORCHVISION_MOBILENET_V2 = Scheme(
    "torchvision MobileNet-v2",
    rules,
    preprocessing=IMAGENET,
    libraries=("torchvision",),
    networks=("mobilenet_v2",),
)
