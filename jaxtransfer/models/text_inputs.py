"""What a text encoder reads, tokens with their mask, and how it makes one vector of a text's tokens."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxtransfer.errors import InputError, unknown

PADDING = 0
_NAMES = ("tokens", "mask", "types")


class TextInputs(NamedTuple):
    """A batch of texts.

    Attributes:
      tokens: numbers of word pieces [B, T].
      mask: bool [B, T], false where there is none.
      types: numbers of the kinds [B, T], which of two texts a token is of; None for the first one throughout.
    """

    tokens: jax.Array
    mask: jax.Array
    types: jax.Array | None

    @classmethod
    def of(cls, inputs: Any, *, vocabulary: int, positions: int, types: int) -> "TextInputs":
        """Returns a batch of texts, checked.

        Args:
          inputs: tokens [B, T], where 0 is padding; or a mapping with `tokens`, and with `mask` and `types` or without.
          vocabulary: number of tokens that are known.
          positions: the longest text that is possible.
          types: number of kinds that are known, 0 for none.

        Raises:
          InputError: for what are no tokens, or too long a text. Numbers that stand for no token raise where they are
            known, outside of compiled functions; within, their vectors are NaN.
        """
        given = dict(inputs) if isinstance(inputs, Mapping) else {"tokens": inputs}
        for name in given:
            if name not in _NAMES or (name == "types" and not types):
                raise unknown("input of a text encoder", name, _NAMES if types else _NAMES[:2])
        if "tokens" not in given:
            raise InputError(f"expected the tokens of texts, alone or under 'tokens'; got {', '.join(given) or 'none'}")
        given = {name: jnp.asarray(value) for name, value in given.items()}
        tokens = given["tokens"]
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise InputError(
                f"expected tokens of texts, whole numbers [B, T]; got {tokens.dtype} {tokens.shape}; a tokenizer makes "
                f"them, view='tokens' names their column"
            )
        if not 1 <= tokens.shape[1] <= positions:
            raise InputError(
                f"texts have 1 to {positions} tokens, as many as there are positions; got {tokens.shape[1]}; cut them: "
                f"length={positions} of the tokenizer"
            )
        for name, value in given.items():
            if value.shape != tokens.shape:
                raise InputError(f"expected {name} of the tokens' shape {tokens.shape}; got {value.shape}")
        mask = given["mask"] != 0 if "mask" in given else tokens != PADDING
        kinds = _known("types", given["types"], types) if "types" in given else None
        return cls(_known("tokens", tokens, vocabulary), mask, kinds)


def class_token(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the first token's vector [B, D].

    Args:
      tokens: vectors [B, T, D].
      mask: bool [B, T], where a token stands.
    """
    return tokens[:, 0]


def masked_mean(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mean [B, D] of the vectors where a token stands; 0 where none does.

    Args:
      tokens: vectors [B, T, D]; it adds up in at least float32.
      mask: bool [B, T], where a token stands.
    """
    wide = tokens.astype(jnp.promote_types(tokens.dtype, jnp.float32))
    total = jnp.sum(jnp.where(mask[..., None], wide, 0), 1)
    return (total / jnp.maximum(jnp.sum(mask, 1, keepdims=True), 1).astype(wide.dtype)).astype(tokens.dtype)


POOLINGS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {"class": class_token, "mean": masked_mean}
"""How one vector is made of a text's tokens, by the name that a run notes."""
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"tanh": jnp.tanh, "relu": jax.nn.relu}
"""What follows the pooler's linear layer: BERT's and DistilBERT's."""


def unit(vectors: jax.Array) -> jax.Array:
    """Returns vectors [B, D] over their lengths, in at least float32; 0 of 0, with derivatives of 0.

    Args:
      vectors: the vectors.
    """
    wide = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
    square = jnp.sum(wide * wide, -1, keepdims=True)
    short = square <= 1e-24  # of lengths up to 1e-12, as PyTorch's normalize has it
    long = wide * jax.lax.rsqrt(jnp.where(short, 1, square))
    return jnp.where(short, jax.lax.stop_gradient(wide * 1e12), long).astype(vectors.dtype)  # its derivative is 1e12


def _known(name: str, numbers: jax.Array, count: int) -> jax.Array:
    """Returns numbers of rows of a table; of those out of its range, one whose row is NaN: never another's."""
    wrong = (numbers < 0) | (numbers >= count)
    if not isinstance(wrong, Tracer) and bool(jnp.any(wrong)):
        raise InputError(
            f"expected {name} from 0 to {count - 1}, as the model knows; got {int(numbers[wrong][0])}; take the "
            f"tokenizer that came with the weights"
        )
    return jnp.where(wrong, count, numbers)
