"""DistilBERT of Hugging Face's transformers; its classifiers have a layer more, which is our pooler with "relu"."""

from jaxtransfer.pretrained.layouts import bare_weight, embedding, heads
from jaxtransfer.pretrained.scheme import Rule, Scheme

_EMBEDDINGS, _LAYER = r"(?:distilbert\.)?embeddings", r"(?:distilbert\.)?transformer\.layer\.(\d+)"
_PROJECTIONS = ("query", "key", "value", "out")

HUGGINGFACE_DISTILBERT = Scheme(
    "Hugging Face DistilBERT",
    (
        Rule(rf"{_EMBEDDINGS}\.word_embeddings", "stem_words", embedding),
        Rule(rf"{_EMBEDDINGS}\.position_embeddings", "stem_positions", bare_weight),
        Rule(rf"{_EMBEDDINGS}\.LayerNorm", "stem_norm"),
        *(
            Rule(rf"{_LAYER}\.attention\.{one[0] if one != 'out' else one}_lin", rf"stage{{\1}}/attention/{one}", heads)
            for one in _PROJECTIONS
        ),
        Rule(rf"{_LAYER}\.sa_layer_norm", r"stage{\1}/norm1"),
        Rule(rf"{_LAYER}\.ffn\.lin(\d)", r"stage{\1}/fc\2"),
        Rule(rf"{_LAYER}\.output_layer_norm", r"stage{\1}/norm2"),
        Rule(r"pre_classifier", "pooler"),
        Rule(r"classifier", "head"),
    ),
    left_out={
        r"vocab_(?:transform|layer_norm|projector)\..*": "the head of pre-training",
        rf"{_EMBEDDINGS}\.position_ids": "numbers, no weights",
    },
    libraries=("huggingface",),
    networks=("text_encoder",),
)
