"""The widely used CIFAR-10 ResNets with shortcuts without parameters (option A)."""

from jaxtransfer.pretrained.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from jaxtransfer.pretrained.scheme import Rule, Scheme

CIFAR_RESNET = Scheme(
    "CIFAR ResNet",
    (
        Rule(r"conv1", "stem_conv"),
        Rule(r"bn1", "stem_norm"),
        Rule(r"layer(\d)\.(\d+)\.conv(\d)", r"stage\1_block{\2}/conv\3"),
        Rule(r"layer(\d)\.(\d+)\.bn(\d)", r"stage\1_block{\2}/norm\3"),
        Rule(r"linear", "head"),
    ),
    preprocessing=Preprocessing((32, 32), 1.0, IMAGENET_MEAN, IMAGENET_STD),
    libraries=("cifar",),
    networks=("cifar_resnet",),
)
