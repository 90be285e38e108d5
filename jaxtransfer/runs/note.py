"""What a run says of its model and its data, so that whoever has its directory alone can use it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtransfer.deltas import Delta
from jaxtransfer.errors import InputError
from jaxtransfer.models.description import describe
from jaxtransfer.runs.configuration import FEATURES, FORMAT, check_config
from jaxtransfer.runs.deltas import BASE, DELTA, delta_note
from jaxtransfer.runs.knowledge import learned_by, named_by
from jaxtransfer.runs.table import TABLE, table_note
from jaxtransfer.runs.tokens import TOKENIZER, tokens_note

_NONE = (None, "")


def noted(
    objective: Any,
    model: Any,
    dataset: Any,
    config: Mapping[str, Any] | None,
    *,
    seed: Any,
    monitor: str | None,
    maximize: bool,
    batches_of: Any = None,
) -> dict[str, Any]:
    """Returns the entries of a run's configuration that `load_run` and the command line read, as JSON types.

    Args:
      objective: what trains.
      model: that which the run is for, of those that the objective trains, or an average of it; None for no entries.
      dataset: what it learns from, or None.
      config: the caller's own entries, which go before these; of a delta `base` is the directory of its base's run.
      seed: of the run.
      monitor: the metric that chooses the checkpoint.
      maximize: whether more of it is better.
      batches_of: the data set that the batches are of, where they say it.

    Raises:
      InputError: for a model that the objective doesn't train, or that has other classes than the data.
    """
    own = dict(config or {})
    if model is None:
        if dataset is not None:
            raise InputError("fit: dataset= says what the classes of model= are; pass both, or model= alone")
        return own
    averaged = getattr(model, "entries", ())  # a moving average lives in the state
    inner = model.model if averaged else model
    trained = next((one for one in objective.models if one.name == getattr(inner, "name", None)), None)
    if trained is None:
        names = sorted(one.name for one in objective.models)
        raise InputError(f"fit: model= is the one that the run is for, of those that the objective trains: {names}")
    if averaged and averaged[0] not in {kept.name for kept in objective.averages}:
        raise InputError(
            f"fit: model= is the average {averaged[0]!r}, which no term keeps; add jt.averaged(model), or "
            f"pass the model"
        )
    if inner is not trained and not _alike(inner, trained):
        raise InputError(
            f"fit: the objective trains another model {trained.name!r} than model=; pass the one that it was made of"
        )
    of = trained.of if isinstance(trained, Delta) else trained
    heads = of.recipe is not None and of.recipe.heads
    known = None if heads and of is not trained else describe(of)  # heads stay behind, and a delta may change them
    entries: dict[str, Any] = {"format": FORMAT, "model": None, **(known or {})}
    if isinstance(trained, Delta):
        entries[DELTA] = delta_note(trained, own.pop(BASE, None))
    learned, outputs = learned_by(objective, trained), entries.get("outputs")
    kind, names = named_by(learned, dataset)
    entries["knows"] = own.get("knows", [FEATURES if heads else kind])
    if names:
        entries["class_names"] = [str(name) for name in names]
        if kind in entries["knows"] and outputs not in (None, len(names)):
            raise InputError(
                f"fit: model {trained.name!r} has {outputs} outputs, and dataset= {len(names)} {kind}; they must be "
                f"the same, or the run knows no classes: config={{'knows': ['features']}}"
            )
        theirs = names if batches_of is None else named_by(learned, batches_of)[1]
        if kind in entries["knows"] and theirs != names and sorted(theirs) == sorted(names):
            raise InputError(
                f"fit: the {kind} of dataset= are {', '.join(names[:3])} ..., and those of the batches in another "
                f"order, {', '.join(theirs[:3])} ...; pass the data set that the batches are of"
            )
        if outputs == len(names):
            del entries["outputs"]
    image = getattr(dataset, "entries", {}).get("image")
    more = {
        "image_shape": [int(size) for size in image.shape] if image is not None and len(image.shape) == 3 else None,
        "data": getattr(dataset, "name", None),
        "split": getattr(dataset, "split", None),
        "average": averaged[0] if averaged else None,
        "heads": heads or None,
        "monitor": monitor,
        "maximize": None if maximize else False,
        TOKENIZER: tokens_note(dataset, trained),
        TABLE: table_note(dataset),
    }
    entries |= {name: value for name, value in more.items() if value not in _NONE}
    if (resizing := getattr(dataset, "resizing", None)) is not None:
        entries |= {"resize": True, "preprocessing": resizing.as_entries()}
    entries |= {"shots": None, "seed": int(seed) if isinstance(seed, int | np.integer) and 0 <= seed < 2**32 else 0}
    check_config({**entries, **own}, "fit(config=)")
    return {**entries, **own}


def _alike(one: Any, other: Any) -> bool:
    """Whether two models have the same weights and outputs, by what is known of their making."""
    known = describe(one) if getattr(one, "recipe", None) is not None else None
    return known is not None and known == describe(other)
