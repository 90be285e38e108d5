"""TIES: task vectors trimmed to their largest entries, added where their signs agree."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxtransfer import tree
from jaxtransfer.fusion.consensus import Consensus, disjoint_mean, elected
from jaxtransfer.fusion.leaves import as_list, check_alike, check_share, double, fused, is_mixed, is_state, wide
from jaxtransfer.fusion.task_vectors import merged


def ties(
    base: Any,
    models: Sequence[Any],
    *,
    density: float = 0.2,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    consensus: Consensus = disjoint_mean,
    least: int = 0,
    whole: bool = False,
) -> Any:
    """Returns w₀ + λ · consensus(trim τᵢ): trim, elect signs, merge what agrees (Yadav et al. 2023, arXiv:2306.01708).

    Of each task vector τᵢ = wᵢ − w₀ the largest ⌊density · n⌋ of the n entries of a leaf stay. The two released forms
    differ once models have weights, and `consensus=` names them:

    - `jt.fusion.disjoint_mean` is **peft's**: the unweighted τ elect the sign, and Σ aᵢτᵢ over those that agree is
      divided by how many they are. With weights of 1 it is the paper's.
    - `jt.fusion.weighted_disjoint_mean` is **mergekit's**: the weighted aᵢτᵢ elect, and their sum is divided by the sum
      of the weights that agree.

    The order of the models does not matter, unless entries of one size stand at the threshold.

    Args:
      base: w₀, what all were fine-tuned from.
      models: wᵢ, one or more.
      density: the share of entries that stays, in [0, 1]; 0.2 in the paper.
      weights: a, one number a model; 1 each by default.
      scale: λ; 1 in the paper.
      consensus: makes one vector of all, see above; with `by_count=True` (functools.partial) the majority of signs
        elects.
      least: how many entries stay in each leaf at least, for small ones such as biases: 0 in peft, 1 in mergekit since
        0.1.5. A density of 0 drops all in any case.
      whole: rank over the whole task vector, as the paper does, and not leaf by leaf, as both libraries do. Of entries
        of one size at the threshold the first stay (the paper's code keeps them all, and one entry more).

    Returns:
      A tree of the same structure and types. Batch statistics are to be renewed: `jt.fusion.renewed`.

    Raises:
      InputError: for a density outside of [0, 1], and for models of different architectures.
    """
    check_share(density, "density")
    kept = _kept_of_whole(base, models, density) if whole else None

    def trimmed(vector, path, number):
        return trim(vector, density, least=least) if kept is None else vector * kept[number][path]

    return merged(base, models, trimmed, weights=weights, scale=scale, consensus=consensus)


def agreeing(
    base: Any,
    models: Sequence[Any],
    *,
    density: float = 0.2,
    whole: bool = True,
    least: int = 0,
    by_count: bool = False,
) -> list[Any]:
    """Returns w₀ + Φ(τᵢ) of each model: its largest changes of the elected sign, and elsewhere the base.

    What TIES adds up, model by model. AdaMerging++ (Yang et al. 2024, arXiv:2310.02575) learns the coefficients of
    these, and so keeps models from working against each other:

        experts = jt.fusion.agreeing(base, experts)
        merger = jt.fusion.merger(model, base, experts)  # and on as jt.fusion.ada_merging says

    Args:
      base: w₀, what all were fine-tuned from.
      models: wᵢ, one or more.
      density: the share of entries that stays before signs are elected, in [0, 1].
      whole: rank over the whole task vector, as the released code does; or leaf by leaf.
      least: as for `ties`, leaf by leaf.
      by_count: elect the sign that more models have, whatever the size of their changes.

    Returns:
      A tree a model, of the same structure and types, its running state its own. Each entry is the model's or the
      base's, to the bit.

    Raises:
      InputError: for a density outside of [0, 1], and for models of different architectures.
    """
    check_share(density, "density")
    kept = _kept_of_whole(base, models, density) if whole else None
    masks: dict[str, list[np.ndarray]] = {}

    def chosen(path: str, values: list[np.ndarray], start: Any) -> list[np.ndarray]:
        if path not in masks:
            vectors = [double(value) - double(start) for value in values]
            if kept is None:
                vectors = [trim(vector, density, least=least) for vector in vectors]
            else:
                vectors = [vector * own[path] for vector, own in zip(vectors, kept, strict=True)]
            masks[path] = elected(vectors, by_count)
        return masks[path]

    def of_model(number: int) -> Any:
        return fused(
            models,
            lambda path, values, start: np.where(chosen(path, values, start)[number], values[number], start),
            base=base,
            state=lambda path, values, _: values[number],
        )

    return [of_model(number) for number in range(len(models))]


def trim(vector: np.ndarray, density: float, *, least: int = 0) -> np.ndarray:
    """Returns a vector with its largest ⌊density · n⌋ entries by magnitude, and zeros for the others.

    Args:
      vector: of any shape, n entries.
      density: at least 0; from 1 on all stay.
      least: so many stay unless the density is 0.
    """
    return vector * _largest(vector, density, least).reshape(vector.shape)


def _largest(vector: np.ndarray, density: float, least: int = 0) -> np.ndarray:
    """Returns which entries of a flattened vector are the largest; of equal ones the first."""
    count = vector.size if density >= 1 else int(density * vector.size)
    count = max(count, least) if density > 0 else 0
    mask = np.zeros(vector.size, bool)
    mask[np.argsort(-np.abs(vector).reshape(-1), kind="stable")[:count]] = True
    return mask


def _kept_of_whole(base: Any, models: Sequence[Any], density: float) -> list[dict[str, np.ndarray]]:
    check_alike([base, *as_list(models)], names=("the base",))
    ours = {p: v for p, v in tree.leaves_by_path(base).items() if is_mixed(v) and not is_state(base, p)}
    kept = []
    for model in models:
        theirs = tree.leaves_by_path(model)
        vectors = {p: double(wide(theirs[p])) - double(wide(start)) for p, start in ours.items()}
        mask = _largest(np.concatenate([np.zeros(0), *(v.reshape(-1) for v in vectors.values())]), density)
        ends = np.cumsum([vector.size for vector in vectors.values()])[:-1]
        parts = np.split(mask, ends) if vectors else []
        kept.append({p: part.reshape(v.shape) for (p, v), part in zip(vectors.items(), parts, strict=True)})
    return kept
