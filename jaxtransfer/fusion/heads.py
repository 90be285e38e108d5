"""Class heads in one order of classes, told by the names of the classes."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxtransfer import tree
from jaxtransfer.errors import InputError
from jaxtransfer.fusion.leaves import like


def match_heads(variables: Any, names: Sequence[str], to_names: Sequence[str], *, head: tree.Patterns = "head") -> Any:
    """Returns a tree whose head gives the classes in another order: what models need before they are fused.

    Args:
      variables: the tree, whose head's last axis is that of the classes: a kernel [D, C], a bias [C].
      names: the classes as its head has them, C names.
      to_names: the same names in the order wanted.
      head: path patterns of the head.

    Returns:
      The tree with its head in the new order; all other leaves are the same objects.

    Raises:
      InputError: where one has a class that the other lacks, for a name twice, and for a head of another size.
    """
    names, to_names = [str(name) for name in names], [str(name) for name in to_names]
    for what, given in (("names", names), ("to_names", to_names)):
        if twice := next((name for name in given if given.count(name) > 1), None):
            raise InputError(f"{what}: classes are told by name, but {twice!r} is there twice")
    lacking = [name for name in to_names if name not in names]
    extra = [name for name in names if name not in to_names]
    if lacking or extra:
        raise InputError(
            f"heads of the same classes can be fused; this one lacks {tree.listed(map(repr, lacking)) or 'none'} and "
            f"has besides {tree.listed(map(repr, extra)) or 'none'}. Fuse the bodies and train a head, or leave it out"
        )
    order = np.array([names.index(name) for name in to_names])
    tree.check_used(head, tree.leaves_by_path(variables), "head")

    def matched(key_path, leaf):
        path = tree.path_of(key_path)
        if not tree.matches(path, head):
            return leaf
        if leaf.ndim < 1 or leaf.shape[-1] != len(names):
            raise InputError(f"{path!r} {list(leaf.shape)} is no head of {len(names)} classes: its last axis is theirs")
        return like(np.take(np.asarray(jax.device_get(leaf)), order, axis=-1), leaf)

    return jax.tree_util.tree_map_with_path(matched, variables)
