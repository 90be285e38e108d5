"""Deltas: f_target = f_source + Δf, a frozen base and a small difference of its weights that trains alone.

    net = jt.deltas.delta(model, variables, jt.deltas.lora(8), only="attention/(query|value)/kernel")
    fitted = jt.fit(jt.classification(net), optax.adam(1e-3), data, steps=1000)
    whole = jt.deltas.merged(net, fitted.state)          # variables of `model`: run = merged

The model of a delta is a model like any other, so objectives, averages, teachers, few-shot methods and meshes take it.
Stacks are `chain(domain=..., task=...)`. Deltas of one base, merged, are trees for `jt.fusion`:

    jt.fusion.knots(variables, [jt.deltas.merged(net, one) for one in runs])

A part of your own is two pure functions, see `leafwise`.
"""

from jaxtransfer.deltas.ada_lora import ada_lora, orthogonality, within_budget
from jaxtransfer.deltas.base import check_base, digest
from jaxtransfer.deltas.bitfit import bitfit
from jaxtransfer.deltas.boft import boft
from jaxtransfer.deltas.chain import chain, described_part, held, starting
from jaxtransfer.deltas.diff_pruning import diff_pruning, pruned, sparsity
from jaxtransfer.deltas.dora import dora
from jaxtransfer.deltas.fourier_ft import fourier_ft
from jaxtransfer.deltas.full import full
from jaxtransfer.deltas.ia3 import ia3
from jaxtransfer.deltas.int8 import Int8, plain
from jaxtransfer.deltas.lo_ha import lo_ha
from jaxtransfer.deltas.lo_kr import lo_kr
from jaxtransfer.deltas.lora import lora, lora_plus
from jaxtransfer.deltas.model import Delta, base_of, delta, merged, unmerge
from jaxtransfer.deltas.norm_tuning import norm_tuning
from jaxtransfer.deltas.oft import oft
from jaxtransfer.deltas.part import Part, anything, described, leafwise, matrices
from jaxtransfer.deltas.penalty import l2_sp
from jaxtransfer.deltas.quantize import quantize
from jaxtransfer.deltas.rebuild import PARTS, rebuild
from jaxtransfer.deltas.several import choosing, weighted
from jaxtransfer.deltas.ssf import ssf
from jaxtransfer.deltas.starts import eva, gaussian, kaiming, olora, pissa
from jaxtransfer.deltas.vera import vera
from jaxtransfer.deltas.weight import Weight, input_axes

__all__ = [
    "PARTS",
    "Delta",
    "Int8",
    "Part",
    "Weight",
    "ada_lora",
    "anything",
    "base_of",
    "bitfit",
    "boft",
    "chain",
    "check_base",
    "choosing",
    "delta",
    "described",
    "described_part",
    "diff_pruning",
    "digest",
    "dora",
    "eva",
    "fourier_ft",
    "full",
    "gaussian",
    "held",
    "ia3",
    "input_axes",
    "kaiming",
    "l2_sp",
    "leafwise",
    "lo_ha",
    "lo_kr",
    "lora",
    "lora_plus",
    "matrices",
    "merged",
    "norm_tuning",
    "oft",
    "olora",
    "orthogonality",
    "pissa",
    "plain",
    "pruned",
    "quantize",
    "rebuild",
    "sparsity",
    "ssf",
    "starting",
    "unmerge",
    "vera",
    "weighted",
    "within_budget",
]
