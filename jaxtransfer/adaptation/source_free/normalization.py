"""Batch norm of the target: its statistics, and the scales and shifts that belong to them."""

import re
from collections.abc import Iterable
from typing import Any

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.forward import frozen
from jaxtransfer.model import Model, state_of
from jaxtransfer.objective import Batch
from jaxtransfer.weights.statistics import recompute_statistics


def ada_bn(model: Model, variables: Any, batches: Iterable[Batch], *, view: str = "image") -> dict[str, Any]:
    """Returns the model's variables with the target's batch statistics in place of the source's: AdaBN.

    (Li et al. 2016, arXiv:1603.04779.) No weight moves and no label is read. It is `jt.recompute_statistics` on the
    target, of layers behind the first batch by batch, so large mixed batches are better:

        adapted = jt.adaptation.ada_bn(model, fitted.state, jt.data.eval_batches(target, 256))
        jt.evaluate(jt.classification(jt.frozen(model.named("adapted"), adapted)), ...)

    Args:
      model: one with batch norm.
      variables: `{"params": ..., **state}`; or a training state, in which the model of this name was trained.
      batches: of the target, such as `jt.data.eval_batches` gives; rows with `mask` 0 are left out.
      view: the entry that the model sees.

    Returns:
      The variables, the parameters as they were.

    Raises:
      InputError: for a model without batch statistics, and where there is no example.
    """
    return recompute_statistics(model, frozen(model, variables).variables.tree, batches, view=view)


def norm_parameters(model: Model, variables: Any) -> tuple[str, ...]:
    """Returns the path patterns of the scales and shifts of a model's batch norm: of layers that have statistics.

    What `tent` trains, for an optimiser: `jt.optim.only(optax.adam(1e-3), norm_parameters(model, variables))`.

    Args:
      model: the model.
      variables: `{"params": ..., **state}`, values or shapes.

    Raises:
      InputError: where no layer has both statistics and parameters.
    """
    return tuple(f"^{re.escape(f'{model.name}/{path}')}$" for path in _norm_paths(model, variables))


def dsbn(model: Model, variables: Any, name: str = "target_model") -> Model:
    """Returns the model's twin for another domain: shared weights, but batch norm of its own (Chang et al. 2019).

    arXiv:1906.03950. The statistics, the scales and the shifts are the domain's; all else learns from both:

        inside = jt.adaptation.dsbn(model, variables, "target_model")
        objective = jt.classification(model).on("source") + jt.adaptation.pseudo_label(inside)

    Of the twin `inside.own(params)` are the parameters that it keeps under its name, to start from the model's.

    Args:
      model: what trains on the source.
      variables: `{"params": ..., **state}` of the model, values or shapes, which tell the layers of batch norm.
      name: of the twin.

    Raises:
      InputError: for a model without batch norm, and as `Model.twin`.
    """
    return model.twin(name, own=tuple(f"^{re.escape(path)}$" for path in _norm_paths(model, variables)))


def _norm_paths(model: Model, variables: Any) -> list[str]:
    """Returns the paths of scales and shifts below the model's parameters."""
    leaves = tree.leaves_by_path(state_of(variables))
    layers = {"/".join(path.split("/")[1:-1]) for path in leaves}  # less the collection, and the statistic's own name
    found = [path for path in tree.leaves_by_path(variables["params"]) if path.rpartition("/")[0] in layers]
    if not found:
        raise InputError(
            f"model {model.name!r} has no layer with both running statistics and parameters of its own, batch norm's "
            f"scale and shift, so there is nothing that belongs to a domain"
        )
    return found
