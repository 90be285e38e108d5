"""ResNets of Hugging Face's transformers."""

from jaxtransfer.pretrained.preprocessing import IMAGENET
from jaxtransfer.pretrained.scheme import Rule, Scheme

_BLOCK = r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)"

HUGGINGFACE_RESNET = Scheme(
    "Hugging Face ResNet",
    (
        Rule(r"(?:resnet\.)?embedder\.embedder\.convolution", "stem_conv"),
        Rule(r"(?:resnet\.)?embedder\.embedder\.normalization", "stem_norm"),
        Rule(rf"{_BLOCK}\.layer\.(\d)\.convolution", r"stage{\1}_block{\2}/conv{\3}"),
        Rule(rf"{_BLOCK}\.layer\.(\d)\.normalization", r"stage{\1}_block{\2}/norm{\3}"),
        Rule(rf"{_BLOCK}\.shortcut\.convolution", r"stage{\1}_block{\2}/shortcut_conv"),
        Rule(rf"{_BLOCK}\.shortcut\.normalization", r"stage{\1}_block{\2}/shortcut_norm"),
        Rule(r"classifier\.1", "head"),
    ),
    preprocessing=IMAGENET,
    libraries=("huggingface",),
    networks=("resnet",),
)
