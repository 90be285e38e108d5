"""ResNets of torchvision and timm, which name their layers alike."""

from jaxtransfer.pretrained.preprocessing import IMAGENET
from jaxtransfer.pretrained.scheme import Rule, Scheme

TORCHVISION_RESNET = Scheme(
    "torchvision or timm ResNet",
    (
        Rule(r"conv1", "stem_conv"),
        Rule(r"bn1", "stem_norm"),
        Rule(r"layer(\d)\.(\d+)\.conv(\d)", r"stage\1_block{\2}/conv\3"),
        Rule(r"layer(\d)\.(\d+)\.bn(\d)", r"stage\1_block{\2}/norm\3"),
        Rule(r"layer(\d)\.(\d+)\.downsample\.0", r"stage\1_block{\2}/shortcut_conv"),
        Rule(r"layer(\d)\.(\d+)\.downsample\.1", r"stage\1_block{\2}/shortcut_norm"),
        Rule(r"fc", "head"),
    ),
    preprocessing=IMAGENET,
    libraries=("torchvision", "timm"),
    networks=("resnet",),
)
