"""Penalties that hold the parameters where they were, or small: the anchors of transfer learning."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxtransfer import losses, tree
from jaxtransfer.errors import InputError
from jaxtransfer.losses._numerics import check_strength
from jaxtransfer.objective import Mean, Objective
from jaxtransfer.weights import Frozen


def _penalty(name: str, strength: float, frozen: tuple[Frozen, ...], value) -> Objective:
    check_strength(strength)

    def loss(outputs, params, state, batch, ctx):
        penalty = strength * value(params, *map(ctx.read, frozen))
        return penalty, state, {name: Mean(penalty, jnp.ones((), penalty.dtype))}

    return Objective(name, (), loss, frozen=frozen)


def _check_fisher(fisher: Any) -> None:
    """Raises for a weight that is known and negative or not finite, naming its leaf."""
    for path, leaf in tree.leaves_by_path(fisher).items():
        if isinstance(leaf, jax.core.Tracer) or not getattr(leaf, "is_fully_addressable", True):
            continue
        values = np.asarray(leaf)
        if not np.all(good := np.isfinite(values) & (values >= 0)):
            raise InputError(
                f"Fisher weights must be finite and not negative; leaf {path!r} holds {values[~good].ravel()[0]}"
            )


def l2_sp(anchor: Any, *, strength: float = 1.0, exclude: tree.Patterns = ()) -> Objective:
    """Builds strength · ½‖w − w₀‖² over the parameters that the anchor has (L2-SP, Li et al. 2018, arXiv:1802.01483).

    Args:
      anchor: w₀, a tree like `params`: a dict by model name. It is an argument of the compiled step.
      strength: α of the paper.
      exclude: path patterns of new layers, which the anchor lacks or has in another shape: `("head",)`.

    Returns:
      An objective with the metric `l2_sp`.

    Raises:
      InputError: for a strength that is negative or not finite; at init, listing each parameter that is neither matched
        by path and shape nor excluded.
    """
    return _penalty("l2_sp", strength, (Frozen(anchor),), lambda w, w0: losses.l2_sp(w, w0, exclude=exclude))


def fisher_l2_sp(anchor: Any, fisher: Any, *, strength: float = 1.0, exclude: tree.Patterns = ()) -> Objective:
    """Builds strength · ½ Σ_j F_j (w_j − w₀_j)²: L2-SP-Fisher, the penalty of EWC (Kirkpatrick et al. 2017).

    Args:
      anchor: w₀, a tree like `params`.
      fisher: F, a tree like `anchor`: see `fisher_diagonal`.
      strength: the weight of the penalty.
      exclude: path patterns of new layers.

    Returns:
      An objective with the metric `fisher_l2_sp`.

    Raises:
      InputError: for a strength or a weight of F that is negative or not finite; at init, where a parameter is neither
        matched nor excluded.
    """

    _check_fisher(fisher)

    def value(params, w0, weights):
        return losses.fisher_l2_sp(params, w0, weights, exclude=exclude)

    return _penalty("fisher_l2_sp", strength, (Frozen(anchor), Frozen(fisher)), value)


def l2(*, strength: float = 1.0, only: tree.Patterns = ".*") -> Objective:
    """Builds strength · ½‖w‖², weight decay as a term of the loss.

    Args:
      strength: the weight; β of L2-SP where `only` names the new layers.
      only: path patterns of the parameters it is for; all by default.

    Returns:
      An objective with the metric `l2`.

    Raises:
      InputError: for a strength that is negative or not finite; at init, where a pattern selects no parameter.
    """

    def value(params):
        selected = tree.mask(params, only)
        return losses.l2([w for w, take in zip(*map(jax.tree.leaves, (params, selected)), strict=True) if take])

    return _penalty("l2", strength, (), value)
