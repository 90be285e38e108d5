"""Diff pruning: a difference that learns where it is zero."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.deltas.part import Part, anything, described, leafwise
from jaxtransfer.errors import InputError
from jaxtransfer.objective import Mean, Objective

LOW, HIGH = -1.5, 1.5  # ends to which the gates are stretched before they are cut to [0, 1]


@described
def diff_pruning(*, initial: float = 5.0) -> Part:
    """Returns w + z(g) ∘ Δ, with z(g) = min(1, max(0, σ(g) (h − l) + l)) (Guo et al. 2021, arXiv:2012.07463).

    Each number has a difference and a gate; `sparsity(net)` pulls the gates shut, and `pruned` keeps the largest
    differences alone. z is the gate's value at evaluation: the paper draws it anew for each batch in training, which
    gives a gate gradient where z is 0 or 1; here σ keeps it until z is cut off. Δ begins as zeros, so the function is
    the base's to the bit.

    Args:
      initial: what the gates g begin as; above 1.1 they begin open, z = 1.
    """

    def init(key, weight):
        return {"delta": jnp.zeros(weight.shape, weight.dtype), "gate": jnp.full(weight.shape, initial, weight.dtype)}

    return leafwise(init, lambda weight, own: weight.value + _open(own["gate"]) * own["delta"], choose=anything)


def sparsity(*, strength: float = 1.0) -> Objective:
    """Builds strength · mean P(z ≠ 0) over all gates, P = σ(g − log(−l/h)): the expected share of changed numbers.

    Args:
      strength: the weight.

    Raises:
      InputError: in use, where nothing that trains has gates.
    """

    def loss(outputs, params, state, batch, ctx):
        leaves = tree.leaves_by_path(params)
        gates = [leaves[f"{above}gate"] for above in _gated(leaves)]
        if not gates:
            raise InputError("sparsity: nothing that trains has gates; jt.deltas.diff_pruning() makes them")
        whole = jnp.concatenate([gate.reshape(-1) for gate in gates])
        value = strength * jnp.mean(jax.nn.sigmoid(whole - jnp.log(-LOW / HIGH)))
        return value, state, {"sparsity": Mean(value, jnp.ones((), value.dtype))}

    return Objective("sparsity", (), loss)


def pruned(params: Any, density: float) -> Any:
    """Returns parameters of `diff_pruning` in which only the largest |zΔ| are left, over all layers together.

    Args:
      params: of the delta, or of all models.
      density: the share of numbers that stay, in [0, 1].

    Raises:
      InputError: for another density, and where nothing has gates.
    """
    leaves = tree.leaves_by_path(params)
    pairs = {above: f"{above}delta" for above in _gated(leaves)}
    if not pairs or not 0 <= density <= 1:
        raise InputError(f"pruned takes parameters with gates and a density in [0, 1]; got {len(pairs)} and {density}")
    sizes = {own: jnp.abs(_open(leaves[above + "gate"]) * leaves[own]) for above, own in pairs.items()}
    ranked = jnp.sort(jnp.concatenate([size.reshape(-1) for size in sizes.values()]))[::-1]
    keep = round(density * ranked.size)
    least = ranked[keep - 1] if keep else jnp.inf

    def cut(key_path, leaf):
        path = tree.path_of(key_path)
        return jnp.where(sizes[path] >= least, leaf, 0) if path in sizes else leaf

    return jax.tree_util.tree_map_with_path(cut, params)


def _gated(leaves: Any) -> list[str]:
    """Returns the paths, up to the last slash, under which a difference and its gate stand."""
    found = [path[: -len("gate")] for path in leaves if path.split("/")[-1] == "gate"]
    return [above for above in found if f"{above}delta" in leaves]


def _open(gate: jax.Array) -> jax.Array:
    return jnp.clip(jax.nn.sigmoid(gate) * (HIGH - LOW) + LOW, 0, 1)
