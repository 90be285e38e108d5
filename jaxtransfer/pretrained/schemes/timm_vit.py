"""Vision transformers of timm, of DeiT, DINO and MAE: query, key and value in one layer.

What they expect of images differs from one to the next (augreg's are normalised by 0.5, DeiT's by ImageNet's mean): the
`config.json` beside them says it.
"""

from jaxtransfer.pretrained.layouts import direct, fused, heads
from jaxtransfer.pretrained.scheme import Rule, Scheme

TIMM_VIT = Scheme(
    "timm ViT",
    (
        Rule(r"cls_token", "stem_token", direct),
        Rule(r"pos_embed", "stem_position", direct),
        Rule(r"patch_embed\.proj", "stem_conv"),
        Rule(r"blocks\.(\d+)\.norm(\d)", r"stage{\1}/norm\2"),
        Rule(r"blocks\.(\d+)\.attn\.qkv", r"stage{\1}/attention", fused),
        Rule(r"blocks\.(\d+)\.attn\.proj", r"stage{\1}/attention/out", heads),
        Rule(r"blocks\.(\d+)\.mlp\.fc(\d)", r"stage{\1}/fc\2"),
        Rule(r"norm", "final_norm"),
        Rule(r"head", "head"),
    ),
    libraries=("timm",),
    networks=("vit",),
)
