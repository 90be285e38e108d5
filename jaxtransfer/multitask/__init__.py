"""Many tasks at once: how their gradients, or their losses, are weighed against each other."""

from jaxtransfer.multitask.balance import balance
from jaxtransfer.multitask.mgda import mgda
from jaxtransfer.multitask.pcgrad import pcgrad

__all__ = ["balance", "mgda", "pcgrad"]
