"""Norm tuning: the scales and biases of norms alone."""

from jaxtransfer.deltas.full import differences
from jaxtransfer.deltas.layers import norms
from jaxtransfer.deltas.part import Part, described


@described
def norm_tuning() -> Part:
    """Returns scale + Δ and bias + Δ′ for each norm, of layers and batches (Frankle et al. 2021, arXiv:2003.00152).

    (LayerNorm tuning: Zhao et al. 2024, arXiv:2312.11420.) Batch norms that it trains follow the batches in training,
    as they do wherever they train. Δ begins as zeros, so the function is the base's to the bit.
    """
    return differences(norms)
