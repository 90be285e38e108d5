"""Vision transformers of torchvision."""

from jaxtransfer.pretrained.layouts import direct, fused, heads
from jaxtransfer.pretrained.preprocessing import IMAGENET
from jaxtransfer.pretrained.scheme import Rule, Scheme

_BLOCK = r"encoder\.layers\.encoder_layer_(\d+)"

TORCHVISION_VIT = Scheme(
    "torchvision ViT",
    (
        Rule(r"class_token", "stem_token", direct),
        Rule(r"encoder\.pos_embedding", "stem_position", direct),
        Rule(r"conv_proj", "stem_conv"),
        Rule(rf"{_BLOCK}\.ln_(\d)", r"stage{\1}/norm\2"),
        Rule(rf"{_BLOCK}\.self_attention\.in_proj_(weight|bias)", r"stage{\1}/attention", fused),
        Rule(rf"{_BLOCK}\.self_attention\.out_proj", r"stage{\1}/attention/out", heads),
        Rule(rf"{_BLOCK}\.mlp\.(?:0|linear_1)", r"stage{\1}/fc1"),
        Rule(rf"{_BLOCK}\.mlp\.(?:3|linear_2)", r"stage{\1}/fc2"),
        Rule(r"encoder\.ln", "final_norm"),
        Rule(r"heads\.head", "head"),
    ),
    preprocessing=IMAGENET,
    libraries=("torchvision",),
    networks=("vit",),
)
