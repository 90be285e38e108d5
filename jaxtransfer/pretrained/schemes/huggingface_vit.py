"""Vision transformers of Hugging Face's transformers, with the names of version 5 and of those before."""

from jaxtransfer.pretrained.layouts import direct, heads
from jaxtransfer.pretrained.scheme import Rule, Scheme

_EMBEDDINGS = r"(?:vit\.)?embeddings"
_OLD, _NEW = r"(?:vit\.)?encoder\.layer\.(\d+)", r"(?:vit\.)?layers\.(\d+)"
_BLOCK = r"(?:vit\.)?(?:encoder\.layer|layers)\.(\d+)"
_PROJECTIONS = ("query", "key", "value")

HUGGINGFACE_VIT = Scheme(
    "Hugging Face ViT",
    (
        Rule(rf"{_EMBEDDINGS}\.cls_token", "stem_token", direct),
        Rule(rf"{_EMBEDDINGS}\.position_embeddings", "stem_position", direct),
        Rule(rf"{_EMBEDDINGS}\.patch_embeddings\.projection", "stem_conv"),
        Rule(rf"{_BLOCK}\.layernorm_before", r"stage{\1}/norm1"),
        Rule(rf"{_BLOCK}\.layernorm_after", r"stage{\1}/norm2"),
        Rule(rf"{_OLD}\.attention\.attention\.(query|key|value)", r"stage{\1}/attention/\2", heads),
        Rule(rf"{_OLD}\.attention\.output\.dense", r"stage{\1}/attention/out", heads),
        Rule(rf"{_OLD}\.intermediate\.dense", r"stage{\1}/fc1"),
        Rule(rf"{_OLD}\.output\.dense", r"stage{\1}/fc2"),
        *(Rule(rf"{_NEW}\.attention\.{one[0]}_proj", rf"stage{{\1}}/attention/{one}", heads) for one in _PROJECTIONS),
        Rule(rf"{_NEW}\.attention\.o_proj", r"stage{\1}/attention/out", heads),
        Rule(rf"{_NEW}\.mlp\.fc(\d)", r"stage{\1}/fc\2"),
        Rule(r"(?:vit\.)?layernorm", "final_norm"),
        Rule(r"classifier", "head"),
    ),
    left_out={r"(?:vit\.)?pooler\..*": "the pooler stands beside the classifier", r".*mask_token": "for masked images"},
    libraries=("huggingface",),
    networks=("vit",),
)
