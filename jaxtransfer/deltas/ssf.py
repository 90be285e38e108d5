"""SSF: scale and shift what each layer gives."""

import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.deltas.layers import bias_of, layers
from jaxtransfer.deltas.part import Part, at, described


@described
def ssf() -> Part:
    """Returns γ ∘ layer(x) + β for each linear layer, convolution and norm (Lian et al. 2022, arXiv:2210.08823).

    Merged into the layer: γW and γ·bias + β. A layer without a bias is scaled alone; the shift is then that of the norm
    behind it. γ begins as ones and β as zeros (the paper draws them near), so the function is the base's to the bit.
    It is for all layers by default.
    """

    def main(weights):
        return {path: weight for path, weight in weights.items() if weight.inputs is not None}

    def init(key, weights):
        own = {}
        for path, weight in main(weights).items():
            own[path] = {"scale": jnp.ones(weight.columns, weight.dtype)}
            if bias_of(path, weights) is not None:
                own[path]["shift"] = jnp.zeros(weight.columns, weight.dtype)
        return tree.nested(own)

    def merge(weights, params, fixed):
        found = {}
        for path, weight in main(weights).items():
            own = at(params, path)
            found[path] = weight.value * weight.beside(own["scale"])
            if (bias := bias_of(path, weights)) is not None:
                shape = weights[bias].shape
                found[bias] = weights[bias].value * own["scale"].reshape(shape) + own["shift"].reshape(shape)
        return found

    return Part(init, merge, layers)
