"""Text encoders of Hugging Face's transformers and of sentence-transformers: BERT and MiniLM.

Norms are `gamma` and `beta` in the oldest files, those of bert-base-uncased among them.
"""

from collections.abc import Collection, Mapping

from jaxtransfer.pretrained.layouts import Shapes, bare_weight, direct, embedding, heads
from jaxtransfer.pretrained.scheme import Rule, Scheme

_EMBEDDINGS, _LAYER = r"(?:bert\.)?embeddings", r"(?:bert\.)?encoder\.layer\.(\d+)"
_NORMS = {
    rf"{_EMBEDDINGS}\.LayerNorm": "stem_norm",
    rf"{_LAYER}\.attention\.output\.LayerNorm": r"stage{\1}/norm1",
    rf"{_LAYER}\.output\.LayerNorm": r"stage{\1}/norm2",
}


def _left_out(shapes: Shapes, names: Collection[str]) -> Mapping[str, str]:
    """The pooler is no part of a sentence encoder; where a classifier stands on it, it is no luxury."""
    alone = "params/pooler/kernel" not in shapes and not any(name.startswith("classifier.") for name in names)
    pooler = {r"(?:bert\.)?pooler\..*": "the model has no pooler"} if alone else {}
    numbers = {rf"{_EMBEDDINGS}\.(?:position|token_type)_ids": "numbers, no weights"}
    return {**pooler, **numbers, r"cls\..*": "the heads of pre-training"}


HUGGINGFACE_BERT = Scheme(
    "Hugging Face BERT",
    (
        Rule(rf"{_EMBEDDINGS}\.word_embeddings", "stem_words", embedding),
        Rule(rf"{_EMBEDDINGS}\.position_embeddings", "stem_positions", bare_weight),
        Rule(rf"{_EMBEDDINGS}\.token_type_embeddings", "stem_types", embedding),
        *(Rule(pattern, path) for pattern, path in _NORMS.items()),
        *(Rule(rf"{pattern}\.gamma", f"{path}/scale", direct) for pattern, path in _NORMS.items()),
        *(Rule(rf"{pattern}\.beta", f"{path}/bias", direct) for pattern, path in _NORMS.items()),
        Rule(rf"{_LAYER}\.attention\.self\.(query|key|value)", r"stage{\1}/attention/\2", heads),
        Rule(rf"{_LAYER}\.attention\.output\.dense", r"stage{\1}/attention/out", heads),
        Rule(rf"{_LAYER}\.intermediate\.dense", r"stage{\1}/fc1"),
        Rule(rf"{_LAYER}\.output\.dense", r"stage{\1}/fc2"),
        Rule(r"(?:bert\.)?pooler\.dense", "pooler"),
        Rule(r"classifier", "head"),
    ),
    left_out=_left_out,
    libraries=("huggingface",),
    networks=("text_encoder",),
)
