"""Parameter trees by path: patterns that select leaves, masks that must cover, distances.

A path joins the keys of a leaf with slashes, `student/head/kernel`. A pattern is a regular expression that matches
one or more whole consecutive keys of it: `head` selects everything below a key `head`, `stage[12]_.*` two stages,
`head/bias` one leaf.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtransfer.errors import InputError

Patterns = str | Iterable[str]


def path_of(key_path: tuple) -> str:
    """Returns a JAX key path as a path with slashes."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path)


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree keyed by path, in the tree's order."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(by_path: Mapping[str, Any]) -> dict[str, Any]:
    """Returns leaves by path as nested dicts: the inverse of `leaves_by_path` for dicts."""
    out: dict[str, Any] = {}
    for path, leaf in by_path.items():
        *parents, last = path.split("/")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return out


def as_patterns(patterns: Patterns) -> tuple[str, ...]:
    """Returns one pattern or several as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def matches(path: str, patterns: Patterns) -> bool:
    """Returns whether any of the patterns selects the path."""
    return any(_compiled(p).search(path) for p in as_patterns(patterns))


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(rf"(?:^|/)(?:{pattern})(?:/|$)")
    except re.error as error:
        raise InputError(
            f"{pattern!r} is no regular expression ({error}); a pattern is one over keys, such as 'head' or 'stage1_.*'"
        ) from None


def check_used(patterns: Patterns, paths: Iterable[str], what: str) -> None:
    """Raises where a pattern selects none of the paths: most likely it is misspelt."""
    paths = list(paths)
    for pattern in as_patterns(patterns):
        if not any(matches(path, pattern) for path in paths):
            raise InputError(f"{what}: the pattern {pattern!r} selects no parameter; there are {listed(paths)}")


def mask(tree: Any, patterns: Patterns) -> Any:
    """Returns a tree of bools, true where a pattern selects the leaf; each pattern must select something."""
    check_used(patterns, leaves_by_path(tree), "mask")
    return jax.tree_util.tree_map_with_path(lambda path, _: matches(path_of(path), patterns), tree)


def label(tree: Any, rules: Mapping[str, Any]) -> Any:
    """Returns a tree of labels: for each leaf that of the first pattern in `rules` that selects it.

    Raises:
      InputError: where a leaf is selected by no pattern, or a pattern selects nothing at all.
    """
    paths = list(leaves_by_path(tree))
    check_used(rules, paths, "rules")
    if uncovered := [p for p in paths if not matches(p, tuple(rules))]:
        raise InputError(
            f"the patterns {sorted(rules)} must cover every parameter, but leave out {listed(uncovered)}; "
            f"add a last pattern '.*' for the rest"
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, _: next(v for p, v in rules.items() if matches(path_of(path), p)), tree
    )


class Differences(NamedTuple):
    """How a tree differs from the one expected: paths with shapes."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshaped: tuple[str, ...]

    def __str__(self):
        parts = [f"- {p}" for p in self.missing] + [f"+ {p}" for p in self.extra]
        return f"(- missing, + extra) {listed([*parts, *self.misshaped], '; ')}"


def differences(expected: Mapping[str, Any], got: Mapping[str, Any]) -> Differences:
    """Compares two dicts of leaves by path; empty throughout where they agree by path and shape."""
    return Differences(
        tuple(f"{p} {jnp.shape(expected[p])}" for p in expected if p not in got),
        tuple(f"{p} {jnp.shape(got[p])}" for p in got if p not in expected),
        tuple(
            f"{p}: expected {jnp.shape(expected[p])}, got {jnp.shape(got[p])}"
            for p in expected
            if p in got and jnp.shape(expected[p]) != jnp.shape(got[p])
        ),
    )


def matched(params: Any, anchor: Any, exclude: Patterns = ()) -> list[tuple[Any, Any]]:
    """Returns the pairs of leaves that two trees share by path and shape.

    Every leaf of either tree is matched or selected by `exclude` (a replaced head, say).

    Raises:
      InputError: lists the leaves that are neither.
    """
    exclude, ours, theirs = as_patterns(exclude), leaves_by_path(params), leaves_by_path(anchor)
    check_used(exclude, ours.keys() | theirs.keys(), "exclude")
    ours = {p: v for p, v in ours.items() if not matches(p, exclude)}
    theirs = {p: v for p, v in theirs.items() if not matches(p, exclude)}
    if any(wrong := differences(ours, theirs)):
        raise InputError(
            f"the anchor must match the parameters by path and shape {wrong}. Name new layers in exclude=('head',)"
        )
    return [(ours[p], theirs[p]) for p in ours]


def check_arrays(values: Any, what: str, *, floating: bool = False) -> None:
    """Raises where a leaf is no array or, with `floating`, one without a gradient; names its path and its type."""
    for path, leaf in leaves_by_path(values).items():
        where = "/".join(filter(None, (what, path)))
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise InputError(f"expected arrays as leaves; {where} is a {type(leaf).__name__}")
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSUMm":
            raise InputError(f"expected arrays of numbers as leaves; {where} is one of {leaf.dtype}")
        if floating and not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise InputError(
                f"expected parameters of a floating-point type; {where} is {leaf.dtype}{list(leaf.shape)}. What "
                f"doesn't train goes into a collection of its own, beside 'params'"
            )


def listed(items: Iterable[str], separator: str = ", ", limit: int = 12) -> str:
    """Returns the items as one line, the surplus counted."""
    items = list(items)
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more


def count(tree: Any) -> int:
    """Returns the number of scalars in a tree."""
    return sum(int(jnp.size(leaf)) for leaf in jax.tree.leaves(tree))
