"""Text encoders of the BERT family: BERT, MiniLM, DistilBERT, and what sentence-transformers makes of them."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtransfer.errors import InputError, unknown
from jaxtransfer.model import Model
from jaxtransfer.models.layers import Layers
from jaxtransfer.models.linen import linen
from jaxtransfer.models.recipe import recorded
from jaxtransfer.models.text_inputs import ACTIVATIONS, POOLINGS, TextInputs, unit

EPSILON = 1e-12
_NORMAL = nn.initializers.normal(0.02)
SIZES: dict[str, dict[str, Any]] = {
    "minilm-l6": {"width": 384, "depth": 6, "heads": 12},
    "bert-base": {"width": 768, "depth": 12, "heads": 12, "pooler": "tanh"},
    "distilbert-base": {"width": 768, "depth": 6, "heads": 12, "types": 0},
}
"""What the published encoders are, by their names in the zoo."""


class TextBlock(nn.Module):
    """Self-attention, then a perceptron, each added to its input and the sum normalised."""

    heads: int
    hidden: int
    dropout: float
    layers: Layers

    @nn.compact
    def __call__(self, x, mask):
        """Returns the tokens [B, T, D] after the block; `mask` [B, T] says to which of them others attend."""
        layers, width = self.layers, x.shape[-1]
        types = {"dtype": layers.dtype, "param_dtype": layers.param_dtype}
        norm = {"epsilon": EPSILON, "use_fast_variance": False, **types}
        attention = nn.MultiHeadDotProductAttention(
            self.heads,
            kernel_init=_NORMAL,
            dropout_rate=self.dropout,
            broadcast_dropout=False,  # each text draws for itself
            deterministic=not layers.train,
            force_fp32_for_softmax=jnp.promote_types(x.dtype, jnp.float32) != x.dtype,
            name="attention",
            **types,
        )
        y = layers.dropout(self.dropout)(attention(x, mask=mask[:, None, None, :]))
        x = nn.LayerNorm(name="norm1", **norm)(x + y)
        y = nn.gelu(nn.Dense(self.hidden, kernel_init=_NORMAL, name="fc1", **types)(x), approximate=False)
        y = nn.Dense(width, kernel_init=_NORMAL, name="fc2", **types)(y)
        return nn.LayerNorm(name="norm2", **norm)(x + layers.dropout(self.dropout)(y))


class TextEncoder(nn.Module):
    """A transformer over tokens, with learned positions, that normalises behind each part."""

    width: int
    depth: int
    heads: int
    classes: int
    hidden: int
    vocabulary: int
    positions: int
    types: int
    pooler: str | None
    pooling: str
    normalized: bool
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, inputs, *, train: bool = False):
        """Returns the outputs for `inputs`, tokens [B, T]: tokens `stem`, `stage1` ..., features and logits."""
        texts = TextInputs.of(inputs, vocabulary=self.vocabulary, positions=self.positions, types=self.types)
        layers = Layers(train, self.dtype, self.param_dtype, remat=self.remat)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.Embed(self.vocabulary, self.width, embedding_init=_NORMAL, name="stem_words", **types)(texts.tokens)
        position = self.param("stem_positions", _NORMAL, (self.positions, self.width), self.param_dtype)
        x = x + position[None, : x.shape[1]].astype(x.dtype)
        if self.types:
            kinds = jnp.zeros_like(texts.tokens) if texts.types is None else texts.types
            x = x + nn.Embed(self.types, self.width, embedding_init=_NORMAL, name="stem_types", **types)(kinds)
        x = nn.LayerNorm(epsilon=EPSILON, use_fast_variance=False, name="stem_norm", **types)(x)
        x = layers.dropout(self.dropout)(x)
        outputs = {"stem": x}
        for i in range(1, self.depth + 1):
            kind = layers.block(TextBlock, self)
            block = kind(self.heads, self.hidden, self.dropout, layers, name=f"stage{i}")
            outputs[f"stage{i}"] = x = block(x, texts.mask)
        features = POOLINGS[self.pooling](x, texts.mask)
        if self.pooler is not None:
            dense = nn.Dense(self.width, kernel_init=_NORMAL, name="pooler", **types)
            features = ACTIVATIONS[self.pooler](dense(features))
        features = unit(features) if self.normalized else features
        logits = layers.logits(layers.dropout(self.dropout)(features), self.classes)
        return outputs | {"features": features, "logits": logits}


@recorded
def text_encoder(
    classes: int,
    *,
    width: int,
    depth: int,
    heads: int,
    hidden: int | None = None,
    vocabulary: int = 30522,
    positions: int = 512,
    types: int = 2,
    pooler: str | None = None,
    pooling: str | None = None,
    normalized: bool | None = None,
    dropout: float = 0.1,
    name: str = "model",
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
) -> Model:
    """Returns a text encoder of the BERT family (Devlin et al. 2019, arXiv 1810.04805).

    Its inputs are tokens [B, T], whole numbers, 0 for padding; or `{"tokens": ..., "mask": ..., "types": ...}`, each
    [B, T], where another number is padding, or two texts stand in a row: types 0 and 1. A text that is padded further
    gives the same features; one of padding alone gives finite ones, 0 by the mean.

    Each block is a stage: `stem` and `stage1`, ... are tokens [B, T, D] after its normalisation. The features [B, D]
    are pooled from the last; the logits are linear in them, with dropout between.

    Args:
      classes: number of outputs.
      width: width D of the tokens.
      depth: number of blocks.
      heads: number of attention heads, a divisor of the width.
      hidden: width of the perceptrons; four times that of the tokens by default.
      vocabulary: number of tokens.
      positions: the longest text, in tokens; longer ones are refused.
      types: number of token types; 0 for none, as DistilBERT has it.
      pooler: a linear layer behind the pooling and its activation, "tanh" (BERT's) or "relu" (that of DistilBERT's
        classifiers); None for no such layer.
      pooling: "class", the first token, or "mean", that of all tokens of the text; None for what the weights that
        `load_pretrained` finds say, and the class token else.
      normalized: whether features are brought to length 1; None likewise, and no else.
      dropout: rate behind the embedding, in and behind the attention, behind the perceptrons and before the head.
      name: key of the model's weights.
      dtype: type of the computation; None infers it.
      param_dtype: type of the parameters.
      remat: compute each block anew in the backward pass: less memory, about a third more time.
    """
    if heads < 1 or width % heads:
        raise InputError(f"expected a number of heads that divides the width {width}; got {heads}")
    least_of = {"width": (width, 1), "depth": (depth, 1), "vocabulary": (vocabulary, 1), "positions": (positions, 1)}
    for what, (value, least) in {**least_of, "types": (types, 0)}.items():
        if value < least:
            raise InputError(f"expected {what} of {least} at least; got {value}")
    if pooler is not None and pooler not in ACTIVATIONS:
        raise unknown("pooler", pooler, ACTIVATIONS)
    if pooling is not None and pooling not in POOLINGS:
        raise unknown("pooling", pooling, POOLINGS)
    module = TextEncoder(
        width,
        depth,
        heads,
        classes,
        4 * width if hidden is None else hidden,
        vocabulary,
        positions,
        types,
        pooler,
        pooling or "class",
        bool(normalized),
        dropout,
        dtype=dtype,
        param_dtype=param_dtype,
        remat=remat,
    )
    blocks = [f"stage{i}" for i in range(1, depth + 1)]
    last = f"{blocks[-1]}|pooler" if pooler else blocks[-1]
    return linen(module, name=name, stages=("stem_.*", *blocks[:-1], last, "head"))


def minilm_l6(classes: int, **options: Any) -> Model:
    """Returns MiniLM-L6 (Wang et al. 2020, arXiv 2002.10957): 6 blocks of width 384 with 12 heads, 22.6 million.

    Args:
      classes: number of outputs.
      **options: as for `text_encoder`.
    """
    return text_encoder(classes, **{**SIZES["minilm-l6"], **options})


def bert_base(classes: int, **options: Any) -> Model:
    """Returns BERT-base: 12 blocks of width 768 with 12 heads and the pooler, 109.5 million.

    Args:
      classes: number of outputs.
      **options: as for `text_encoder`; sentence encoders have no pooler, `pooler=None`.
    """
    return text_encoder(classes, **{**SIZES["bert-base"], **options})


def distilbert_base(classes: int, **options: Any) -> Model:
    """Returns DistilBERT-base (Sanh et al. 2019, arXiv 1910.01108): 6 blocks of width 768, 66.4 million.

    Args:
      classes: number of outputs.
      **options: as for `text_encoder`; its classifiers have a layer more, `pooler="relu"`.
    """
    return text_encoder(classes, **{**SIZES["distilbert-base"], **options})
