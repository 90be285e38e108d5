"""The tables, one a file: of names that libraries give to the layers of a family of networks."""

from jaxtransfer.pretrained.schemes.big_vision_vit import BIG_VISION_VIT
from jaxtransfer.pretrained.schemes.cifar_resnet import CIFAR_RESNET
from jaxtransfer.pretrained.schemes.efficientnet_lite import EFFICIENTNET_LITE, TIMM_EFFICIENTNET_LITE
from jaxtransfer.pretrained.schemes.huggingface_bert import HUGGINGFACE_BERT
from jaxtransfer.pretrained.schemes.huggingface_distilbert import HUGGINGFACE_DISTILBERT
from jaxtransfer.pretrained.schemes.huggingface_resnet import HUGGINGFACE_RESNET
from jaxtransfer.pretrained.schemes.huggingface_vit import HUGGINGFACE_VIT
from jaxtransfer.pretrained.schemes.mobilenet_v2 import TORCHVISION_MOBILENET_V2
from jaxtransfer.pretrained.schemes.own import OWN
from jaxtransfer.pretrained.schemes.timm_vgg import TIMM_VGG
from jaxtransfer.pretrained.schemes.timm_vit import TIMM_VIT
from jaxtransfer.pretrained.schemes.torchvision_resnet import TORCHVISION_RESNET
from jaxtransfer.pretrained.schemes.torchvision_vgg import TORCHVISION_VGG
from jaxtransfer.pretrained.schemes.torchvision_vit import TORCHVISION_VIT

SCHEMES = (
    *(OWN, TORCHVISION_RESNET, HUGGINGFACE_RESNET, CIFAR_RESNET, TORCHVISION_VGG, TIMM_VGG),
    *(TORCHVISION_VIT, TIMM_VIT, HUGGINGFACE_VIT, BIG_VISION_VIT),
    *(EFFICIENTNET_LITE, TIMM_EFFICIENTNET_LITE, TORCHVISION_MOBILENET_V2),
    *(HUGGINGFACE_BERT, HUGGINGFACE_DISTILBERT),
)
"""All of them, in the order in which they are tried."""
