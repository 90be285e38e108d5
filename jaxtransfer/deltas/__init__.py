"""Deltas: f_target = f_source + Δf, a frozen base and a small difference of its weights that trains alone.

    net = jt.deltas.delta(model, variables, jt.deltas.lora(8), only="attention/(query|value)/kernel")
    fitted = jt.fit(jt.classification(net), optax.adam(1e-3), data, steps=1000)
    whole = jt.deltas.merged(net, fitted.state)          # variables of `model`: run = merged

The model of a delta is a model like any other, so objectives, averages, teachers, few-shot methods and meshes take it.
Stacks are `chain(domain=..., task=...)`. Deltas of one base, merged, are trees for `jt.fusion`:

    jt.fusion.knots(variables, [jt.deltas.merged(net, one) for one in runs])

A part of your own is two pure functions, see `leafwise`.
"""

from jaxtransfer.deltas.base import check_base, digest
from jaxtransfer.deltas.chain import chain, described_part, held, starting
from jaxtransfer.deltas.dora import dora
from jaxtransfer.deltas.full import full
from jaxtransfer.deltas.int8 import Int8, plain
from jaxtransfer.deltas.lora import lora, lora_plus
from jaxtransfer.deltas.model import Delta, base_of, delta, merged, unmerge
from jaxtransfer.deltas.part import Part, anything, described, leafwise, matrices
from jaxtransfer.deltas.starts import eva, gaussian, kaiming, olora, pissa
from jaxtransfer.deltas.weight import Weight, input_axes

__all__ = [
    "Delta",
    "Int8",
    "Part",
    "Weight",
    "anything",
    "base_of",
    "chain",
    "check_base",
    "delta",
    "described",
    "described_part",
    "digest",
    "dora",
    "eva",
    "full",
    "gaussian",
    "held",
    "input_axes",
    "kaiming",
    "leafwise",
    "lora",
    "lora_plus",
    "matrices",
    "merged",
    "olora",
    "pissa",
    "plain",
    "starting",
    "unmerge",
]
