"""EfficientNet-Lite by the names of efficientnet_lite_pytorch, whose blocks are numbered through, and by timm's.

timm names the layers of MobileNet-v2 alike.
"""

import re
from collections.abc import Sequence

from jaxtransfer.pretrained.layouts import Shapes
from jaxtransfer.pretrained.preprocessing import Preprocessing
from jaxtransfer.pretrained.scheme import Rule, Scheme

_PARTS = {"_expand_conv": "expand_conv", "_bn0": "expand_norm", "_depthwise_conv": "depthwise_conv"}
_PARTS |= {"_bn1": "depthwise_norm", "_project_conv": "project_conv", "_bn2": "project_norm"}


def blocks_of(shapes: Shapes) -> list[str]:
    """Returns the names of a network's inverted residuals, in order.

    Args:
      shapes: of the model's leaves.
    """
    blocks = {match[1] for path in shapes if (match := re.match(r"params/(stage\d+_block\d+)/project_conv/", path))}
    return sorted(blocks, key=lambda block: [int(number) for number in re.findall(r"\d+", block)])


def rules(shapes: Shapes) -> Sequence[Rule]:
    """Returns the table for a model with such leaves.

    Args:
      shapes: of the model's leaves.
    """
    return (
        Rule(r"_conv_stem", "stem_conv"),
        Rule(r"_bn0", "stem_norm"),
        *(
            Rule(rf"_blocks\.{number}\.{part}", f"{block}/{ours}")
            for number, block in enumerate(blocks_of(shapes))
            for part, ours in _PARTS.items()
        ),
        Rule(r"_conv_head", "final_conv"),
        Rule(r"_bn1", "final_norm"),
        Rule(r"_fc", "head"),
    )


EFFICIENTNET_LITE = Scheme(
    "EfficientNet-Lite",
    rules,
    preprocessing=Preprocessing((224, 224), 0.875, (127 / 255,) * 3, (128 / 255,) * 3, "bicubic"),
    sized=True,
    libraries=("efficientnet_lite_pytorch",),
    networks=("efficientnet_lite",),
)

_BLOCK = r"blocks\.([1-9]\d*)\.(\d+)"

TIMM_EFFICIENTNET_LITE = Scheme(
    "timm EfficientNet-Lite or MobileNet-v2",
    (
        Rule(r"conv_stem", "stem_conv"),
        Rule(r"bn1", "stem_norm"),
        Rule(r"blocks\.0\.(\d+)\.conv_dw", r"stage1_block{\1}/depthwise_conv"),
        Rule(r"blocks\.0\.(\d+)\.bn1", r"stage1_block{\1}/depthwise_norm"),
        Rule(r"blocks\.0\.(\d+)\.conv_pw", r"stage1_block{\1}/project_conv"),
        Rule(r"blocks\.0\.(\d+)\.bn2", r"stage1_block{\1}/project_norm"),
        Rule(rf"{_BLOCK}\.conv_pw", r"stage{\1}_block{\2}/expand_conv"),
        Rule(rf"{_BLOCK}\.bn1", r"stage{\1}_block{\2}/expand_norm"),
        Rule(rf"{_BLOCK}\.conv_dw", r"stage{\1}_block{\2}/depthwise_conv"),
        Rule(rf"{_BLOCK}\.bn2", r"stage{\1}_block{\2}/depthwise_norm"),
        Rule(rf"{_BLOCK}\.conv_pwl", r"stage{\1}_block{\2}/project_conv"),
        Rule(rf"{_BLOCK}\.bn3", r"stage{\1}_block{\2}/project_norm"),
        Rule(r"conv_head", "final_conv"),
        Rule(r"bn2", "final_norm"),
        Rule(r"classifier", "head"),
    ),
    libraries=("timm",),
    networks=("efficientnet_lite", "mobilenet_v2"),
    unsaid={
        "efficientnet_lite": "padding: timm's tf_efficientnet_lite... are as the model is by default, its "
        "efficientnet_lite... want same_padding=False, epsilon=1e-5; nothing says which of them it is"
    },
)
"""Its weights differ in what they expect of images: `tf_...` by 0.5, others by ImageNet's mean."""
