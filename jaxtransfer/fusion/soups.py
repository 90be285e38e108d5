"""Greedy soups: models that make the average better, one after another."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtransfer.errors import InputError
from jaxtransfer.fusion.averages import average
from jaxtransfer.fusion.leaves import as_list, check_alike, check_finite


class Soup(NamedTuple):
    """What a greedy soup came to.

    Attributes:
      tree: the average of its members.
      members: their places in the list of models, in the order in which they went in.
      score: of the average.
      scores: of the models alone, in their order.
    """

    tree: Any
    members: tuple[int, ...]
    score: float
    scores: tuple[float, ...]


def greedy_soup(
    models: Sequence[Any], score: Callable[[Any], float], *, renew: Callable[[Any], Any] | None = None
) -> Soup:
    """Returns the greedy soup: from the best model on, each goes in if the average of all members does not score worse.

    (Wortsman et al. 2022, arXiv:2203.05482, recipe 1.) It is at least as good as its best member, on what `score`
    looks at: validation data, not the test set. Of models that score alike the first comes first; otherwise their
    order does not matter. It scores 2N − 1 trees.

    Args:
      models: trees of one architecture.
      score: `score(tree) -> number`, the higher the better: accuracy on validation data.
      renew: `renew(tree) -> tree`, applied to each average before it is scored: batch statistics anew,
        `lambda v: jt.fusion.renewed(model, v, batches)`.

    Returns:
      The soup, its members and the scores.

    Raises:
      InputError: for models of different architectures, for weights that are not finite, and for a score that is not a
        number.
    """
    check_alike(as_list(models))
    check_finite(models)

    def scored(candidate: Any, what: str) -> float:
        value = float(score(candidate))
        if math.isnan(value):
            raise InputError(f"the score of {what} is not a number; a soup needs scores that can be compared")
        return value

    scores = tuple(scored(model, f"model {number}") for number, model in enumerate(models))
    order = sorted(range(len(models)), key=lambda number: (-scores[number], number))
    members, best, tree = (order[0],), scores[order[0]], models[order[0]]
    for number in order[1:]:
        candidate = average([models[one] for one in (*members, number)])
        candidate = candidate if renew is None else renew(candidate)
        reached = scored(candidate, f"the average of models {(*members, number)}")
        if reached >= best:
            members, best, tree = (*members, number), reached, candidate
    return Soup(tree, members, best, scores)
