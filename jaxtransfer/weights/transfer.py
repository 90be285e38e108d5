"""Moving pretrained weights into another model, with a report of what happened to each leaf."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtransfer import tree
from jaxtransfer.errors import InputError


class Report(NamedTuple):
    """What became of each leaf: paths, and `path (shape)` where something did not fit.

    Attributes:
      copied: taken from the source.
      reinitialized: kept fresh because a pattern in `reinit` selects it.
      missing: kept fresh because the source has no such leaf.
      extra: in the source only, left out.
      misshaped: kept fresh because the source's has another shape.
    """

    copied: tuple[str, ...]
    reinitialized: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshaped: tuple[str, ...]

    def __str__(self):
        counts = ", ".join(f"{len(paths)} {kind}" for kind, paths in self._asdict().items())
        details = [
            f"  {kind}: {', '.join(paths)}" for kind, paths in self._asdict().items() if paths and kind != "copied"
        ]
        return "\n".join([counts, *details])


class Transferred(NamedTuple):
    """The merged tree and the report."""

    params: Any
    report: Report


def transfer(source_params: Any, into: Any, *, reinit: tree.Patterns = (), strict: bool = True) -> Transferred:
    """Copies pretrained weights into a fresh tree, by path and shape.

    Args:
      source_params: the pretrained weights.
      into: fresh weights of the new model, which give the structure and dtypes; copied, never changed.
      reinit: path patterns of the leaves that stay fresh: a new head. What the source has there is left behind.
      strict: raise for leaves that are missing, extra or of another shape beyond `reinit`; if false they are only
        reported, and the fresh ones stay.

    Returns:
      `(params, report)`, `params` of the structure of `into`.

    Raises:
      InputError: where something does not fit, with the whole list, or a pattern selects nothing.
    """
    ours, theirs = tree.leaves_by_path(into), tree.leaves_by_path(source_params)
    tree.check_used(reinit, ours.keys() | theirs.keys(), "reinit")
    fresh = tuple(p for p in ours if tree.matches(p, reinit))
    wrong = tree.differences(
        {p: v for p, v in ours.items() if p not in fresh},
        {p: v for p, v in theirs.items() if not tree.matches(p, reinit)},
    )
    if strict and any(wrong):
        raise InputError(
            f"the source does not fit {wrong}. Name the layers to start afresh in reinit=('head',), or pass "
            f"strict=False to keep fresh weights wherever it does not fit"
        )
    copied = tuple(p for p in ours if p in theirs and p not in fresh and jnp.shape(ours[p]) == jnp.shape(theirs[p]))
    if not copied:
        raise InputError(f"nothing was transferred: the source shares no leaf with the model {wrong}")
    taken = set(copied)

    def pick(key_path, leaf):
        path = tree.path_of(key_path)
        return jnp.array(theirs[path] if path in taken else leaf, jnp.asarray(leaf).dtype, copy=True)

    merged = jax.tree_util.tree_map_with_path(pick, into)
    return Transferred(merged, Report(copied, fresh, *wrong))
