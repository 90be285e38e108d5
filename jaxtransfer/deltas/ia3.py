"""(IA)³: a factor for each output of a layer, or for each of its inputs."""

import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.deltas.layers import bias_of, kernels_and_biases
from jaxtransfer.deltas.part import Part, at, described


@described
def ia3(*, feedforward: tree.Patterns = ()) -> Part:
    """Returns l ∘ (Wx + bias), a factor l [O] for each output (Liu et al. 2022, arXiv:2205.05638).

    Of the layers that `feedforward` selects it is W(l ∘ x) + bias, a factor for each input, of a convolution for each
    channel; of one in groups, which a kernel doesn't tell, for each channel of a group, the same for all groups. The
    paper scales keys, values and what the second layer of each perceptron sees:
    `ia3(feedforward="fc2").on("(key|value|fc2)/kernel")`. l begins as ones, so the function is the base's to the bit.

    Args:
      feedforward: path patterns of kernels whose inputs are scaled.
    """

    def choose(weights, only, as_matrix):
        tree.check_used(feedforward, weights, "feedforward")
        return kernels_and_biases(weights, only, as_matrix)

    def kernels(weights):
        return {path: weight for path, weight in weights.items() if weight.inputs is not None}

    def init(key, weights):
        def count(path, weight):
            return weight.rows // weight.taps if tree.matches(path, feedforward) else weight.columns

        return tree.nested(
            {path: {"factor": jnp.ones(count(path, w), w.dtype)} for path, w in kernels(weights).items()}
        )

    def merge(weights, params, fixed):
        found = {}
        for path, weight in kernels(weights).items():
            factor = at(params, path)["factor"]
            if tree.matches(path, feedforward):
                found[path] = weight.value * weight.beside(jnp.repeat(factor, weight.taps), of_inputs=True)
                continue
            found[path] = weight.value * weight.beside(factor)
            if (bias := bias_of(path, weights)) is not None:
                found[bias] = weights[bias].value * factor.reshape(weights[bias].shape)
        return found

    return Part(init, merge, choose)
