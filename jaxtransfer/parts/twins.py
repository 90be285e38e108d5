"""Parameters that two models share but for some: taking these apart, and putting them in the others' places."""

from typing import Any

import jax

from jaxtransfer import tree
from jaxtransfer.tree import Patterns

Tree = Any


def apart(params: Tree, own: Patterns, what: str) -> dict[str, Any]:
    """Returns the leaves that the patterns select, as nested dicts.

    Raises:
      InputError: where a pattern selects none.
    """
    leaves = tree.leaves_by_path(params)
    tree.check_used(own, leaves, what)
    return tree.nested({path: leaf for path, leaf in leaves.items() if tree.matches(path, own)})


def joined(shared: Tree, own: Tree) -> Tree:
    """Returns `shared` with the leaves of `own` in the places of its own."""
    mine = tree.leaves_by_path(own)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: mine.get(tree.path_of(path), leaf), shared)
