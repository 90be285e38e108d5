"""Full difference: every number of the chosen parameters has its own."""

import jax.numpy as jnp

from jaxtransfer.deltas.part import Choose, Part, anything, described, leafwise


@described
def full() -> Part:
    """Returns w + Δ with a Δ for each number, zeros at first: what full fine-tuning trains, as a delta.

    It changes all parameters by default; a new head trains by `full().on("head")`. Weight decay of Δ is L2-SP.
    """
    return differences(anything)


def differences(choose: Choose) -> Part:
    """Returns w + Δ, zeros at first, of the parameters that `choose` gives."""
    return leafwise(
        lambda key, weight: jnp.zeros(weight.shape, weight.dtype), lambda weight, own: weight.value + own, choose=choose
    )
