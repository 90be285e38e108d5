"""Prefix tuning: learned keys and values that the attention of a frozen transformer reads beside its own."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.models.inserts import Drawn, Hook, Insert, Leaves, inserted
from jaxtransfer.models.transformer_blocks import TransformerBlock, transformer_blocks

_WHAT = "prefix_tuning"


def prefix_tuning(
    model: Model, base: Any, *, prefix: int = 10, only: tree.Patterns = (), own: tree.Patterns = ()
) -> Model:
    """Returns a transformer whose attention reads learned keys and values before those of the tokens.

    (Li and Liang 2021, arXiv:2101.00190.) head = softmax(q [P_k, K]ᵀ / √d) [P_v, V], where P_k and P_v [P, d] are each
    head's own, in each block. They are drawn with a standard deviation of 0.02, directly, without the perceptron that
    the paper makes them by in training; the base's function is not kept, as softmax shares its weight with them.

        net = jt.models.prefix_tuning(loaded.model, loaded.variables, prefix=10, own="head")

    Args:
      model: of `jt.models.vit` or `jt.models.text_encoder`, or made of one; it may have another head than the base.
      base: the weights that stay: variables, a training state, or a handle `jt.Frozen` on variables.
      prefix: how many, P; it adds 2PD parameters a block, 46,080 in ViT-Ti for 10.
      only: path patterns of the blocks that get a prefix; all by default.
      own: path patterns of parameters that train beside: the head. They start from the base, or anew where it has none
        of the shape.

    Returns:
      The model. Its parameters are `<block>/prefix/keys` and `<block>/prefix/values` [P, heads, d], and its own.

    Raises:
      InputError: for a base without such blocks, the message names what was looked for, and for no prefix.
    """
    if not isinstance(prefix, int) or prefix < 1:
        raise InputError(f"{_WHAT}: prefix must be a whole number of at least 1; got {prefix!r}")

    def insert(params: Mapping[str, Any]) -> Insert:
        blocks = transformer_blocks(params, only, _WHAT)
        draw = nn.initializers.normal(0.02)
        drawn = {
            block.at(f"prefix/{name}"): Drawn(draw, (prefix, block.heads, block.head_width))
            for block in blocks
            for name in ("keys", "values")
        }

        def hooks(leaves: Leaves) -> dict[str, Hook]:
            return {path: hook for block in blocks for path, hook in _of_block(block, leaves, prefix).items()}

        return Insert(drawn, hooks)

    return inserted(model, base, _WHAT, insert, own)


def _of_block(block: TransformerBlock, leaves: Leaves, prefix: int) -> dict[str, Hook]:
    def before(name):
        own = leaves[block.at(f"prefix/{name}")]

        def hook(layer, call, x):
            y = call(x)  # [B, N, heads, d]
            return jnp.concatenate([jnp.broadcast_to(own.astype(y.dtype)[None], (y.shape[0], *own.shape)), y], 1)

        return hook

    def attention(layer, call, *args, mask=None, **kwargs):
        if mask is None:
            return call(*args, **kwargs)
        seen = jnp.ones((*mask.shape[:-1], prefix), mask.dtype)
        return call(*args, mask=jnp.concatenate([seen, mask], -1), **kwargs)

    return {
        block.at("attention"): attention,
        block.at("attention/key"): before("keys"),
        block.at("attention/value"): before("values"),
    }
