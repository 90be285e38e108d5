"""BitFit: the biases alone."""

from jaxtransfer.deltas.full import differences
from jaxtransfer.deltas.layers import biases
from jaxtransfer.deltas.part import Part, described


@described
def bitfit() -> Part:
    """Returns bias + Δ for each bias, of layers and norms (Ben Zaken et al. 2022, arXiv:2106.10199).

    Δ begins as zeros, so the function is the base's to the bit.
    """
    return differences(biases)
