"""VGG nets of timm: torchvision's layers, with convolutions for the linear layers on the map."""

from collections.abc import Sequence

from jaxtransfer.pretrained.layouts import Shapes, conv_on_map, one_by_one
from jaxtransfer.pretrained.preprocessing import IMAGENET
from jaxtransfer.pretrained.scheme import Rule, Scheme
from jaxtransfer.pretrained.schemes.torchvision_vgg import features


def rules(shapes: Shapes) -> Sequence[Rule]:
    """Returns the table for a model with such leaves.

    Args:
      shapes: of the model's leaves.
    """
    return (
        *features(shapes),
        Rule(r"pre_logits\.fc1", "fc1", conv_on_map),
        Rule(r"pre_logits\.fc2", "fc2", one_by_one),
        Rule(r"head\.fc", "head"),
    )


TIMM_VGG = Scheme("timm VGG", rules, preprocessing=IMAGENET, libraries=("timm",), networks=("vgg",))
