"""Several deltas of one base: weighted, with weights that may train, or chosen with each batch."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer.context import named_key
from jaxtransfer.deltas.chain import all_for, description_of, elsewhere
from jaxtransfer.deltas.model import Delta, delta
from jaxtransfer.deltas.part import Part, check_parts, nothing
from jaxtransfer.errors import InputError
from jaxtransfer.model import Model, given

WEIGHTS = "weights"


def weighted(parts: Mapping[str, Part], weights: Sequence[float] | None = None, *, learned: bool = False) -> Part:
    """Returns f_source + Σ αᵢ Δᵢ, every Δᵢ a difference from the same base (LoraHub, Huang et al. 2023).

    Args:
      parts: by name; `held(part, params)` for those that are trained already.
      weights: α; 1/n each by default.
      learned: whether α trains: beside the parts, as the parameter `weights` [n].

    Raises:
      InputError: for no part, what is none, one that is called `weights`, another number of weights, and such as are
        not finite.
    """
    names = list(parts)
    alphas = [1 / max(len(names), 1)] * len(names) if weights is None else [float(weight) for weight in weights]
    if not names or WEIGHTS in names or len(alphas) != len(names) or not all(map(math.isfinite, alphas)):
        raise InputError(
            f"weighted takes parts by names other than {WEIGHTS!r}, and a finite weight for each of them; got {names} "
            f"and {alphas}"
        )

    check_parts(parts, "weighted")

    def init(key, weights):
        own: dict[str, Any] = {name: part.fresh(named_key(key, name), weights) for name, part in parts.items()}
        return {**own, WEIGHTS: jnp.asarray(alphas, jnp.float32)} if learned else own

    def fixed(weights):
        return {name: part.constants(weights) for name, part in parts.items()}

    def merge(weights, params, read):
        own = params[WEIGHTS] if learned else alphas
        changed = {
            name: part.merge(part.chosen(weights), params[name], read.get(name, {})) for name, part in parts.items()
        }
        return mixed(weights, [changed[name] for name in names], [own[number] for number in range(len(names))])

    def begin(weights, read):
        changed = [part.begin(part.chosen(weights), read.get(name, {})) for name, part in parts.items()]
        return mixed(weights, changed, alphas)

    def drop(key, weights, params):
        own = {name: part.dropped(named_key(key, name), weights, params[name]) for name, part in parts.items()}
        return {**params, **own}

    about = description_of("weighted", parts, weights=alphas, learned=learned)
    drops = drop if any(part.drop is not None for part in parts.values()) else None
    start = begin if any(elsewhere(part) for part in parts.values()) else nothing
    return Part(init, merge, all_for("a weighted sum"), fixed, start, drops, description=about, parts=dict(parts))


def mixed(weights: Any, changed: Sequence[Mapping[str, Any]], alphas: Sequence[Any]) -> dict[str, Any]:
    """Returns w + Σ αᵢ (wᵢ − w) of the parameters that any of the parts changed."""
    found = {}
    for path in dict.fromkeys(path for values in changed for path in values):
        value = weights[path].value
        terms = [alpha * (own[path] - value) for alpha, own in zip(alphas, changed, strict=True) if path in own]
        found[path] = value + sum(terms)
    return found


def choosing(model: Model, base: Any, parts: Mapping[str, Part], **options: Any) -> Delta:
    """Returns the model of several deltas on one base, of which each batch says which one runs, or with what weights.

    Its inputs are `{"inputs": ..., "delta": ...}`: integers [B], the place of the delta in `parts`, or weights [B, n].
    One delta runs for a whole batch, that of its first row; where there is none of that number, outputs are NaN. All
    train where batches of all of them come. Merged is one alone, by its own name among the parameters:

        one = jt.deltas.delta(model, base, parts["a"])
        jt.deltas.merged(one, {**variables, "params": variables["params"]["a"]})

    Args:
      model: the model of the base.
      base: its variables.
      parts: by name.
      **options: as for `delta`, but for patterns: `part.on(...)`.

    Raises:
      InputError: as `delta` and `weighted` do; when called, for inputs of another form. `merged`, `unmerge` and `l2_sp`
        refuse the model, as only a batch says what its weights are.
    """
    net = delta(model, base, weighted(parts, learned=True), **options)
    count = len(parts)

    def apply(variables, inputs, *, train, key, axis=None, still=None):
        x, which = _apart(inputs, count)
        first = which[0]
        if which.ndim == 1:
            known = (first >= 0) & (first < count)  # another number would run as the base alone
            alphas = jnp.where(known, jax.nn.one_hot(first, count), jnp.nan)
        else:
            alphas = first
        own = {**variables, "params": {**variables["params"], WEIGHTS: alphas}}
        return net.apply(own, x, train=train, key=key, **given(axis=axis, still=still))

    def init(key, inputs):
        variables = net.init(key, _apart(inputs, count)[0])
        return {**variables, "params": {k: v for k, v in variables["params"].items() if k != WEIGHTS}}

    return dataclasses.replace(net, init=init, apply=apply, choices=tuple(parts))


def _apart(inputs: Any, count: int) -> tuple[Any, Any]:
    if not isinstance(inputs, Mapping) or set(inputs) != {"inputs", "delta"}:
        came = sorted(inputs) if isinstance(inputs, Mapping) else f"a {type(inputs).__name__}"
        raise InputError(f"a choice of deltas reads {{'inputs': ..., 'delta': [B]}}; got {came}")
    which = jnp.asarray(inputs["delta"])
    whole = jnp.issubdtype(which.dtype, jnp.integer)
    if not (which.ndim == 1 and whole) and not (which.ndim == 2 and not whole and which.shape[1] == count):
        raise InputError(f"'delta' must be integers [B] or weights [B, {count}]; got {which.dtype}{list(which.shape)}")
    return inputs["inputs"], which
