"""Bottleneck adapters in the blocks of a frozen transformer: Houlsby's, Pfeiffer's, parallel ones, AdaptFormer.

An adapter is A(x) = s · (act(x W_down + b_down) W_up + b_up) with W_down [D, m] and W_up [m, D]. W_down starts uniform
within ±1/√D, the rest as zeros, so that the network starts as the base, to the bit; it computes in float32 at least.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model
from jaxtransfer.models.inserts import Drawn, Hook, Insert, Leaves, inserted
from jaxtransfer.models.transformer_blocks import TransformerBlock, transformer_blocks

Activation = Callable[[jax.Array], jax.Array]
ATTENTION, MLP = "attention_adapter", "mlp_adapter"
_zeros = nn.initializers.zeros


def houlsby(
    model: Model,
    base: Any,
    *,
    bottleneck: int = 64,
    activation: Activation = nn.gelu,
    scale: float = 1.0,
    only: tree.Patterns = (),
    own: tree.Patterns = (),
) -> Model:
    """Returns a transformer with two serial adapters in each block, behind the attention and behind the perceptron.

    (Houlsby et al. 2019, arXiv:1902.00751.) h + A(h), where h is what either gives before it is added to the tokens.
    The paper normalises anew as well: `own="head|norm[12]|final_norm"`.

        loaded = jt.load_pretrained(source, jt.models.vit_ti(20), reinit="head")
        net = jt.models.houlsby(loaded.model, loaded.variables, bottleneck=12, own="head")
        jt.fit(jt.classification(net), ...)

    Args:
      model: of `jt.models.vit` or `jt.models.text_encoder`, or made of one; it may have another head than the base.
      base: the weights that stay: variables, a training state, or a handle `jt.Frozen` on variables.
      bottleneck: m; it adds 2 (2Dm + D + m) parameters a block, 115,488 in ViT-Ti for 12 and 595,968 for 64.
      activation: between the two layers.
      scale: s.
      only: path patterns of the blocks that get adapters; all by default.
      own: path patterns of parameters that train beside; they start from the base, or anew where it has none of the
        shape. What stays runs in inference mode.

    Returns:
      The model. Its parameters are `<block>/attention_adapter` and `<block>/mlp_adapter` with `down` and `up` each, and
      its own; the base is in `frozen`.

    Raises:
      InputError: for a base without such blocks, the message names what was looked for; at init, for weights of another
        model.
    """

    def hooks(block: TransformerBlock, leaves: Leaves) -> dict[str, Hook]:
        def serial(name):
            def hook(layer, call, *args, **kwargs):
                h = call(*args, **kwargs)
                return h + _adapter(h, leaves, block.at(name), activation, scale)

            return hook

        return {block.at("attention"): serial(ATTENTION), block.at("fc2"): serial(MLP)}

    return _adapted(model, base, "houlsby", (ATTENTION, MLP), hooks, bottleneck, only, own)


def pfeiffer(
    model: Model,
    base: Any,
    *,
    bottleneck: int = 64,
    activation: Activation = nn.relu,
    scale: float = 1.0,
    only: tree.Patterns = (),
    own: tree.Patterns = (),
) -> Model:
    """Returns a transformer with one serial adapter in each block, behind the perceptron and its addition.

    (Pfeiffer et al. 2021, AdapterFusion, arXiv:2005.00247.) With x the tokens and h what the perceptron gives of them,
    x + h + A(x + h) where blocks normalise before their parts (ViT); and N(x + h + A(N(x + h))), N the block's last
    normalisation, where behind (BERT).

    Args:
      model: as for `houlsby`.
      base: likewise.
      bottleneck: m; it adds 2Dm + D + m parameters a block, 57,744 in ViT-Ti for 12 and 297,984 for 64.
      activation: between the two layers.
      scale: s.
      only: path patterns of the blocks that get adapters; all by default.
      own: path patterns of parameters that train beside, see `houlsby`.

    Returns:
      The model. Its parameters are `<block>/mlp_adapter`, and its own.

    Raises:
      InputError: as `houlsby` does.
    """

    def hooks(block: TransformerBlock, leaves: Leaves) -> dict[str, Hook]:
        done = {"fc2": False, "adapted": False}

        def adapter(x):
            return _adapter(x, leaves, block.at(MLP), activation, scale)

        def perceptron(layer, call, *args, **kwargs):
            done["fc2"] = True
            return call(*args, **kwargs)

        def norm(layer, call, x):
            if not done["fc2"]:  # it stands before the perceptron
                return call(x)
            done["adapted"] = True
            normalised = layer.clone(parent=None).apply(layer.variables, x)  # a layer is called once in a pass
            return call(x + adapter(normalised))

        def whole(layer, call, *args, **kwargs):
            done.update(fc2=False, adapted=False)
            y = call(*args, **kwargs)
            return y if done["adapted"] else y + adapter(y)

        return {block.at("fc2"): perceptron, block.at("norm2"): norm, block.path: whole}

    return _adapted(model, base, "pfeiffer", (MLP,), hooks, bottleneck, only, own)


def parallel_adapter(
    model: Model,
    base: Any,
    *,
    bottleneck: int = 64,
    activation: Activation = nn.relu,
    scale: float = 4.0,
    mlp: bool = True,
    attention: bool = False,
    only: tree.Patterns = (),
    own: tree.Patterns = (),
) -> Model:
    """Returns a transformer with adapters beside the parts of its blocks: f(x) + A(x) for f(x).

    (He et al. 2022, arXiv:2110.04366, "scaled parallel adapter".) x is what the perceptron, or the attention, reads.

    Args:
      model: as for `houlsby`.
      base: likewise.
      bottleneck: m; an adapter has 2Dm + D + m parameters: 57,744 in ViT-Ti for 12 beside each perceptron.
      activation: between the two layers.
      scale: s; the paper's 4.
      mlp: whether perceptrons get one.
      attention: whether attentions get one.
      only: path patterns of the blocks that get adapters; all by default.
      own: path patterns of parameters that train beside, see `houlsby`.

    Returns:
      The model. Its parameters are `<block>/mlp_adapter` and `<block>/attention_adapter`, and its own.

    Raises:
      InputError: as `houlsby` does, and for neither of the two places.
    """
    if not mlp and not attention:
        raise InputError("parallel_adapter needs a place: mlp=True, attention=True, or both")
    return _beside(model, base, "parallel_adapter", bottleneck, activation, scale, mlp, attention, only, own)


def adapt_former(
    model: Model,
    base: Any,
    *,
    bottleneck: int = 64,
    activation: Activation = nn.relu,
    scale: float = 0.1,
    only: tree.Patterns = (),
    own: tree.Patterns = (),
) -> Model:
    """Returns a transformer with AdaptMLP in each block: f(x) + A(x) for the perceptron f.

    (Chen et al. 2022, AdaptFormer, arXiv:2205.13535.) x are the normalised tokens that the perceptron reads, s is 0.1
    and m 64, the paper's. There dropout of 0.1 stands between the adapter's layers; here none does.

    Args:
      model: as for `houlsby`.
      base: likewise.
      bottleneck: m; it adds 2Dm + D + m parameters a block, 297,984 in ViT-Ti.
      activation: between the two layers.
      scale: s.
      only: path patterns of the blocks that get adapters; all by default.
      own: path patterns of parameters that train beside, see `houlsby`.

    Returns:
      The model. Its parameters are `<block>/mlp_adapter`, and its own.

    Raises:
      InputError: as `houlsby` does.
    """
    return _beside(model, base, "adapt_former", bottleneck, activation, scale, True, False, only, own)


def _beside(model, base, what, bottleneck, activation, scale, mlp, attention, only, own) -> Model:
    def hooks(block: TransformerBlock, leaves: Leaves) -> dict[str, Hook]:
        read: dict[str, jax.Array] = {}

        def beside(layer, call, x, *args, **kwargs):
            return call(x, *args, **kwargs) + _adapter(x, leaves, block.at(ATTENTION), activation, scale)

        def first(layer, call, x):
            read["x"] = x
            return call(x)

        def second(layer, call, hidden):
            return call(hidden) + _adapter(read["x"], leaves, block.at(MLP), activation, scale)

        found: dict[str, Hook] = {block.at("fc1"): first, block.at("fc2"): second} if mlp else {}
        return {**found, **({block.at("attention"): beside} if attention else {})}

    names = ((ATTENTION,) if attention else ()) + ((MLP,) if mlp else ())
    return _adapted(model, base, what, names, hooks, bottleneck, only, own)


def _adapted(model, base, what, names, hooks, bottleneck, only, own) -> Model:
    if not isinstance(bottleneck, int) or bottleneck < 1:
        raise InputError(f"{what}: bottleneck must be a whole number of at least 1; got {bottleneck!r}")

    def insert(params):
        blocks = transformer_blocks(params, only, what)
        drawn: dict[str, Drawn] = {}
        for block in blocks:
            for name in names:
                at, width = block.at(name), block.width
                drawn[f"{at}/down/kernel"] = Drawn(uniform, (width, bottleneck))
                drawn[f"{at}/down/bias"] = Drawn(_zeros, (bottleneck,))
                drawn[f"{at}/up/kernel"] = Drawn(_zeros, (bottleneck, width))
                drawn[f"{at}/up/bias"] = Drawn(_zeros, (width,))

        def all_hooks(leaves):
            return {path: hook for block in blocks for path, hook in hooks(block, leaves).items()}

        return Insert(drawn, all_hooks)

    return inserted(model, base, what, insert, own)


def uniform(key: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns a kernel uniform within ±1/√(number of inputs), as PyTorch draws its linear layers.

    Args:
      key: of the draw.
      shape: inputs, outputs.
      dtype: its type.
    """
    return jax.random.uniform(key, shape, dtype, -1, 1) / shape[0] ** 0.5


def _adapter(x, leaves: Leaves, at: str, activation: Activation, scale: float) -> jax.Array:
    def linear(x, name):
        kernel, bias = leaves[f"{at}/{name}/kernel"], leaves[f"{at}/{name}/bias"]
        wide = x.astype(jnp.promote_types(x.dtype, kernel.dtype))
        return wide @ kernel + bias.reshape((1,) * (x.ndim - 1) + (-1,))

    return (scale * linear(activation(linear(x, "down")), "up")).astype(x.dtype)
