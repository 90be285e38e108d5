"""A part made again from how it was made: what a run or a file notes."""

from collections.abc import Mapping
from typing import Any

from jaxtransfer.deltas import starts
from jaxtransfer.deltas.ada_lora import ada_lora
from jaxtransfer.deltas.bitfit import bitfit
from jaxtransfer.deltas.boft import boft
from jaxtransfer.deltas.chain import chain
from jaxtransfer.deltas.diff_pruning import diff_pruning
from jaxtransfer.deltas.dora import dora
from jaxtransfer.deltas.fourier_ft import fourier_ft
from jaxtransfer.deltas.full import full
from jaxtransfer.deltas.ia3 import ia3
from jaxtransfer.deltas.lo_ha import lo_ha
from jaxtransfer.deltas.lo_kr import lo_kr
from jaxtransfer.deltas.lora import lora
from jaxtransfer.deltas.norm_tuning import norm_tuning
from jaxtransfer.deltas.oft import oft
from jaxtransfer.deltas.part import Part
from jaxtransfer.deltas.several import weighted
from jaxtransfer.deltas.ssf import ssf
from jaxtransfer.deltas.vera import vera
from jaxtransfer.errors import InputError, unknown

PARTS = {
    make.__name__: make
    for make in (
        *(full, lora, dora, ada_lora, vera, lo_ha, lo_kr, fourier_ft, ia3, ssf),
        *(bitfit, norm_tuning, oft, boft, diff_pruning),
    )
}
"""All parts of this room by name, for tables and command lines."""


def rebuild(description: Mapping[str, Any]) -> Part:
    """Returns the part that `described_part` told of.

    Args:
      description: as JSON holds it.

    Raises:
      InputError: for a kind that is not known, and arguments that it does not take.
    """
    kind = description.get("kind", "")
    if kind in ("chain", "weighted"):
        parts = {name: rebuild(part) for name, part in description["parts"].items()}
        return (
            chain(**parts)
            if kind == "chain"
            else weighted(parts, description["weights"], learned=description["learned"])
        )
    if kind not in PARTS:
        raise unknown("delta", kind, [*PARTS, "chain", "weighted"])
    arguments = dict(description["arguments"])
    if isinstance(arguments.get("start"), str):
        if not hasattr(starts, arguments["start"]):
            raise unknown("start", arguments["start"], ["kaiming", "gaussian", "pissa", "olora"])
        arguments["start"] = getattr(starts, arguments["start"])
    try:
        part = PARTS[kind](**arguments)
    except TypeError as error:
        raise InputError(f"delta {kind!r}: {error}") from None
    return part.on(description.get("only"), as_matrix=description.get("as_matrix"))
