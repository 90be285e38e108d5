"""A scheme turned around: from leaves of ours to the tensors of a library, by the same table that reads them."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxtransfer.errors import InputError
from jaxtransfer.pretrained.layouts import KINDS, Layout
from jaxtransfer.pretrained.scheme import Rule, Scheme, translate

_RAISED = re.compile(r"\\\{\\\\(\d+)\\\}")  # `{\1}` and `\1` of a path, once `re.escape` has been over it
_PLAIN = re.compile(r"\\\\(\d+)")


class Names(NamedTuple):
    """Leaves of ours by the names of a library.

    Attributes:
      scheme: the table.
      tensors: by its names.
      left: paths of leaves that it has no name for.
      idle: how many of its rows had nothing to name.
    """

    scheme: Scheme
    tensors: dict[str, np.ndarray]
    left: list[str]
    idle: int


def tensors_out(leaves: Mapping[str, np.ndarray], scheme: Scheme) -> Names:
    """Returns the tensors of a library that leaves of ours are.

    Each tensor is read back by the table before it is taken: it gives its leaves, bit by bit, or another name is tried.

    Args:
      leaves: by path, `params/...` and `batch_stats/...`.
      scheme: the table.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    rules = scheme.table(shapes)
    out: dict[str, np.ndarray] = {}
    done: set[str] = set()
    layers, idle = _layers(leaves), 0
    for rule in rules:
        before = len(out)
        if not isinstance(rule.how, Layout):
            raise InputError(f"the scheme {scheme.name!r} can only be read: {rule.path!r} has no Layout that writes")
        path_pattern = _pattern_of_path(rule)
        for path in layers:
            match = re.fullmatch(path_pattern, path)
            if match is None:
                continue
            for kind, value in rule.how.write(path, leaves).items():
                for name in _names(rule, match, kind):
                    read = translate(name, value, rules, shapes)
                    if name in out or read is None or done & read.keys() or not _same(read, leaves):
                        continue
                    out[name] = np.ascontiguousarray(value)
                    done |= read.keys()
                    break
        idle += len(out) == before
    return Names(scheme, out, [path for path in leaves if path not in done], idle)


def layer_names(rule: Rule, path: str) -> list[str]:
    """Returns the names that a rule may give to our layer at a path, the usual one first; none of another rule's."""
    match = re.fullmatch(_pattern_of_path(rule), path)
    if match is None:
        return []
    return [name.removesuffix(".weight") for name in _names(rule, match, "weight")]


def spellings(pattern: str, groups: Mapping[int, str]) -> list[str]:
    """Returns the strings that a pattern of a table stands for, the usual one first.

    Args:
      pattern: text, escaped signs, groups, `(?:a|b)`, `(?:a)?` and `[ab]`: what tables are written in.
      groups: what each group holds, by number.

    Raises:
      InputError: for other signs outside of groups, which stand for too many strings.
    """
    found, end, _ = _alternatives(pattern, 0, 1, groups)
    if end != len(pattern):
        raise _unspeakable(pattern)
    return found


def _layers(leaves: Iterable[str]) -> list[str]:
    """Returns what a rule's path may be: each leaf's, with and without its collection, and those above it."""
    found: dict[str, None] = {}
    for path in leaves:
        words = path.split("/")
        found[path] = None
        found |= dict.fromkeys("/".join(words[1:end]) for end in range(2, len(words) + 1))
    return list(found)


def _pattern_of_path(rule: Rule) -> str:
    """Returns the regular expression of the paths that a rule gives, its groups under their numbers."""
    inside, seen = _groups(rule.pattern), set()

    def named(letter: str, number: str, held: str) -> str:
        name = f"{letter}{number}"
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>{held})"

    text = _RAISED.sub(lambda found: named("raised", found[1], r"\d+"), re.escape(rule.path))
    return _PLAIN.sub(lambda found: named("plain", found[1], inside[int(found[1])]), text)


def _names(rule: Rule, match: re.Match[str], kind: str) -> Iterator[str]:
    """Yields the names of the tensor of this kind that a rule's layer may have."""
    groups: dict[int, str] = {}
    for name, text in match.groupdict().items():
        raised = name.startswith("raised")
        groups[int(name.removeprefix("raised").removeprefix("plain"))] = str(int(text) - 1) if raised else text
    unused = [number for number in _groups(rule.pattern) if number not in groups]
    groups |= dict.fromkeys(unused, kind)  # a group that the path has no place for is the kind: `in_proj_(weight|bias)`
    for name in spellings(rule.pattern, groups):
        yield f"{name}.{kind}" if kind in KINDS and not unused else name


def _groups(pattern: str) -> dict[int, str]:
    """Returns what stands in each group of a pattern, by number."""
    found, open_at, number = {}, [], 0
    for at, sign in _signs(pattern):
        if sign == "(":
            captures = not pattern.startswith("(?", at)
            number += captures
            open_at.append((at + 1, number if captures else None))
        elif sign == ")":
            start, which = open_at.pop()
            if which is not None:
                found[which] = pattern[start:at]
    return found


def _signs(pattern: str) -> Iterator[tuple[int, str]]:
    """Yields the signs that open and close groups, with their places."""
    for match in re.finditer(r"\\.|[()]", pattern):
        if match[0] in "()":
            yield match.start(), match[0]


def _alternatives(pattern: str, at: int, number: int, groups: Mapping[int, str]) -> tuple[list[str], int, int]:
    """Returns the spellings from a place to the end of its group, that end, and the number of the next group."""
    found: list[str] = []
    parts: list[list[str]] = []

    def joined() -> list[str]:
        return ["".join(words) for words in itertools.product(*parts)]

    while at < len(pattern) and pattern[at] != ")":
        sign = pattern[at]
        if sign == "|":
            found += joined()
            parts, at = [], at + 1
            continue
        if pattern.startswith("(?:", at):
            inner, at, number = _alternatives(pattern, at + 3, number, groups)
            at += 1
        elif sign == "(":
            inner, at = [groups[number]], _closed(pattern, at)
            number += 1
        elif sign == "[":
            end = pattern.index("]", at)
            inner, at = list(pattern[at + 1 : end]), end + 1
        elif sign == "\\" and not pattern[at + 1].isalnum():
            inner, at = [pattern[at + 1]], at + 2
        elif sign in "\\.*+?{^$":
            raise _unspeakable(pattern)
        else:
            inner, at = [sign], at + 1
        if at < len(pattern) and pattern[at] == "?":
            inner, at = [*inner, ""], at + 1
        parts.append(inner)
    return found + joined(), at, number


def _closed(pattern: str, at: int) -> int:
    """Returns the place behind the group that opens at a place."""
    depth = 0
    for place, sign in _signs(pattern):
        if place >= at:
            depth += 1 if sign == "(" else -1
            if depth == 0:
                return place + 1
    raise _unspeakable(pattern)


def _same(read: Mapping[str, np.ndarray], leaves: Mapping[str, np.ndarray]) -> bool:
    return all(
        path in leaves and value.shape == leaves[path].shape and value.tobytes() == leaves[path].tobytes()
        for path, value in read.items()
    )


def _unspeakable(pattern: str) -> InputError:
    return InputError(f"the pattern {pattern!r} of a scheme stands for many names; put what varies into groups")


def closest(schemes: Sequence[Scheme], leaves: Mapping[str, np.ndarray]) -> Names:
    """Returns the leaves by the names of the scheme that has one for most of them; of equals, the one that needs all.

    Args:
      schemes: of one library.
      leaves: by path.
    """
    return min((tensors_out(leaves, scheme) for scheme in schemes), key=lambda one: (len(one.left), one.idle))
