"""Deltas over deltas: any number of them, in any order, each on what the one before made."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.context import named_key
from jaxtransfer.deltas.part import Part, check_params, check_parts, nothing
from jaxtransfer.deltas.weight import Layout, Weights
from jaxtransfer.errors import InputError
from jaxtransfer.tree import Patterns


def chain(**parts: Part) -> Part:
    """Returns f_source + Δ₁ + Δ₂ + …: each part changes what the one before it made of the base.

        jt.deltas.chain(low=jt.deltas.lora(8).on("stage.*kernel"), head=jt.deltas.full().on("head"))

    Parts are any, twice the same one or a chain too; each may have patterns of its own, `part.on(...)`. Because every
    part is a function from weights to weights, running and merging are one thing in any order, DoRA over DoRA too.

    Args:
      **parts: by name, which is the first key of their parameters: `jt.optim.freeze(optimizer, "domain")` trains the
        others alone. `held(part, params)` takes one that is trained already out of the parameters.

    Raises:
      InputError: for no part, and where patterns are given for the whole chain.
    """
    if not parts:
        raise InputError("a chain of deltas needs one part or more: jt.deltas.chain(low=jt.deltas.lora(8))")
    check_parts(parts, "a chain")

    def init(key, weights):
        own = {}
        for name, part in parts.items():
            own[name] = part.fresh(named_key(key, name), weights)
            weights = part.begun(weights, part.constants(weights))
        return own

    def fixed(weights):
        found = {}
        for name, part in parts.items():
            found[name] = part.constants(weights)
            weights = part.begun(weights, found[name])
        return found

    def values(before, after):
        return {path: after[path].held for path in before if after[path].held is not before[path].held}

    def merge(weights, params, fixed):
        after = weights
        for name, part in parts.items():
            after = part.merged(after, params[name], fixed.get(name, {}))
        return values(weights, after)

    def begin(weights, fixed):
        after = weights
        for name, part in parts.items():
            after = part.begun(after, fixed.get(name, {}))
        return values(weights, after)

    def drop(key, weights, params):
        return {name: part.dropped(named_key(key, name), weights, params[name]) for name, part in parts.items()}

    before = list(parts.values())[:-1]
    about = None if any(elsewhere(part) for part in before) else description_of("chain", parts)
    start = begin if any(elsewhere(part) for part in parts.values()) else nothing
    drops = drop if any(part.drop is not None for part in parts.values()) else None
    return Part(init, merge, all_for("a chain"), fixed, start, drops, description=about, parts=parts)


def starting(part: Part, params: Any) -> Part:
    """Returns the same part with given first parameters, which then train on.

    Args:
      part: the part.
      params: as it has them: those of an earlier run.

    Raises:
      InputError: for what is no part; on a base, for parameters that are not the part's.
    """

    check_parts({"part": part}, "starting")

    def init(key, weights):
        check_params(part, weights, params, "starting")
        return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)

    def begin(weights, fixed):
        return part.merge(weights, params, fixed)

    return dataclasses.replace(part, init=init, begin=begin)


def held(part: Part, params: Any) -> Part:
    """Returns the part at given parameters that no longer train: an earlier delta under a new one.

        jt.deltas.chain(domain=jt.deltas.held(domain, trained), task=jt.deltas.lora(4))

    They are held as the base is, beside it.

    Args:
      part: the part.
      params: as it has them: those of an earlier run.

    Raises:
      InputError: for what is no part; on a base, for parameters that are not the part's.
    """

    check_parts({"part": part}, "held")

    def fixed(weights):
        check_params(part, weights, params, "held")
        return {"params": params, "fixed": part.fixed(weights)}

    def merge(weights, _, read):
        return part.merge(weights, read["params"], read.get("fixed", {}))

    def begin(weights, read):
        return merge(weights, {}, read)

    return dataclasses.replace(
        part, init=lambda key, weights: {}, merge=merge, fixed=fixed, begin=begin, drop=None, description=None
    )


def elsewhere(part: Part) -> bool:
    """Returns whether a part begins as another function than the base: what stands behind it then depends on that."""
    return part.begin is not nothing


def all_for(what: str):
    """Returns the choice of a part made of parts: everything, as each of them chooses for itself."""

    def choose(weights: Weights, only: Patterns | None, as_matrix: Layout | None):
        if only is not None or as_matrix is not None:
            raise InputError(f"patterns are for the parts of {what}, not for the whole: jt.deltas.lora(8).on('stage1')")
        return dict(weights)

    return choose


def description_of(kind: str, parts: Mapping[str, Part], **arguments: Any) -> dict[str, Any] | None:
    """Returns how a part made of parts was made; None where one of them can't say."""
    own = {name: described_part(part) for name, part in parts.items()}
    return None if any(value is None for value in own.values()) else {"kind": kind, "parts": own, **arguments}


def described_part(part: Part) -> dict[str, Any] | None:
    """Returns how a part was made and where it stands, as JSON holds it; None where an argument was no plain data."""
    if part.description is None:
        return None
    where: dict[str, Any] = {}
    if part.only is not None:
        where["only"] = [part.only] if isinstance(part.only, str) else list(part.only)
    if part.as_matrix is not None:
        where["as_matrix"] = {pattern: list(axes) for pattern, axes in part.as_matrix.items()}
    return {**part.description, **where}
