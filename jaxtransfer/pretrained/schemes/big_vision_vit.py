"""Vision transformers of big_vision and of its forerunner, `.npz` of Flax: layouts are ours."""

from jaxtransfer.pretrained.layouts import direct
from jaxtransfer.pretrained.preprocessing import Preprocessing
from jaxtransfer.pretrained.scheme import Rule, Scheme

_BLOCK = r"(?:params/)?Transformer/encoderblock_(\d+)"
_LEAF = r"/(scale|bias|kernel)"

BIG_VISION_VIT = Scheme(
    "big_vision ViT",
    (
        Rule(r"(?:params/)?cls", "stem_token", direct),
        Rule(r"(?:params/)?(?:|Transformer/posembed_input/)pos_embedding", "stem_position", direct),
        Rule(rf"(?:params/)?embedding{_LEAF}", r"stem_conv/\1", direct),
        Rule(rf"{_BLOCK}/LayerNorm_0{_LEAF}", r"stage{\1}/norm1/\2", direct),
        Rule(rf"{_BLOCK}/LayerNorm_[12]{_LEAF}", r"stage{\1}/norm2/\2", direct),
        Rule(
            rf"{_BLOCK}/MultiHeadDotProductAttention_[01]/(query|key|value|out){_LEAF}",
            r"stage{\1}/attention/\2/\3",
            direct,
        ),
        Rule(rf"{_BLOCK}/MlpBlock_[03]/Dense_(\d){_LEAF}", r"stage{\1}/fc{\2}/\3", direct),
        Rule(rf"(?:params/)?Transformer/encoder_norm{_LEAF}", r"final_norm/\1", direct),
        Rule(rf"(?:params/)?head{_LEAF}", r"head/\1", direct),
    ),
    left_out={r"(?:opt|extra)/.*": "of the training, not of the network"},
    preprocessing=Preprocessing((224, 224), None, (0.5,) * 3, (0.5,) * 3),
    libraries=("big_vision",),
    networks=("vit",),
)
