"""Prompts: learned tokens among those that the blocks of a frozen transformer read."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.models.inserts import Drawn, Hook, Insert, Leaves, inserted
from jaxtransfer.models.transformer_blocks import transformer_blocks

_WHAT = "visual_prompts"


def visual_prompts(model: Model, base: Any, *, prompts: int = 10, deep: bool = False, own: tree.Patterns = ()) -> Model:
    """Returns a transformer with learned tokens behind the class token: visual prompt tuning.

    (Jia et al. 2022, arXiv:2203.12119.) With E the tokens, c the class token and P_i the prompts, block L_i gives

        shallow: [c, Z₁, E] = L₁([c, P, E]),   [c, Z_i, E] = L_i([c, Z_{i−1}, E])
        deep:    [c, _, E] = L_i([c, P_{i−1}, E])  in each block

    Prompts start uniform within ±√(6 / (3k² + D)), k the side of the patches, as the paper's; the base's function is
    not kept, as attention reads them from the start. The outputs `stem`, `stage1` ... are the tokens without prompts.
    On a text encoder the shallow form is prompt tuning (Lester et al. 2021, arXiv:2104.08691), the deep one P-tuning v2
    (Liu et al. 2022, arXiv:2110.07602); its mean over tokens takes no prompts.

        net = jt.models.visual_prompts(loaded.model, loaded.variables, prompts=10, deep=True, own="head")

    Args:
      model: of `jt.models.vit` or `jt.models.text_encoder`, or made of one; it may have another head than the base.
      base: the weights that stay: variables, a training state, or a handle `jt.Frozen` on variables.
      prompts: how many, P: PD parameters, 1,920 in ViT-Ti for 10; the deep form has them in each block, 23,040.
      deep: whether each block has prompts of its own.
      own: path patterns of parameters that train beside: the head. They start from the base, or anew where it has none
        of the shape.

    Returns:
      The model. Its parameters are `stem_prompts` [P, D], or `<block>/prompts` of the deep form, and its own.

    Raises:
      InputError: for a base without such blocks, the message names what was looked for, and for no prompts.
    """
    if not isinstance(prompts, int) or prompts < 1:
        raise InputError(f"{_WHAT}: prompts must be a whole number of at least 1; got {prompts!r}")

    def insert(params: Mapping[str, Any]) -> Insert:
        blocks = transformer_blocks(params, (), _WHAT)
        above = blocks[0].above
        stem = "/".join(filter(None, (above, "stem_prompts")))
        patches = params.get("/".join(filter(None, (above, "stem_conv/kernel"))))
        places = {block.path: block.at("prompts") if deep else stem for block in blocks}
        inputs = blocks[0].width if patches is None else math.prod(patches.shape[:3])
        start = functools.partial(_uniform, limit=math.sqrt(6 / (inputs + blocks[0].width)))
        drawn = {place: Drawn(start, (prompts, blocks[0].width)) for place in places.values()}

        def hooks(leaves: Leaves) -> dict[str, Hook]:
            handed: dict[str, jax.Array] = {}  # what the block before made of the prompts

            def reading(block):
                def hook(layer, call, x, *args, **kwargs):
                    own = leaves[places[block]]
                    if deep or block == blocks[0].path:
                        seen = jnp.broadcast_to(own.astype(x.dtype)[None], (x.shape[0], *own.shape))
                    else:
                        seen = handed["prompts"]
                    args = [_attended(value, x, prompts) for value in args]
                    kwargs = {name: _attended(value, x, prompts) for name, value in kwargs.items()}
                    y = call(jnp.concatenate([x[:, :1], seen, x[:, 1:]], 1), *args, **kwargs)
                    handed["prompts"] = y[:, 1 : 1 + prompts]
                    return jnp.concatenate([y[:, :1], y[:, 1 + prompts :]], 1)

                return hook

            return {block.path: reading(block.path) for block in blocks}

        return Insert(drawn, hooks)

    return inserted(model, base, _WHAT, insert, own)


def _attended(value: Any, x: jax.Array, prompts: int) -> Any:
    """Returns a mask [B, T] of the tokens `x` with room for the prompts, which all attend to; the rest as it is."""
    if not hasattr(value, "shape") or value.shape != x.shape[:2]:
        return value
    return jnp.concatenate([value[:, :1], jnp.ones((x.shape[0], prompts), value.dtype), value[:, 1:]], 1)


def _uniform(key: Any, shape: tuple[int, ...], dtype: Any, *, limit: float) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -limit, limit)
