"""One run of each model on all that its terms show it, so that batch norm sees every domain."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtransfer.forward import Forward
from jaxtransfer.objective import Objective

Views = tuple[tuple[str, ...], ...]


def together(objective: Objective) -> Objective:
    """Returns the same objective with each model run once, on all views that its terms read, joined into one batch.

    In (1/n) Σᵢ L(f(sᵢ)) + (1/m) Σⱼ D(f(tⱼ)) the losses stay those of their own rows; what changes is what the model
    sees: batch norm normalises source and target by the statistics of both, in one update of its running means, where
    two runs would normalise each domain by its own and update twice.

        source, target = jt.classification(model).on("source"), entropy(model).on("target")
        objective = jt.together(source + 0.1 * target)  # of batches {"source": {...}, "target": {...}}

    Views may differ in their number of rows, 24 and 8 say; no row changes its device. Frozen and averaged models run
    once, too. Terms that stand outside run theirs by themselves: `together(a + b) + c`. Objectives that run models
    inside of their loss (`maml`) do that as before; there it goes inside, `maml(together(...))`.

    Args:
      objective: any; as with `.on`, a sum stays a sum of its terms.

    Returns:
      An objective over the same parameters, state and batches, with the same metrics. What its models draw (dropout)
      is another draw.

    Raises:
      InputError: where a batch is seen, for views of one model that differ in more than their number of rows.
    """
    runs: dict[Any, list[Forward]] = {}
    for forward in objective.forwards:
        runs.setdefault((forward.model, forward.variables, forward.parts), []).append(forward)
    joint = {forward: _joined(members) for members in runs.values() for forward in members}
    if not objective.is_sum:
        return _reading(objective, joint)
    total = objective.summed.each(lambda term: _reading(term, joint))
    functions = {"loss": total, "setup": total.setup, "check": total.check}
    return dataclasses.replace(objective, forwards=tuple(joint.values()), **functions)


def _joined(members: list[Forward]) -> Forward:
    """Returns one run on all views of several, each of them once."""
    first, *more = dict.fromkeys(view for forward in members for view in forward.views)
    return dataclasses.replace(members[0], view=first, more=tuple(more))


def _reading(term: Objective, joint: Mapping[Forward, Forward]) -> Objective:
    """Returns a term that finds the outputs of its own forwards among those of the joined ones."""

    def own(outputs):
        return {forward: _of_views(outputs[joint[forward]], joint[forward].views, forward) for forward in term.forwards}

    def loss(outputs, params, state, batch, ctx):
        return term.loss(own(outputs), params, state, batch, ctx)

    return dataclasses.replace(
        term,
        forwards=tuple(joint[forward] for forward in term.forwards),
        loss=loss,
        check=lambda outputs, batch: term.check(own(outputs), batch),
    )


def _of_views(outputs: Any, views: Views, forward: Forward) -> Any:
    """Returns what a forward's own run would have given: a tuple where it has several views."""
    by_view = dict(zip(views, outputs if len(views) > 1 else (outputs,), strict=True))
    found = tuple(by_view[view] for view in forward.views)
    return found if forward.more else found[0]
